"""Local sources: which files and rows they read, and what happens to bad ones."""

import gzip
import json
import os
import time
import zlib
from pathlib import Path
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smollm_jax.config.settings import Config, DataConfig
from smollm_jax.data import readers, sources
from smollm_jax.data.heldout import head_texts, held_out
from smollm_jax.data.loader import BatchIterator, Loader
from smollm_jax.data.python_docs import python_docs
from smollm_jax.data.python_questions import python_preferences, python_questions
from smollm_jax.data.shuffle import without
from smollm_jax.data.sources import QUESTIONS, mixture, open_source
from tests.support.texts import make_texts, small_tokenizer, write_jsonl, write_parquet


def texts_of(spec, **changes):
    return [document.text for document in open_source(str(spec), DataConfig(**changes)).documents()]


def assert_every_cursor_works(source):
    documents = list(source.documents())
    for i, document in enumerate(documents):
        rest = list(source.documents(json.loads(json.dumps(document.cursor))))
        assert rest == documents[i + 1 :]


@pytest.fixture
def every_kind(tmp_path):
    """The same texts in each kind of file."""
    texts = make_texts(23)
    write_jsonl(tmp_path / "a.jsonl", texts)
    write_parquet(tmp_path / "b.parquet", texts)
    (tmp_path / "c.txt").write_text("\n\n".join(texts) + "\n")
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return tmp_path, texts


@pytest.mark.parametrize("name", ["a.jsonl", "b.parquet", "c.txt", "d.jsonl.gz"])
def test_every_kind_of_file_gives_its_texts_and_resumes_after_each(every_kind, name):
    folder, texts = every_kind
    assert texts_of(folder / name) == texts
    assert_every_cursor_works(open_source(str(folder / name), DataConfig()))


def test_globs_and_folders_are_read_in_the_order_of_file_names(every_kind):
    folder, texts = every_kind
    assert texts_of(folder / "*") == texts * 4 == texts_of(folder)
    assert_every_cursor_works(open_source(f"{folder}/[ac]*", DataConfig()))


def test_a_folder_is_read_without_what_it_holds_beside_the_data(tmp_path, capsys):
    folder = tmp_path / "texts"
    hidden = [".ipynb_checkpoints/a-checkpoint.jsonl", ".ipynb_checkpoints/LICENSE.txt", "__MACOSX/._a.jsonl"]
    hidden += ["_delta_log/10.checkpoint.jsonl", "._a.jsonl", "LICENSE.txt", "sub/README.txt", "config.json"]
    for name in ["a.jsonl", "sub/b.jsonl", *hidden]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(folder / name, [name])
    assert texts_of(folder) == ["a.jsonl", "sub/b.jsonl"] == texts_of(folder)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"passed over in {folder}: ._a.jsonl, .ipynb_checkpoints, LICENSE.txt")
    assert texts_of(folder / ".ipynb_checkpoints") == [".ipynb_checkpoints/a-checkpoint.jsonl"]
    assert texts_of(folder / "LICENSE.txt") == [json.dumps({"text": "LICENSE.txt"})]


def test_a_pattern_that_names_a_folder_and_what_is_in_it_passes_over_the_same(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["one"])
    (tmp_path / "LICENSE.txt").write_text("no text")
    assert texts_of(f"{tmp_path}/**") == ["one"]
    assert len(texts_of(f"{tmp_path}/*.txt")) == 1


def test_a_linked_folder_is_read_and_no_file_twice(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["one"])
    (tmp_path / "texts" / "sub").mkdir(parents=True)
    write_jsonl(tmp_path / "texts" / "sub" / "b.jsonl", ["two"])
    (tmp_path / "elsewhere").mkdir()
    write_jsonl(tmp_path / "elsewhere" / "c.jsonl", ["three"])
    (tmp_path / "texts" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "texts" / "loop").symlink_to(tmp_path / "texts")
    assert texts_of(tmp_path / "texts") == ["three", "two"]
    assert texts_of(f"{tmp_path}/texts/sub/**") == ["two"]  # the pattern names the folder and its file
    assert texts_of(f"{tmp_path}/**/[ab]*") == ["one", "two"]


def test_damage_in_a_packed_file_costs_the_same_rows_after_a_resume(tmp_path):
    content = b"".join(b'{"text": "%d"}\n' % i for i in range(2_000))
    packer = zlib.compressobj(wbits=31)  # as gzip, and then a block of no known kind
    packed = packer.compress(content) + packer.flush(zlib.Z_FULL_FLUSH) + b"\xff"
    (tmp_path / "a.jsonl.gz").write_bytes(packed)
    source = open_source(str(tmp_path / "a.jsonl.gz"), DataConfig(on_bad_data="skip"))
    documents = list(source.documents())
    assert 1_000 < len(documents) < 2_000
    for i in range(0, len(documents), 100):
        assert list(source.documents(documents[i].cursor)) == documents[i + 1 :]


@pytest.mark.parametrize("name", ["c4-train.json.gz", "part.json"])
def test_lines_of_json_may_be_named_json(tmp_path, name):
    with (gzip.open if name.endswith(".gz") else open)(tmp_path / name, "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in make_texts(5))
    assert texts_of(tmp_path / name) == make_texts(5) == texts_of(tmp_path) == texts_of(f"{tmp_path}/*")
    assert_every_cursor_works(open_source(str(tmp_path / name), DataConfig()))
    write_jsonl(tmp_path / "b.jsonl", ["beside it"])
    assert texts_of(tmp_path) == ["beside it"]  # such as the settings of a data set


def test_a_json_array_is_refused_with_a_way_out(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "one"}]')
    with pytest.raises(ValueError, match=r"a\.json, row 0, cannot be read: a JSON array; expected an object"):
        texts_of(tmp_path / "a.json")


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", ["one"])
    monkeypatch.setattr("os.scandir", Mock(side_effect=PermissionError(13, "Permission denied", str(tmp_path))))
    with pytest.raises(ValueError, match="Permission denied"):
        texts_of(tmp_path)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=8))
@settings(max_examples=60, deadline=None)
def test_any_unicode_survives_json_lines_and_parquet(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("unicode")
    kept = [text for text in texts if text.strip()]
    assert texts_of(write_jsonl(folder / "a.jsonl", texts)) == kept
    if texts:
        assert texts_of(write_parquet(folder / "a.parquet", texts, row_group_size=3)) == kept


@given(st.binary(max_size=200))
@settings(max_examples=150, deadline=None)
def test_arbitrary_bytes_never_cause_a_traceback(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("bytes")
    for name in ("a.jsonl", "a.txt", "a.jsonl.gz", "a.parquet"):
        (folder / name).write_bytes(content)
        try:
            texts_of(folder / name)
        except ValueError as error:
            assert name in str(error)  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
        skipped = []
        settings_ = DataConfig(on_bad_data="skip")
        try:
            list(open_source(str(folder / name), settings_).documents(skipped=skipped))
        except ValueError as error:  # the column is missing, not the row bad
            assert "column" in str(error)  # noqa: PT017


def test_windows_line_ends_and_a_byte_order_mark_are_no_part_of_the_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\nline\r\n\r\n \r\ntwo\r\n")
    assert texts_of(tmp_path / "a.txt") == ["one\r\nline", "two"]
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}')
    assert texts_of(tmp_path / "a.jsonl") == ["one", "two"]


BAD_ROWS = {
    "not JSON": b"{broken",
    "no object": b"[1, 2]",
    "no text": b'{"text": 5}',
    "null": b'{"text": null}',
    "no column": b'{"other": "x"}',
    "not UTF-8": b'{"text": "\xff\xfe"}',
    "a lone surrogate": b'{"text": "\\ud800"}',
    "too deep": b'{"text": ' + b"[" * 100_000,
    "too long a number": b'{"text": ' + b"9" * 5_000 + b"}",
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_named_or_skipped_and_counted(tmp_path, kind):
    good = [json.dumps({"text": text}).encode() for text in make_texts(6)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*good[:4], BAD_ROWS[kind], *good[4:]]))
    with pytest.raises(ValueError, match=r"a\.jsonl, row 4, cannot be read: .*--on-bad-data skip"):
        texts_of(tmp_path / "a.jsonl")
    source = open_source(str(tmp_path / "a.jsonl"), DataConfig(on_bad_data="skip"))
    skipped = []
    assert [d.text for d in source.documents(skipped=skipped)] == make_texts(6)
    assert len(skipped) == 1
    assert_every_cursor_works(source)


def test_a_bad_value_in_parquet_is_named_or_skipped(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = make_texts(6)
    raw = [text.encode() for text in texts]
    raw[2] = b"\xff\xfe"
    column = pa.array(raw, pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet, row 2, cannot be read: UnicodeDecodeError"):
        texts_of(tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet", on_bad_data="skip") == texts[:2] + texts[3:]
    pq.write_table(pa.table({"text": ["a", None, "b"]}), tmp_path / "n.parquet")
    with pytest.raises(ValueError, match=r"n\.parquet, row 1, cannot be read: text is NoneType"):
        texts_of(tmp_path / "n.parquet")


@pytest.mark.parametrize("name", ["b.parquet", "d.jsonl.gz"])
def test_a_truncated_file_is_named_or_the_rest_of_it_skipped(every_kind, name):
    folder, texts = every_kind
    path = folder / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=rf"{name}, from row \d+ on, cannot be read"):
        texts_of(path)
    skipped = []
    source = open_source(str(folder / "*"), DataConfig(on_bad_data="skip"))
    kept = [document.text for document in source.documents(skipped=skipped)]
    assert len(skipped) == 1
    assert 3 * len(texts) <= len(kept) < 4 * len(texts)


def test_a_corrupt_row_group_is_named_and_the_groups_before_it_are_read(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", make_texts(21))
    content = bytearray(path.read_bytes())
    import pyarrow.parquet as pq

    start = pq.ParquetFile(path).metadata.row_group(2).column(1).dictionary_page_offset
    content[start : start + 24] = b"\xff" * 24
    path.write_bytes(content)
    source, read = open_source(str(path), DataConfig()), []
    with pytest.raises(ValueError, match=r"a\.parquet, from row 14 on, cannot be read"):
        read.extend(source.documents())
    assert texts_of(path, on_bad_data="skip") == make_texts(21)[:14]


@pytest.mark.parametrize("skip", ["stop", "skip"])
def test_a_missing_column_is_an_error_even_if_bad_rows_are_skipped(every_kind, skip):
    folder, _ = every_kind
    for name in ("a.jsonl", "b.parquet"):
        with pytest.raises(ValueError, match=rf"{name} has no column 'body' but .*text; give --text-column"):
            texts_of(folder / name, text_column="body", on_bad_data=skip)


def test_a_missing_or_unreadable_source_is_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match="matches no file"):
        texts_of(tmp_path / "*.jsonl")
    with pytest.raises(ValueError, match="matches no file"):
        texts_of(tmp_path)
    with pytest.raises(ValueError, match="matches no file"):
        texts_of("nothing-of-the-kind")
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ValueError, match=r"is none of \.jsonl"):
        texts_of(tmp_path / "a.csv")
    with pytest.raises(ValueError, match="built-in sources are builtin:python-docs and"):
        texts_of("builtin:poems")


def test_a_file_that_goes_away_while_it_is_read_is_named(every_kind):
    folder, _ = every_kind
    source = open_source(f"{folder}/*", DataConfig())
    (folder / "c.txt").unlink()
    with pytest.raises(ValueError, match=r"c\.txt, from row 0 on, cannot be read: FileNotFoundError"):
        list(source.documents())


def test_the_built_in_prose_is_distinct_and_resumes():
    texts = texts_of("builtin:python-docs")
    assert tuple(texts) == python_docs()
    assert len(set(texts)) == len(texts) > 3_000
    assert sum(map(len, texts)) > 1_500_000
    source = open_source("builtin:python-docs", DataConfig())
    third = [document for document, _ in zip(source.documents(), range(3), strict=False)][2]
    assert next(source.documents(third.cursor)).text == texts[3]


def test_the_built_in_questions_are_conversations_about_distinct_functions_and_resume():
    chat = DataConfig(data_kind="chat")
    found = [document.conversation for document in open_source(QUESTIONS, chat).documents()]
    assert len({one.messages[0]["content"] for one in found}) == len(found) > 2_000
    assert {len(one.messages) for one in found} == {2, 4, 6}
    (one,) = (one.messages for one in found if " shutil.disk_usage" in one.messages[0]["content"])
    assert one[1]["content"] == "Return disk usage statistics about the given path."
    assert not [one for one in found if "a method of" in one.text and "(self" in one.text]
    assert not [one for one in found if "__" in one.messages[0]["content"]]
    source = open_source(QUESTIONS, chat)
    third = [document for document, _ in zip(source.documents(), range(3), strict=False)][2]
    assert next(source.documents(third.cursor)).conversation == found[3]


def test_a_built_in_preference_is_the_own_answer_to_that_about_a_neighbour():
    rows = python_preferences()
    answers = {one["messages"][0]["content"]: one["messages"][1]["content"] for one in python_questions()}
    assert len(rows) > 2_000
    for row in rows:
        assert row["chosen"] == answers[row["prompt"]] != row["rejected"]
        assert row["rejected"] in answers.values()
    # both hold out the same functions
    assert [row["prompt"] for row in rows] == list(answers)


@pytest.mark.parametrize(
    ("spec", "kind", "told"),
    [
        (
            QUESTIONS,
            "text",
            r"--data builtin:python-questions has no rows of --data-kind text; it has chat, pairs",
        ),
        ("builtin:questions", "chat", "the built-in sources are builtin:python-docs and builtin:python-questions"),
    ],
)
def test_a_built_in_source_of_another_kind_or_name_is_refused(spec, kind, told):
    with pytest.raises(ValueError, match=told):
        open_source(spec, DataConfig(data_kind=kind))


def test_weights_of_a_mixture():
    assert mixture("a/b:c") == [("a/b:c", 1.0)]
    assert mixture("a.jsonl=3, b.txt") == [("a.jsonl", 0.75), ("b.txt", 0.25)]
    assert mixture("x=y.jsonl") == [("x=y.jsonl", 1.0)]
    for wrong in ("", "a,,b", "a=0", "a=-1", "a=nan", "a=inf", "=1"):
        with pytest.raises(ValueError, match="--data"):
            mixture(wrong)


@pytest.mark.parametrize("whole_bytes", [2**30, 0])
def test_a_byte_changed_in_the_middle_of_a_file_changes_its_fingerprint(tmp_path, monkeypatch, whole_bytes):
    monkeypatch.setattr(sources, "WHOLE_BYTES", whole_bytes)
    monkeypatch.setattr(sources, "PROBES", 3)
    path = tmp_path / "a.txt"
    text = bytearray(b"x" * (sources.PROBE_BYTES * 9))
    path.write_bytes(text)
    before = open_source(str(path), DataConfig()).fingerprint
    text[len(text) // 2] += 1
    path.write_bytes(text)
    assert open_source(str(path), DataConfig()).fingerprint != before


@pytest.mark.parametrize(
    "data", ["corpus [v2].jsonl", "year=2024", "a*b", "[team] data/*.jsonl", "a,b.jsonl", "[x]/?.jsonl", "~"]
)
def test_a_path_that_exists_is_that_path_before_it_is_a_pattern_a_weight_or_a_list(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    file = Path(data.replace("*.", "1.").replace("?.", "1.").replace("~", str(tmp_path / "home")))
    file = file if file.suffix else file / "1.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text('{"text": "one"}\n')
    other = Path("other.jsonl")
    other.write_text('{"text": "two"}\n')
    for spec in (data, f"{data}=0.5,other.jsonl=0.5", f"other.jsonl,{data}"):
        found = [open_source(part, DataConfig(data=spec)).files for part, _ in mixture(spec)]
        assert [str(file)] in found, spec
        assert len(found) == 1 + ("other" in spec)


@pytest.mark.parametrize("data", [" a.jsonl", "a.jsonl,", "~nobody.jsonl", ",=2"])
def test_a_path_that_exists_alone_is_that_path_with_its_spaces_and_its_tilde(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    file = Path(data) if "." in data else Path(data, "a.jsonl")
    file.parent.mkdir(exist_ok=True)
    file.with_suffix(".jsonl").write_text('{"text": "one"}\n')
    file.with_suffix(".jsonl").rename(file)
    assert mixture(data) == [(data, 1.0)]
    if data != "a.jsonl,":  # known by its suffix
        assert open_source(data, DataConfig(data=data)).files == [str(file)]


def test_data_that_is_a_pipe_is_named_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    for data in (tmp_path, tmp_path / "a.jsonl"):
        with pytest.raises(ValueError, match="no regular file"):
            open_source(str(data), DataConfig(data=str(data)))


@pytest.fixture
def limits(monkeypatch):
    values = {"LONGEST_BYTES": 1_000, "SEARCHED_BYTES": 10_000, "MOST_BLANK": 50, "CHECKED_BYTES": 50_000}
    for name, value in (values | {"LARGEST_RATIO": 20}).items():
        monkeypatch.setattr(readers, name, value)


def long_documents(folder, name, size):
    texts = ["one", "x" * size, "two"]
    if name.endswith(".parquet"):
        write_parquet(folder / name, texts)
    elif name.endswith(".txt"):
        (folder / name).write_text("one\n\n" + "word\n" * (size // 5) + "\ntwo\n")
    else:
        with (gzip.open if name.endswith(".gz") else open)(folder / name, "wt") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return folder / name


@pytest.mark.usefixtures("limits")
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.txt", "a.jsonl.gz"])
def test_a_document_that_is_too_long_is_named_by_file_and_row(tmp_path, name):
    path = long_documents(tmp_path, name, 5_000)
    with pytest.raises(ValueError, match=rf"{name}, row 1, cannot be read: .*a document above .* split it"):
        texts_of(path)
    skipped = []
    source = open_source(str(path), DataConfig(on_bad_data="skip"))
    assert [document.text for document in source.documents(skipped=skipped)] == ["one", "two"]
    assert len(skipped) == 1
    assert_every_cursor_works(source)


@pytest.mark.usefixtures("limits")
def test_a_line_without_end_is_given_up(tmp_path):
    path = long_documents(tmp_path, "a.jsonl.gz", 100_000)
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz, from row 1 on, cannot be read: .* no end of it"):
        texts_of(path)
    assert texts_of(path, on_bad_data="skip") == ["one"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_terabyte_without_a_line_end_is_given_up_within_seconds(tmp_path, name):
    """A sparse file takes no room on the disk of whoever sends it."""
    (tmp_path / name).touch()
    os.truncate(tmp_path / name, 10**12)
    started = time.perf_counter()
    with pytest.raises(ValueError, match="no end of it within 256 MiB"):
        texts_of(tmp_path / name)
    assert time.perf_counter() - started < 3  # 0.6; in pieces of 32 MiB up to a gigabyte, 18


@pytest.mark.usefixtures("limits")
@pytest.mark.parametrize(("line", "words"), [("\n", "blank lines in a row"), ('{"text": "again"}\n', "expands")])
def test_an_archive_that_expands_without_end_is_given_up(tmp_path, line, words):
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(line * 100_000)
    with pytest.raises(ValueError, match=rf"a\.jsonl\.gz, from row \d+ on, cannot be read: .*{words}"):
        texts_of(tmp_path / "a.jsonl.gz")


def test_a_split_of_local_files_is_not_dropped_in_silence(tmp_path, capsys):
    texts_of(write_jsonl(tmp_path / "a.jsonl", ["one"]), split="test")
    assert "--split test is for datasets on the Hub" in capsys.readouterr().err


def test_of_a_single_text_the_end_is_held_out_and_never_trained_on(tmp_path):
    sentences = [f"Sentence {i} of one long text.\n" for i in range(100)]
    (tmp_path / "l.txt").write_text("".join(sentences))
    config, tokenizer = Config(data=DataConfig(data=str(tmp_path / "l.txt"), seq_len=32)), small_tokenizer()
    ((end, _),) = held_out(config.data, tokenizer)
    assert end.text.splitlines(keepends=True) == [*sentences[91:-1], sentences[-1].rstrip()]
    loader = Loader(config, tokenizer, held_out(config.data, tokenizer))
    (trained,) = without(loader.excluded, open_source(config.data.data, config.data).documents())
    assert trained.text == "".join(sentences[:91])
    assert list(head_texts(config.data)) == [trained.text]
    batch, _ = next(BatchIterator(loader, None))
    assert tokenizer.decode(batch.tokens[0]) in trained.text


@pytest.mark.parametrize("text", ["one", "word"])
def test_a_text_too_short_to_hold_out_its_end_is_one_line(tmp_path, text):
    path = write_jsonl(tmp_path / "a.jsonl", [text])
    with pytest.raises(ValueError, match="holds 1 documents, too few to hold any out"):
        held_out(DataConfig(data=str(path)), small_tokenizer())


def test_of_a_few_texts_the_end_of_the_last_is_held_out(tmp_path):
    texts = [f"The text {i} has a beginning, a middle, some more words, and at last an end." for i in range(5)]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    ((end, _),) = held_out(DataConfig(data=str(path)), small_tokenizer())
    assert end.kept + end.text == texts[-1]
    assert 0 < len(end.text) < 15
    path = write_jsonl(tmp_path / "b.jsonl", ["a" * 300])  # no line and no word ends
    ((end, _),) = held_out(DataConfig(data=str(path)), small_tokenizer())
    assert end.text == "a" * 30


@pytest.mark.parametrize(("between", "said"), [("\n", "is one document of 200 lines"), ("\n\n", "")])
def test_a_text_without_a_blank_line_is_said_to_be_one_document(tmp_path, capsys, between, said):
    path = tmp_path / "a.txt"
    path.write_text(between.join(f"Sentence {i}." for i in range(200)))
    documents = list(open_source(str(path), DataConfig()).documents())
    assert len(documents) == (1 if said else 200)
    err = capsys.readouterr().err
    assert said in err
    assert bool(err) == bool(said)
