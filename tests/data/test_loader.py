"""The loader: no document lost or repeated, and the same next batch from every cursor."""

import contextlib
import json
import random
import re
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smollm_jax.config.settings import Config, DataConfig, RunConfig
from smollm_jax.data.heldout import batches_in_order, held_out
from smollm_jax.data.loader import BATCHES_AHEAD, BatchIterator, Loader, PrefetchLoader, check_vocab, merge_cursors
from smollm_jax.data.packing import pack
from smollm_jax.data.shuffle import ShuffledSource, tokenize
from smollm_jax.data.sources import WHOLE, Document, Shard, open_source
from tests.support.texts import make_texts, small_tokenizer, write_jsonl, write_parquet


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two sources of 60 and 45 texts, some of them alike."""
    path = tmp_path_factory.mktemp("texts")
    texts = make_texts(60)
    write_jsonl(path / "a1.jsonl", texts[:25])
    write_jsonl(path / "a2.jsonl", texts[25:])
    write_parquet(path / "b.parquet", make_texts(40, seed=1) + texts[:5])
    return path


def config_of(folder, data="a*.jsonl", **changes):
    data = ",".join(str(folder / part) for part in data.split(","))
    return DataConfig(**({"data": data, "seq_len": 16, "shuffle_window": 8, "epochs": 1} | changes))


def open_at(data, tokenizer, cursor=None, *, seed=3, phases="1000000x4", held=()):
    # what a checkpoint does to it
    cursor = None if cursor is None else json.loads(json.dumps(cursor))
    config = Config(data=data, run=RunConfig(seed=seed, phases=phases))
    return PrefetchLoader(Loader(config, tokenizer, held), cursor)


def batches_of(data, tokenizer, cursor=None, shards=None):
    config = Config(data=data, run=RunConfig(seed=3, phases="1000000x4"))
    return BatchIterator(Loader(config, tokenizer, shards=shards), cursor)


def take(stream, count=10**6):
    """Up to `count` batches and their cursors."""
    taken = []
    try:
        while len(taken) < count:
            item = stream.get(timeout=30)
            assert item is not None, "no batch within 30 s"
            taken.append(item)
    except StopIteration:
        pass
    stream.close()
    return taken


def same(a, b):
    return np.array_equal(a.tokens, b.tokens) and np.array_equal(a.segment_ids, b.segment_ids)


def documents_in(batches):
    """Join the pieces of each document in the rows; pieces in neighbouring rows overlap by one token."""
    documents, at_end = [], False
    for batch in batches:
        for tokens, segments in zip(batch.tokens, batch.segment_ids, strict=True):
            for segment in range(1, segments.max() + 1):
                piece = tokens[segments == segment].tolist()
                if segment == 1 and at_end:
                    assert documents[-1][-1] == piece[0]
                    documents[-1] += piece[1:]
                else:
                    documents.append(piece)
            at_end = segments[-1] != 0 and documents[-1][-1] != 0
    return documents


def expected_documents(texts, tokenizer):
    return [[*tokenizer.encode(text).tolist(), tokenizer.eos_id] for text in texts]


def test_the_rows_of_a_finite_source_hold_every_document_whole(folder, tokenizer):
    for data, texts in (("a*.jsonl", make_texts(60)), ("b.parquet", make_texts(40, seed=1) + make_texts(60)[:5])):
        batches = [batch for batch, _ in take(open_at(config_of(folder, data), tokenizer))]
        assert sorted(documents_in(batches)) == sorted(expected_documents(texts, tokenizer))
        rows = np.concatenate([batch.segment_ids for batch in batches])
        used = rows.any(axis=1).sum()
        assert rows[: used - 1].all(), "padding before the last row"


def test_batches_in_order_hold_every_document_in_order(folder, tokenizer):
    a, b = make_texts(60), make_texts(40, seed=1) + make_texts(60)[:5]
    found = documents_in(batches_in_order(config_of(folder), tokenizer, 3))
    assert found == expected_documents(a, tokenizer)
    mixed = documents_in(batches_in_order(config_of(folder, "a*.jsonl,b.parquet"), tokenizer, 3))
    in_turn = [text for pair in zip(a, b, strict=False) for text in pair] + a[len(b) :]
    assert mixed == expected_documents(in_turn, tokenizer)


def test_the_order_depends_on_window_seed_and_epoch(folder, tokenizer):
    def order(seed, window=8, epochs=1):
        config = config_of(folder, shuffle_window=window, epochs=epochs)
        return documents_in([batch for batch, _ in take(open_at(config, tokenizer, seed=seed))])

    in_order = expected_documents(make_texts(60), tokenizer)
    assert order(3, window=1) == in_order
    assert order(3) == order(3) != order(4) != in_order
    twice = order(3, epochs=2)
    assert len(twice) == 120
    assert sorted(twice[:60]) == sorted(twice[60:]) == sorted(in_order)
    assert twice[:60] != twice[60:]


@pytest.mark.parametrize(
    ("data", "epochs", "window"),
    [("a*.jsonl", 1, 8), ("a*.jsonl", 3, 20), ("b.parquet", 2, 5), ("a*.jsonl=0.7,b.parquet=0.3", 2, 8),
     ("a*.jsonl", 2, 1_000)],
)  # fmt: skip
def test_every_cursor_gives_the_very_same_next_batches(folder, tokenizer, data, epochs, window):
    config = config_of(folder, data, epochs=epochs, shuffle_window=window)
    phases = "12x4,1000000x2"
    straight = take(open_at(config, tokenizer, phases=phases))
    assert len(straight) > 20
    for i in range(len(straight)):
        again = take(open_at(config, tokenizer, straight[i][1], phases=phases), 3)
        assert len(again) == min(3, len(straight) - 1 - i)
        for (batch, cursor), (expected, expected_cursor) in zip(again, straight[i + 1 : i + 4], strict=True):
            assert same(batch, expected)
            assert cursor == expected_cursor


@given(stops=st.lists(st.integers(1, 7), min_size=1, max_size=12), epochs=st.integers(0, 3))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_resumes_of_resumes_equal_a_straight_run(folder, tokenizer, stops, epochs):
    config = config_of(folder, "a*.jsonl=2,b.parquet", epochs=epochs)
    straight = take(open_at(config, tokenizer), sum(stops))
    cursor, pieces = None, []
    for stop in stops:
        piece = take(open_at(config, tokenizer, cursor), stop)
        pieces += piece
        cursor = piece[-1][1] if piece else cursor
    assert len(pieces) == len(straight)
    assert all(same(a[0], b[0]) and a[1] == b[1] for a, b in zip(pieces, straight, strict=True))


def test_a_cursor_counts_the_documents_that_are_read_to_their_end(folder, tokenizer):
    """An older cursor goes on without a count."""
    taken = take(open_at(config_of(folder, epochs=2), tokenizer))
    assert taken[-1][1]["lanes"]["0"]["sources"][0]["documents"] == 120
    for i in range(0, len(taken), 7):
        whole = [
            one for one in documents_in([batch for batch, _ in taken[: i + 1]]) if one[-1] == tokenizer.eos_id
        ]
        assert taken[i][1]["lanes"]["0"]["sources"][0]["documents"] == len(whole)
    cursor = taken[4][1]
    del cursor["lanes"]["0"]["sources"][0]["documents"]
    rest = take(open_at(config_of(folder, epochs=2), tokenizer, cursor))
    assert all(same(a, b) for (a, _), (b, _) in zip(rest, taken[5:], strict=True))
    assert "documents" not in rest[-1][1]["lanes"]["0"]["sources"][0]


def test_a_resume_after_the_last_batch_ends_at_once(folder, tokenizer):
    config = config_of(folder)
    last = take(open_at(config, tokenizer))[-1][1]
    assert take(open_at(config, tokenizer, last)) == []


def test_the_stream_ends_after_the_last_step(folder, tokenizer):
    config = config_of(folder, epochs=0)
    taken = take(open_at(config, tokenizer, phases="50x4"))
    assert len(taken) == 50
    assert len(take(open_at(config, tokenizer, taken[47][1], phases="50x4"))) == 2


def test_the_documents_of_a_batch_are_those_in_its_rows(folder, tokenizer):
    config = config_of(folder, "a*.jsonl,b.parquet")
    taken = take(open_at(config, tokenizer), 8)
    stream = open_at(config, tokenizer)
    for i in range(1, 8):
        texts = [d["text"] for d in stream.documents_of(taken[i - 1][1])]
        pieces = documents_in([taken[i][0]])
        assert len(texts) == len(pieces)
        for text, piece in zip(texts, pieces, strict=True):
            assert str(piece)[1:-1] in str(expected_documents([text], tokenizer)[0])
    stream.close()


def test_a_mixture_keeps_its_shares_of_tokens(tmp_path, tokenizer):
    """Counted in the batches, over sources whose documents are of unlike length."""
    write_jsonl(tmp_path / "long.jsonl", ["x" * 400] * 50)
    write_jsonl(tmp_path / "short.jsonl", ["zz"] * 50)
    config = config_of(tmp_path, "long.jsonl=0.6,short.jsonl=0.4", epochs=0)
    counts = Counter()
    for batch, _ in take(open_at(config, tokenizer), 400):
        counts.update(batch.tokens[:, 1:].ravel().tolist())
    of_long, of_short = (
        sum(counts[i] for i in set(tokenizer.encode(text).tolist())) for text in ("x" * 400, "zz")
    )
    of_short *= 1 + 1 / len(tokenizer.encode("zz"))  # the eos of each short document
    assert of_long / (of_long + of_short) == pytest.approx(0.6, abs=0.02)


def shares(batches, tokenizer):
    """How many documents of each source begin in `batches`; the texts of a source begin with its letter."""
    rows = [(row, ids) for batch in batches for row, ids in zip(batch.tokens, batch.segment_ids, strict=True)]
    text = " ".join(tokenizer.decode(row[ids > 0]) for row, ids in rows)
    return Counter(word[0] for word in re.findall(r"[abc]\d+ ", text))


@pytest.fixture(scope="module")
def lettered(tmp_path_factory):
    """Sources whose texts begin with the letter of their file; those of c are longer."""
    path = tmp_path_factory.mktemp("lettered")
    for letter, words in (("a", 15), ("b", 15), ("c", 40)):
        write_jsonl(path / f"{letter}.jsonl", [f"{letter}{i} " + "cat dog " * words for i in range(900)])
    return path


MIXTURE = {"a": 0.6, "b": 0.3, "c": 0.1}


@pytest.mark.parametrize("eval_data", [False, True])
@pytest.mark.parametrize("rows", [12, 64, 10**6])
def test_every_start_of_the_held_out_documents_has_the_mixtures_shares(lettered, tokenizer, rows, eval_data):
    """A change of this order changes every held-out loss of a mixture."""
    names = ",".join(f"{lettered}/{letter}.jsonl={weight}" for letter, weight in MIXTURE.items())
    data = {"data": f"{lettered}/a.jsonl", "eval_data": names} if eval_data else {"data": names}
    held = held_out(DataConfig(seq_len=64, eval_documents=60, **data), tokenizer)
    assert len(held) == 60
    found = shares(islice(pack(held, 64, 1), rows), tokenizer)
    for letter, weight in MIXTURE.items():
        assert abs(found[letter] - weight * found.total()) <= 1


def test_a_score_of_the_first_batches_of_a_mixture_is_of_the_mixture(lettered, tokenizer):
    names = ",".join(f"{lettered}/{letter}.jsonl={weight}" for letter, weight in MIXTURE.items())
    found = shares(islice(batches_in_order(DataConfig(data=names, seq_len=64), tokenizer, 4), 20), tokenizer)
    for letter, weight in MIXTURE.items():
        assert abs(found[letter] - weight * found.total()) <= 1


def test_held_out_documents_of_one_source_come_in_its_order(folder, tokenizer):
    held = held_out(config_of(folder, "a1.jsonl", eval_documents=2), tokenizer)
    assert [document.row for document, _ in held] == [9, 19]


def test_closing_while_the_window_read_ahead_is_taken_is_no_fault(tmp_path, tokenizer):
    write_jsonl(tmp_path / "a.jsonl", make_texts(4))

    class Taken(ShuffledSource):
        """The thread that draws takes the window between two looks at it."""

        looks = 0

        @property
        def _next(self):
            self.looks += 1
            return None if self.looks > 1 else self.ahead

        @_next.setter
        def _next(self, value):
            self.ahead = value

    source = open_source(str(tmp_path / "a.jsonl"), config_of(tmp_path, "a.jsonl"))
    shuffled = Taken(source, tokenizer, seed=[3, 0], excluded={}, shard=WHOLE)
    shuffled.prepare()
    shuffled.close()


def test_shards_are_shuffled_each_in_its_own_order(tmp_path, tokenizer):
    write_jsonl(tmp_path / "a.jsonl", make_texts(64))
    source = open_source(str(tmp_path / "a.jsonl"), config_of(tmp_path, "a.jsonl", shuffle_window=64))
    orders = []
    for index in range(2):
        shuffled = ShuffledSource(source, tokenizer, seed=[3, 0], excluded={}, shard=Shard(index, 2))
        orders.append([shuffled.draw()[0].row // 2 for _ in range(32)])
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(32))
    assert orders[0] != orders[1]


def test_held_out_documents_and_their_copies_are_never_trained_on(tmp_path, tokenizer):
    texts = make_texts(60)
    write_jsonl(tmp_path / "a.jsonl", texts + texts[9:30])  # copies of some held-out ones
    write_parquet(tmp_path / "b.parquet", make_texts(40, seed=1) + texts)
    for changes in ({}, {"eval_data": str(tmp_path / "b.parquet")}):
        config = config_of(tmp_path, "a.jsonl,b.parquet", epochs=2, eval_documents=8, **changes)
        held = held_out(config, tokenizer)
        places = [(document.file[-5:], document.row) for document, _ in held]
        if changes:
            assert sorted(row for _, row in places) == list(range(8))
        else:
            assert sorted(row for _, row in places) == [9, 9, 19, 19, 29, 29, 39, 39]
        out = {tuple(tokens.tolist()) for _, tokens in held}
        trained = documents_in(b for b, _ in take(open_at(config, tokenizer, held=held)))
        assert out.isdisjoint(map(tuple, trained))
        everything = texts + texts[9:30] + make_texts(40, seed=1) + texts
        held_texts = {document.text for document, _ in held}
        kept = [text for text in everything if text not in held_texts]
        assert sorted(trained) == sorted(2 * expected_documents(kept, tokenizer))
        assert documents_in(pack(held, 16, 2)) == [tokens.tolist() for _, tokens in held]


def test_other_held_out_documents_or_another_tokenizer_are_refused(folder, tokenizer):
    from smollm_jax.tokenizer.load import train_tokenizer

    config = config_of(folder)
    cursor = take(open_at(config, tokenizer), 2)[1][1]
    with pytest.raises(ValueError, match="held-out documents changed"):
        open_at(config, tokenizer, cursor, held=held_out(config_of(folder, eval_documents=1), tokenizer))
    with pytest.raises(ValueError, match="tokenizer changed"):
        open_at(config, train_tokenizer(make_texts(50), 310), cursor)


def test_changed_files_are_refused_by_name(tmp_path, tokenizer):
    write_jsonl(tmp_path / "a1.jsonl", make_texts(30))
    config = config_of(tmp_path)
    cursor = take(open_at(config, tokenizer), 2)[1][1]
    write_jsonl(tmp_path / "a2.jsonl", make_texts(30, seed=2))
    with pytest.raises(ValueError, match=r"files of .*a\*\.jsonl changed .*new or changed: .*a2\.jsonl"):
        open_at(config, tokenizer, cursor)
    (tmp_path / "a2.jsonl").unlink()
    texts = make_texts(30)
    write_jsonl(tmp_path / "a1.jsonl", [texts[0][::-1], *texts[1:]])  # of the same length
    with pytest.raises(ValueError, match=r"1 of 1 files gone or changed"):
        open_at(config, tokenizer, cursor)


def test_data_that_moved_goes_on_and_sources_that_swapped_do_not(tmp_path, tokenizer):
    for name in ("one", "two", "far"):
        (tmp_path / name).mkdir()
    write_jsonl(tmp_path / "one" / "a.jsonl", make_texts(30))
    write_jsonl(tmp_path / "two" / "b.jsonl", make_texts(30, seed=2))
    config = config_of(tmp_path, "one/a.jsonl,two/b.jsonl")
    batches = take(open_at(config, tokenizer), 3)
    (tmp_path / "one" / "a.jsonl").rename(tmp_path / "far" / "a.jsonl")
    moved = take(open_at(config_of(tmp_path, "far/a.jsonl,two/b.jsonl"), tokenizer, batches[1][1]), 1)
    np.testing.assert_array_equal(moved[0][0].tokens, batches[2][0].tokens)
    with pytest.raises(ValueError, match=r"files of .*b\.jsonl changed"):
        open_at(config_of(tmp_path, "two/b.jsonl,far/a.jsonl"), tokenizer, batches[1][1])


def test_a_file_that_is_read_twice_is_reported(tmp_path, tokenizer, capsys):
    write_jsonl(tmp_path / "a.jsonl", make_texts(30))
    open_at(config_of(tmp_path, "*.jsonl,a.jsonl"), tokenizer)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("read twice: 1 files have name and content of another, such as")


def test_long_documents_are_tokenized_in_smaller_groups(monkeypatch, tokenizer):
    groups = []
    monkeypatch.setattr("smollm_jax.data.shuffle.CHARACTERS_TOGETHER", 100)
    encoder = Mock(eos_id=0, encode_batch=lambda texts: groups.append(len(texts)) or tokenizer.encode_batch(texts))
    texts = ["a" * 30] * 5 + ["b" * 1_000] + ["c"]
    documents = [Document(text, "", "", i, {}) for i, text in enumerate(texts)]
    assert [document for document, _ in tokenize(documents, encoder)] == documents
    assert groups == [4, 2, 1]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def damaged(draw, cursor):
    """A cursor with one value, at any depth, replaced or removed."""
    cursor = json.loads(json.dumps(cursor))
    node = cursor
    while True:
        key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if isinstance(node[key], dict | list) and node[key] and draw(st.booleans()):
            node = node[key]
            continue
        if draw(st.booleans()):
            node[key] = draw(JSON)
        else:
            del node[key]
        return cursor


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_cursor_is_refused_in_one_line(folder, tokenizer, data):
    config = config_of(folder, "a*.jsonl,b.parquet")
    good = take(open_at(config, tokenizer), 3)[2][1]
    cursor = data.draw(damaged(good) | JSON.filter(lambda value: value is not None))
    stream = None
    try:
        stream = open_at(config, tokenizer, cursor)
        assert stream.get(timeout=30) is not None
    except StopIteration:
        pass  # a position after the end
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017
        assert len(str(error)) < 600  # noqa: PT017
    finally:
        if stream is not None:
            stream.close()


def test_the_cursor_is_small(folder, tokenizer):
    cursor = take(open_at(config_of(folder), tokenizer), 5)[4][1]
    assert len(json.dumps(cursor)) < 650


def test_a_source_without_documents_is_refused(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="holds no document to train on"):
        take(open_at(config_of(tmp_path, "a.jsonl"), tokenizer))
    write_jsonl(tmp_path / "b.jsonl", make_texts(3))
    config = config_of(tmp_path, "b.jsonl", epochs=0)
    with pytest.raises(ValueError, match="holds no document to train on"):
        take(open_at(config, tokenizer, held=tokenize(open_source(config.data, config).documents(), tokenizer)))


def test_resumes_count_a_skipped_row_once(tmp_path, tokenizer):
    lines = [json.dumps({"text": text}) for text in make_texts(40)]
    for i in (3, 17, 18, 39):
        lines[i] = "{broken"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    config = config_of(tmp_path, "a.jsonl", on_bad_data="skip")
    straight = take(open_at(config, tokenizer))
    assert straight[-1][1]["skipped"] == 4
    cursor = None
    for _, expected in straight:
        cursor = take(open_at(config, tokenizer, cursor), 1)[0][1]
        assert cursor["skipped"] == expected["skipped"]


def test_bad_data_stops_the_stream_where_it_is_reached_and_not_before(tmp_path, tokenizer):
    lines = [json.dumps({"text": text}) for text in make_texts(40)]
    lines[30] = "{broken"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    stream, taken = open_at(config_of(tmp_path, "a.jsonl"), tokenizer), []
    with pytest.raises(ValueError, match=r"a\.jsonl, row 30, cannot be read"):
        taken.extend(iter(lambda: stream.get(timeout=30), None))
    assert len(taken) > 5  # three windows of eight came before
    with pytest.raises(ValueError, match="row 30"):
        stream.get(timeout=1)
    stream.close()


def test_the_next_window_is_read_while_this_one_is_in_use(folder, tokenizer):
    config = config_of(folder, epochs=0)
    source = ShuffledSource(open_source(config.data, config), tokenizer, seed=[0, 0], excluded={}, shard=WHOLE)
    for number in range(1, 6):
        document, _ = source.draw()
        window = source._next.result(30)
        following = source._current.following
        assert (following["epoch"], following["number"]) == (0, number)
        assert document not in [other for other, _ in window.documents]
        for _ in range(7):
            source.draw()


def test_a_closed_stream_leaves_no_thread(folder, tokenizer):
    stream = open_at(config_of(folder, epochs=0), tokenizer)
    while stream._queue.qsize() <= BATCHES_AHEAD:
        time.sleep(0.01)
    stream.close()
    assert not stream._thread.is_alive()
    assert all(source._next.wait(0) for source in stream._batches.shards[0].sources)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tokenizer):
    check_vocab(tokenizer, tokenizer.vocab_size)
    with pytest.raises(ValueError, match="--vocab-size"):
        check_vocab(tokenizer, tokenizer.vocab_size - 1)


@pytest.mark.slow
def test_memory_stays_flat_over_words_that_are_always_new(tmp_path, tokenizer):
    psutil, rng = pytest.importorskip("psutil"), random.Random(0)
    texts = (" ".join(f"{rng.getrandbits(60):x}" for _ in range(60)) for _ in range(4_000))
    write_jsonl(tmp_path / "a.jsonl", texts)
    stream = open_at(config_of(tmp_path, "a.jsonl", epochs=0, seq_len=256, shuffle_window=256), tokenizer)
    memory, epoch = [], 0
    while epoch < 5:
        _, cursor = stream.get(timeout=60)
        if cursor["lanes"]["0"]["sources"][0]["epoch"] > epoch:
            epoch += 1
            memory.append(psutil.Process().memory_info().rss)
    stream.close()
    assert memory[-1] - memory[0] < 20 * 2**20


def rows_of(batches):
    return [(batch.tokens.tolist(), batch.segment_ids.tolist()) for batch, _ in batches]


@pytest.mark.parametrize(
    "data", ["a*.jsonl=0.7,b.parquet=0.3", "a*.jsonl", pytest.param("builtin:python-docs", marks=pytest.mark.slow)]
)
def test_shards_share_the_documents_without_loss_or_repeat(folder, tokenizer, data):
    """Fewer files than shards: by row. Every document of an epoch once, whatever the number of shards."""
    if data.startswith("builtin"):
        folder = None
    seen = []
    for shards in (1, 4):
        config = (
            config_of(folder, data, epochs=1, shards=shards)
            if folder
            else DataConfig(data=data, epochs=1, shards=shards, seq_len=512)
        )
        batches = batches_of(config, tokenizer)
        found = set()
        with contextlib.suppress(StopIteration):
            while True:
                next(batches)
                found |= {(d["source"], d["file"], d["row"]) for d in batches.documents()}
        seen.append(found)
    assert seen[0] == seen[1]


def test_the_rows_of_all_processes_are_the_rows_of_one(folder, tokenizer):
    config = config_of(folder, epochs=0, shards=4)
    whole = [next(stream) for stream in [batches_of(config, tokenizer)] for _ in range(12)]
    parts = [batches_of(config, tokenizer, shards=shards) for shards in ([0, 1], [2], [3])]
    for batch, cursor in whole:
        made = [next(part) for part in parts]
        assert [part.first_row for part, _ in made] == [0, 2, 3]
        np.testing.assert_array_equal(np.concatenate([part.tokens for part, _ in made]), batch.tokens)
        assert merge_cursors([cursor for _, cursor in made]) == cursor


def test_a_cursor_resumes_with_another_number_of_processes(folder, tokenizer):
    config = config_of(folder, epochs=0, shards=4)
    stream = batches_of(config, tokenizer)
    straight = [next(stream) for _ in range(20)]
    for n in (1, 7, 13):
        cursor = json.loads(json.dumps(straight[n][1]))
        parts = [batches_of(config, tokenizer, cursor, shards) for shards in ([0], [1, 2, 3])]
        for batch, _ in straight[n + 1 :]:
            tokens = np.concatenate([next(part)[0].tokens for part in parts])
            np.testing.assert_array_equal(tokens, batch.tokens)


def test_another_number_of_shards_is_refused(folder, tokenizer):
    cursor = take(open_at(config_of(folder, shards=2), tokenizer), 2)[1][1]
    with pytest.raises(ValueError, match="the shards changed since the checkpoint"):
        open_at(config_of(folder, shards=4), tokenizer, cursor)


def test_a_shard_without_documents_is_named(tmp_path, tokenizer):
    write_jsonl(tmp_path / "a.jsonl", make_texts(3))
    with pytest.raises(ValueError, match="no document to train on in shard 4 of 4"):
        next(batches_of(config_of(tmp_path, "a.jsonl", shards=4), tokenizer))


def test_files_of_different_sizes_are_shared_by_row(tmp_path, tokenizer):
    """Every shard gives as many rows, so if shards were files, documents of small files would come more often."""
    write_jsonl(tmp_path / "a.jsonl", make_texts(90))
    write_jsonl(tmp_path / "b.jsonl", make_texts(10, seed=5))
    config = config_of(tmp_path, "*.jsonl", epochs=0, shards=2)
    batches, drawn = batches_of(config, tokenizer), Counter()
    while sum(drawn.values()) < 600:
        next(batches)
        drawn.update((Path(d["file"]).stem, d["row"]) for d in batches.documents())
    large, small = (np.mean([n for (file, _), n in drawn.items() if file == name]) for name in "ab")
    assert len(drawn) == 100
    assert 0.6 < large / small < 1.6


def test_files_of_one_size_are_shared_whole(tmp_path, tokenizer):
    for i in range(4):
        write_jsonl(tmp_path / f"{i}.jsonl", make_texts(20))
    config = config_of(tmp_path, "*.jsonl", epochs=1, shards=2)
    batches, files = batches_of(config, tokenizer, shards=[1]), set()
    for _ in range(20):
        next(batches)
        files |= {document["file"][-7:] for document in batches.documents()}
    assert files == {"1.jsonl", "3.jsonl"}
