"""The Modelfile: Ollama's turns are those of the chat template, and an answer ends."""

import json
import re
from dataclasses import replace

import pytest

from smollm_jax.hf.ollama import find_pieces, go_template, joined, modelfile, stop_texts
from smollm_jax.tokenizer.chat_template import render_chat
from smollm_jax.tokenizer.tokenizer import Tokenizer
from tests.support.hf_folders import TINY

TURN = "{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
ASKS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = "{% for m in messages %}" + TURN + ASKS
SMOLLM2 = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{% endif %}" + TURN + ASKS
)
MISTRAL = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}</s>{% else %}[SYS]{{ m['content'] }}[/SYS]{% endif %}"
    "{% endfor %}"
)
OTHERS = {
    "the system message stands in the user's turn": (
        "{% for m in messages[1:] %}{% if loop.first %}{{ messages[0]['content'] }} {% endif %}" + TURN + ASKS
    ),
    "refuses": "{{ raise_exception('only one message') }}",
    "cuts": "{% for m in messages %}{{ m['content'][:2] }}{% endfor %}",
    "the last turn differs": "{% for m in messages %}{{ '!' if loop.last }}" + TURN + ASKS,
    "counts": "{% for m in messages %}{{ loop.index }}" + TURN + ASKS,
    "braces": "{% for m in messages %}{{ '{' }}{{ '{' }}{{ m['content'] }}{% endfor %}",
    "forgets": "{% for m in messages %}{{ '...' if loop.index == 5 }}" + TURN + ASKS,
}


def with_template(folder, out, template):
    out.mkdir()
    (out / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    settings = {"eos_token": "<|endoftext|>"} | ({"chat_template": template} if template else {})
    (out / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer(out)


@pytest.mark.parametrize(
    ("template", "default"),
    [(CHATML, ""), (SMOLLM2, "Be kind."), (MISTRAL, "")],
    ids=["ChatML", "SmolLM2", "Mistral"],
)
def test_the_pieces_of_a_template_are_found(tmp_path, tokenizer_folder, template, default):
    tokenizer = with_template(tokenizer_folder, tmp_path / "t", template)
    pieces = find_pieces(tokenizer)
    assert pieces.default == default
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    asked = [*turns, {"role": "user", "content": "Why?"}]
    assert joined(pieces, asked) == render_chat(template, asked, {})
    written = go_template(pieces)
    assert f"{pieces.user[0]}{{{{ .Content }}}}{pieces.user[1]}" in written
    assert len(re.findall(r"\{\{ (range|if)", written)) == len(re.findall(r"\{\{ end", written)) == 2


@pytest.mark.parametrize("name", OTHERS)
def test_a_template_with_other_habits_is_not_translated(tmp_path, tokenizer_folder, name, capsys):
    tokenizer = with_template(tokenizer_folder, tmp_path / "t", OTHERS[name])
    assert find_pieces(tokenizer) is None
    assert "TEMPLATE" not in modelfile("x.gguf", tokenizer, TINY)
    assert "the Modelfile has no TEMPLATE" in capsys.readouterr().err


def test_a_modelfile_of_a_chat_model(tmp_path, tokenizer_folder):
    tokenizer = with_template(tokenizer_folder, tmp_path / "t", SMOLLM2)
    assert modelfile("x.gguf", tokenizer, replace(TINY, eos_token_id=0)).splitlines() == [
        "FROM ./x.gguf",
        'TEMPLATE """{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system',
        "{{ .Content }}<|im_end|>",
        '{{ else if eq .Role "user" }}<|im_start|>user',
        "{{ .Content }}<|im_end|>",
        "<|im_start|>assistant",
        "{{ else }}{{ .Content }}<|im_end|>",
        '{{ end }}{{ end }}"""',
        'SYSTEM """Be kind."""',
        'PARAMETER stop "<|endoftext|>"',
        "PARAMETER num_ctx 96",
    ]


def test_a_base_model_has_a_stop_and_no_template(tmp_path, tokenizer_folder, capsys):
    tokenizer = with_template(tokenizer_folder, tmp_path / "t", "")
    written = modelfile("x.gguf", tokenizer, replace(TINY, eos_token_id=0))
    assert written == 'FROM ./x.gguf\nPARAMETER stop "<|endoftext|>"\nPARAMETER num_ctx 96\n'
    assert stop_texts(tokenizer, TINY) == ["<|endoftext|>"]
    assert capsys.readouterr().err == ""
