"""`smollm generate`: a prompt, a message, and the prompts of a file."""

import json

import pytest

from smollm_jax.cli.main import command
from smollm_jax.runtime.errors import UserError
from smollm_jax.serving.completion import Completer
from tests.support.server import export_model

ROWS = [
    {"prompt": "Once upon", "id": 7},
    {"prompt": "Once upon"},
    {"messages": [{"role": "user", "content": "Hi"}]},
    {"prompt": "A"},
    {"prompt": "The end of\u2028a line", "id": None},
]
DRAWN = ("--max-new-tokens", "6", "--temperature", "1.5", "--seed", "3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return export_model(tmp_path_factory.mktemp("generate"))


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    return path


def generate(folder, *flags):
    return command("generate", [str(folder), *map(str, flags)], "smollm")


def results(path):
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def files(source, target, *flags):
    return ("--input", source, "--output", target, *DRAWN, *flags)


@pytest.mark.slow
def test_a_file_keeps_its_rows_and_order_and_each_row_is_as_alone(folder, source, capsys):
    target = source.with_name("out.jsonl")
    assert generate(folder, *files(source, target)) == 0
    made = results(target)
    assert [{key: row[key] for key in row if key in given} for row, given in zip(made, ROWS, strict=True)] == ROWS
    assert [row["sampling"]["seed"] for row in made] == [3, 4, 5, 6, 7]
    assert made[0]["completion"] != made[1]["completion"]  # another seed
    assert {row["finish_reason"] for row in made} <= {"length", "eos"}
    about = {"path": str(folder), "step": None, "by": "JAX, float32, on cpu", "special_tokens": "text"}
    assert [row["model"] for row in made] == [about] * len(ROWS)
    capsys.readouterr()
    for row in made:
        seed = ("--max-new-tokens", "6", "--temperature", "1.5", "--seed", row["sampling"]["seed"])
        if "prompt" in row:
            generate(folder, "--prompt", row["prompt"], *seed)
            assert capsys.readouterr().out == f"{row['prompt']}{row['completion']}\n"
        else:
            generate(folder, "--prompt", "Hi", "--chat", *seed)
            assert capsys.readouterr().out == f"{row['completion']}\n"


def test_both_back_ends_complete_a_file(folder, source):
    for backend in ("jax", "torch"):
        target = source.with_name(f"{backend}.jsonl")
        generate(folder, "--input", source, "--output", target, "--max-new-tokens", "4", "--backend", backend)
    jax, torch = (results(source.with_name(f"{backend}.jsonl")) for backend in ("jax", "torch"))
    assert [row["completion"] for row in jax] == [row["completion"] for row in torch]
    assert [row["finish_reason"] for row in jax] == [row["finish_reason"] for row in torch]


@pytest.mark.parametrize(
    "kept", [0, 0.99, 1, *(pytest.param(kept, marks=pytest.mark.slow) for kept in (0.3, 0.5))]
)
def test_an_interrupted_file_continues_with_the_first_row_that_has_no_result(folder, source, kept, monkeypatch):
    target = source.with_name("out.jsonl")
    generate(folder, *files(source, target))
    whole = target.read_bytes()
    target.write_bytes(whole[: int(kept * len(whole))])
    encoded = []
    complete = Completer.complete
    monkeypatch.setattr(
        Completer, "complete", lambda self, ids, *more: encoded.extend(ids) or complete(self, ids, *more)
    )
    assert generate(folder, *files(source, target)) == 0
    assert target.read_bytes() == whole
    assert len(encoded) == len(ROWS) - whole[: int(kept * len(whole))].count(b"\n")


@pytest.mark.parametrize(
    ("content", "flags", "refused"),
    [
        (b"my notes\n", (), "row 1"),
        (b"my notes", (), "its last line"),
        (b"{}\n", (), "row 1"),
        (None, ("--temperature", "0.5"), "row 1 has another sampling"),
        pytest.param(None, ("--stop", "x"), "row 1 has another sampling", marks=pytest.mark.slow),
        pytest.param(None, ("--dtype", "bfloat16"), "row 1 has another model", marks=pytest.mark.slow),
        (None, ("--special-tokens", "parse"), "row 1 has another model"),
        (b"\n" * 9, (), "more rows than"),
    ],
)
def test_an_output_of_something_else_is_refused_and_stays(folder, source, content, flags, refused):
    target = source.with_name("out.jsonl")
    if content is None:
        generate(folder, *files(source, target))
    else:
        target.write_bytes(content)
    before, changed = target.read_bytes(), [str(flag) for flag in files(source, target)]
    if flags[:1] == ("--temperature",):
        changed[changed.index("--temperature") + 1] = flags[1]
    else:
        changed += flags
    with pytest.raises(UserError, match=refused):
        generate(folder, *changed)
    assert target.read_bytes() == before


@pytest.mark.parametrize(
    ("line", "refused"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2: expected"),
        ('{"prompt": 3}', "line 2: expected"),
        ('{"text": "a"}', "line 2: expected"),
        ('{"messages": []}', "line 2: expected"),
        ('{"messages": [{"role": "user"}]}', "line 2: expected"),
        ('{"prompt": "a", "messages": [{"role": "user", "content": "a"}]}', "line 2: expected"),
        ('{"prompt": ""}', "row 2 of .*: the prompt is empty"),
        (json.dumps({"prompt": "word " * 5_000}), "row 2 of .*: the prompt has"),
    ],
)
def test_a_row_that_cannot_be_completed_is_named_before_the_first_result(folder, source, line, refused):
    target = source.with_name("out.jsonl")
    source.write_text(f'{{"prompt": "a"}}\n{line}\n')
    with pytest.raises(UserError, match=refused):
        generate(folder, *files(source, target))
    assert not target.exists()


def test_the_output_is_not_the_input(folder, source):
    before = source.read_bytes()
    with pytest.raises(UserError, match="is the input"):
        generate(folder, *files(source, source))
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "refused"),
    [
        ((), "--prompt, or a file by --input"),
        (("--prompt", "a", "--input", "b", "--output", "c"), "--prompt, or a file by --input"),
        (("--input", "b"), "come together"),
        (("--prompt", "a", "--output", "c"), "come together"),
        (("--prompt", "a", "--system", "s"), "give --chat too"),
        (("--input", "/no/such", "--output", "c"), "cannot be read"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(folder, flags, refused):
    with pytest.raises(UserError, match=refused):
        generate(folder, *flags)


def test_a_message_goes_through_the_template_and_the_answer_alone_is_printed(folder, capsys, monkeypatch):
    asked = []

    def spy(tokenizer, turns, **_):
        asked.append(turns)
        return tokenizer.encode("Once").tolist()

    monkeypatch.setattr("smollm_jax.tokenizer.chat_template.encode_chat", spy)
    generate(folder, "--prompt", "Hi", "--chat", "--system", "Be short.", "--max-new-tokens", "3")
    system, user = {"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}
    assert asked == [[system, user]]
    assert "Hi" not in capsys.readouterr().out
