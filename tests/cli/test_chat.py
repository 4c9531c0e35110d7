"""A conversation in the terminal, over the tiny model with a chat template."""

import io
import json
import shutil
from dataclasses import replace

import pytest

from smollm_jax.cli import chat as module
from smollm_jax.cli.main import command
from smollm_jax.runtime.errors import UserError
from tests.support.server import export_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return export_model(tmp_path_factory.mktemp("chat"))


def talk(monkeypatch, capsys, folder, *lines, flags=()):
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    assert command("chat", [str(folder), "--max-new-tokens", "6", "--seed", "1", *flags], "smollm") == 0
    return capsys.readouterr()


def test_lines_are_answered_and_remembered(monkeypatch, capsys, folder):
    asked = []

    def spy(tokenizer, turns, **_):
        asked.append([turn["role"] for turn in turns])
        return tokenizer.encode("Once").tolist()

    monkeypatch.setattr("smollm_jax.tokenizer.chat_template.encode_chat", spy)
    lines = ["Hi", "again", "/undo", "third", "/new", "fourth", "/what", "/exit", "no"]
    shown = talk(monkeypatch, capsys, folder, *lines, flags=("--system", "Be short."))
    pair = ["user", "assistant"]
    assert asked == [["system", "user"], ["system", *pair, "user"], ["system", *pair, "user"], ["system", "user"]]
    assert shown.err.count(module.HELP) == 2
    assert len(shown.out.splitlines()) >= 4


def test_an_answer_is_made_anew_with_another_seed(monkeypatch, capsys, folder):
    asked = []

    def spy(_completer, sampling, turns, _render):
        asked.append((sampling.seed, [turn["content"] for turn in turns]))
        return f"answer {len(asked)}"

    monkeypatch.setattr(module, "_answer", spy)
    again = "/regenerate"
    lines = [again, "Hi", again, again, "More", again, "/undo", again, "/reset", again]
    shown = talk(monkeypatch, capsys, folder, *lines)
    assert shown.err.count(module.HELP) == 3  # at the start, and where there is nothing to make anew
    assert asked == [
        (1, ["Hi"]), (2, ["Hi"]), (3, ["Hi"]), (3, ["Hi", "answer 3", "More"]), (4, ["Hi", "answer 3", "More"]),
        (5, ["Hi"]),
    ]  # fmt: skip


def test_the_same_seed_says_the_same(monkeypatch, capsys, folder):
    assert talk(monkeypatch, capsys, folder, "Hi").out == talk(monkeypatch, capsys, folder, "Hi").out


def test_a_conversation_that_no_longer_fits_is_one_line_and_goes_on(monkeypatch, capsys, folder):
    shown = talk(monkeypatch, capsys, folder, "word " * 5_000, "Hi")
    assert "/reset begins again" in shown.err
    assert shown.out.strip()


def test_a_base_model_is_sent_to_generate(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "base")
    settings = json.loads((tmp_path / "base/tokenizer_config.json").read_text())
    del settings["chat_template"]
    (tmp_path / "base/tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="has no chat template, so it completes text; use generate"):
        command("chat", [str(tmp_path / "base")], "smollm")


def test_only_flags_that_were_given_are_said_to_choose_nothing(capsys):
    usual = module.LIVELY
    assert replace(usual, temperature=0.0).sampling(usual).temperature == 0
    assert replace(usual, top_k=3).sampling(usual).top_k == 3
    assert not capsys.readouterr().err
    replace(usual, temperature=0.0, top_k=3).sampling(usual)
    assert "choose nothing at --temperature 0" in capsys.readouterr().err
