"""A folder of transformers gives the text that transformers gives, in both back ends."""

import json

import pytest

from smollm_jax.cli.main import command
from smollm_jax.generation.sampling import Sampling
from smollm_jax.serving.completion import open_completer
from tests.support.families import tokenizer_folder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
PROMPT, NEW = "the cat", 12
BACKENDS = pytest.mark.parametrize("backend", ["jax", "torch"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64, max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return tokenizer_folder("byte fallback", path)


def of_transformers(folder, **settings):
    """The ids after the prompt, and their text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    asked = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**asked, max_new_tokens=NEW, pad_token_id=0, **settings)[0].tolist()
    begun = tokenizer.decode(asked.input_ids[0], skip_special_tokens=True)
    return ids[asked.input_ids.shape[1] :], tokenizer.decode(ids, skip_special_tokens=True)[len(begun) :]


def completed(folder, backend, **settings):
    completer = open_completer(folder, backend=backend, dtype="float32")
    pieces = list(completer.stream(PROMPT, Sampling(max_new_tokens=NEW, **settings)))
    return "".join(piece.text for piece in pieces), pieces[-1]


@BACKENDS
def test_a_prompt_begins_as_the_tokenizers_post_processor_says(folder, backend):
    ids, expected = of_transformers(folder, do_sample=False)
    text, last = completed(folder, backend)
    assert (text, last.tokens) == (expected, len([i for i in ids if i != 2]))
    assert last.prompt_tokens == len(transformers.AutoTokenizer.from_pretrained(folder)(PROMPT).input_ids)


@BACKENDS
@pytest.mark.parametrize("files", [("config.json", "generation_config.json"), ("generation_config.json",)])
def test_every_end_of_either_file_ends_a_text(folder, tmp_path, backend, files):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    second = of_transformers(folder, do_sample=False)[0][3]
    for name in files:
        content = json.loads((copy / name).read_text()) | {"eos_token_id": [2, second]}
        (copy / name).write_text(json.dumps(content))
    expected = of_transformers(copy, do_sample=False)[0]
    assert expected[-1] == second
    _, last = completed(copy, backend)
    assert (last.reason, last.tokens) == ("eos", len(expected) - 1)


@BACKENDS
def test_drawn_bytes_stream_as_they_decode(folder, backend):
    completer = open_completer(folder, backend=backend, dtype="float32")
    prompt = completer.encode("5€ in 中文")
    for seed in range(3):
        sampling = Sampling(max_new_tokens=60, temperature=2.0, seed=seed, stop_ids=(2,))
        ids = [i for new in completer.engine.stream(prompt, sampling) for i in new]
        text = "".join(piece.text for piece in completer.stream(prompt, sampling))
        whole = completer.tokenizer.decode([*prompt, *ids])
        begun = completer.tokenizer.decode(prompt)
        assert not whole.startswith(begun) or text == whole[len(begun) :]
        assert len(ids) > 5


def test_generate_says_what_becomes_of_special_tokens_in_its_prompt(folder, capsys):
    for flags, said in (([], "stay text"), (["--special-tokens", "parse"], "become ids")):
        typed = [str(folder), "--prompt", "<|im_start|>the", "--max-new-tokens", "1"]
        assert command("generate", [*typed, *flags], "smollm") == 0
        assert f"special tokens in a text {said}" in (told := capsys.readouterr().err)
        assert "1 of 1 texts" in told
