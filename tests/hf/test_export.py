"""Export: the bits come back, transformers agrees, and nothing is overwritten."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import smollm_jax
from smollm_jax import load_hf, save_hf
from smollm_jax.config.architecture import MODELS
from smollm_jax.config.presets import PRESETS, START
from smollm_jax.hf import export as convert
from smollm_jax.hf.card import About
from smollm_jax.hf.config_json import hf_config
from smollm_jax.hf.export import MARK, export_folder, write_folder
from smollm_jax.hf.mapping import TABLE
from smollm_jax.hf.reader import read_folder
from smollm_jax.tokenizer.load import train_tokenizer
from tests.support.hf_folders import (
    TINY,
    UNTIED,
    assert_same_bits,
    change_config,
    change_tensors,
    numpy_params,
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [TINY, UNTIED], ids=["tied", "untied"])
def test_export_then_import_gives_the_bits_back(tmp_path, config, dtype):
    params = numpy_params(config)
    export_folder(params, config, tmp_path / "out", dtype=dtype, verify=False)
    read_config, read = read_folder(tmp_path / "out")
    expected = params
    if dtype == "bfloat16":
        expected = jax.tree.map(lambda p: p.astype(ml_dtypes.bfloat16).astype(np.float32), params)
    assert read_config == config
    assert_same_bits(read, expected)
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) == (not config.tie_embeddings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("config", [TINY, UNTIED], ids=["tied", "untied"])
def test_import_then_export_gives_a_folder_of_transformers_back_bit_for_bit(tmp_path, config, sharded, dtype):
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**hf_config(config, "float32"))).to(dtype)
    llama.save_pretrained(tmp_path / "theirs", max_shard_size="20KB" if sharded else "5GB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1 or not sharded
    ours, params = read_folder(tmp_path / "theirs")
    assert ours == config
    export_folder(params, ours, tmp_path / "out", dtype=str(dtype).removeprefix("torch."), verify=False)
    back = load_file(tmp_path / "out" / "model.safetensors")
    expected = {}
    for file in (tmp_path / "theirs").glob("*.safetensors"):
        expected |= load_file(file)
    assert {n: v.tobytes() for n, v in back.items()} == {n: v.tobytes() for n, v in expected.items()}


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["135M", "360M", pytest.param("1.7B", marks=pytest.mark.release)])
def test_published_widths_convert_and_agree_with_pytorch(tmp_path, preset):
    """Two layers of each, at full width; the number of layers changes no layout."""
    config = replace(MODELS[preset], num_layers=2)
    checked = export_folder(numpy_params(config), config, tmp_path / "out")
    assert "agree" in checked
    assert_same_bits(read_folder(tmp_path / "out")[1], numpy_params(config))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [TINY, UNTIED], ids=["tied", "untied"])
def test_transformers_loads_an_export_with_nothing_missing_and_the_same_logits(
    tmp_path, tokenizer_folder, config, dtype
):
    out = tmp_path / "out"
    checked = export_folder(numpy_params(config), config, out, dtype=dtype, tokenizer_folder=tokenizer_folder)
    assert "English text" in checked
    llama, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    assert llama.dtype == getattr(torch, dtype)
    llama = llama.float()
    ids = AutoTokenizer.from_pretrained(out)(convert.TEXT, return_tensors="pt").input_ids[:, :60]
    with torch.no_grad():
        expected = llama(ids).logits.numpy()
    logits = load_hf(out)(jnp.asarray(ids.numpy()))
    np.testing.assert_allclose(logits, expected, atol=2e-4 * np.abs(expected).max())


def test_greedy_text_is_the_same_from_pytorch_and_from_jax(tmp_path, tokenizer_folder):
    from smollm_jax.generation.generator import Generator
    from smollm_jax.generation.sampling import Sampling

    out = tmp_path / "out"
    # untied: random weights with a tied head repeat one token
    export_folder(numpy_params(UNTIED, 5), UNTIED, out, tokenizer_folder=tokenizer_folder, verify=False)
    llama, prompt = AutoModelForCausalLM.from_pretrained(out), [5, 17, 200, 9]
    theirs = llama.generate(
        torch.tensor([prompt]), max_new_tokens=40, min_new_tokens=40, do_sample=False, eos_token_id=None
    )
    ours = Generator(load_hf(out)).generate([prompt], Sampling(max_new_tokens=40))
    assert len(set(ours[0])) > 3  # a text worth comparing
    assert ours[0] == theirs[0, len(prompt) :].tolist()


def test_transformers_samples_by_default_as_the_page_does_and_is_greedy_if_asked(tmp_path, tokenizer_folder):
    """A greedy small model repeats itself. Our own `generate` does not read these settings."""
    out = tmp_path / "out"
    export_folder(numpy_params(UNTIED, 5), UNTIED, out, tokenizer_folder=tokenizer_folder, verify=False)
    llama, prompt = AutoModelForCausalLM.from_pretrained(out), torch.tensor([[5, 17, 200, 9]])
    settings = llama.generation_config
    assert (settings.do_sample, settings.temperature, settings.top_p) == (True, *PRESETS[START][:2])
    assert settings.eos_token_id == UNTIED.eos_token_id
    texts = set()
    for seed in range(3):
        torch.manual_seed(seed)
        texts.add(tuple(llama.generate(prompt, max_new_tokens=20, min_new_tokens=20)[0].tolist()))
    assert len(texts) > 1
    greedy = [llama.generate(prompt, max_new_tokens=20, min_new_tokens=20, do_sample=False) for _ in range(2)]
    assert greedy[0].tolist() == greedy[1].tolist()
    assert smollm_jax.load(out).generate("The sea", max_new_tokens=9) == smollm_jax.load(out).generate(
        "The sea", max_new_tokens=9
    )


def test_an_export_holds_what_the_published_repository_has(tmp_path, tokenizer_folder):
    curve = tmp_path / "curve.png"
    curve.write_bytes(b"png")
    facts = {"Recipe": "replica", "Data": "A=0.7|B", "Steps": 5_000, "Tokens": None, "Held-out loss": 3.14159}
    params, out = numpy_params(TINY), tmp_path / "out"
    export_folder(params, TINY, out, tokenizer_folder=tokenizer_folder, about=About(rows=facts), curve=curve)
    held = {path.name for path in (tmp_path / "out").iterdir()}
    assert held == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
        "README.md", "loss.png",
    }  # fmt: skip
    card = (tmp_path / "out" / "README.md").read_text()
    for words in ("`replica`", "`A=0.7\\|B`", "5,000", "3.142", "loss.png", "Check at export: logits"):
        assert words in card
    assert "Tokens" not in card


def test_without_verification_the_card_says_so(folder):
    assert "Check at export: not checked (--no-verify)" in (folder / "README.md").read_text()


def test_large_weights_are_split_into_files_that_transformers_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "SHARD_BYTES", 20_000)
    checked = export_folder(numpy_params(TINY), TINY, tmp_path / "out")
    assert "agree" in checked
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    assert not (tmp_path / "out" / "model.safetensors").exists()
    export_folder(numpy_params(TINY), TINY, tmp_path / "out", verify=False)  # and may be written over


def test_a_whole_foreign_folder_as_tokenizer_brings_nothing_but_its_tokenizer(tmp_path, folder):
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    change_config(folder, hidden_size=999)
    export_folder(numpy_params(TINY), TINY, tmp_path / "out", tokenizer_folder=folder, verify=False)
    assert read_folder(tmp_path / "out")[0] == TINY
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


def test_a_tokenizer_learns_the_context_unless_it_knows_its_own_longest_text(tmp_path, tokenizer_folder):
    longest = []
    for own in ({}, {"model_max_length": 77}):
        shutil.copytree(tokenizer_folder, given := tmp_path / f"given{len(own)}")
        file = given / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | own))
        out = tmp_path / f"out{len(own)}"
        export_folder(numpy_params(TINY), TINY, out, tokenizer_folder=given, verify=False)
        longest.append(AutoTokenizer.from_pretrained(out).model_max_length)
    assert longest == [TINY.max_seq_len, 77]
    assert (out / "tokenizer_config.json").read_bytes() == file.read_bytes()


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, tokenizer_folder):
    small = replace(TINY, vocab_size=200)
    with pytest.raises(ValueError, match=r"tokenizer in .* has 300 entries, the model only 200"):
        export_folder(numpy_params(small), small, tmp_path / "out", tokenizer_folder=tokenizer_folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sharded", [False, True])
def test_a_foreign_folder_is_never_written_over(tmp_path, sharded):
    out = tmp_path / "theirs"
    LlamaForCausalLM(LlamaConfig(**hf_config(TINY, "float32"))).save_pretrained(
        out, max_shard_size="20KB" if sharded else "5GB"
    )
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match="is not empty and no export as this version writes it"):
        export_folder(numpy_params(TINY), TINY, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_an_export_to_which_something_was_added_is_not_written_over(folder):
    (folder / "notes.md").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.md, which no export wrote"):
        export_folder(numpy_params(TINY), TINY, folder)
    assert (folder / "notes.md").read_text() == "mine"


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        export_folder(numpy_params(TINY), TINY, tmp_path / "out")


def test_a_failing_check_leaves_no_folder_behind_and_an_older_export_in_place(tmp_path, monkeypatch, folder):
    older = {path.name: path.read_bytes() for path in folder.iterdir()}
    honest = write_folder

    def swapped(params, config, out, **rest):
        honest(params, config, out, **rest)
        change_tensors(out, lambda t: t.update({"model.norm.weight": t["model.norm.weight"][::-1].copy()}))

    monkeypatch.setattr(convert, "write_folder", swapped)
    for out in (tmp_path / "new", folder):
        with pytest.raises(RuntimeError, match="final_norm/scale reads back otherwise"):
            export_folder(numpy_params(TINY, 1), TINY, out)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == older


def test_whatever_transformers_raises_fails_the_check(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise KeyError("a field of a later release")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(RuntimeError, match=r"transformers cannot load it: .*a field of a later release"):
        export_folder(numpy_params(TINY), TINY, tmp_path / "out")


def test_an_architecture_that_transformers_refuses_is_not_written_even_without_verification(tmp_path):
    odd = replace(TINY, hidden_size=48, num_heads=9, num_kv_heads=3)
    with pytest.raises(ValueError, match="hidden_size=48 must be a multiple of num_heads=9"):
        export_folder(numpy_params(odd), odd, tmp_path / "out", verify=False)
    assert not (tmp_path / "out").exists()


def test_a_layout_that_only_pytorch_can_expose_fails_the_check(tmp_path, monkeypatch):
    """Both directions of the table wrong in the same way: the bits come back, the logits differ."""
    swapped = {"blocks/mlp/gate": TABLE["blocks/mlp/up"], "blocks/mlp/up": TABLE["blocks/mlp/gate"]}
    monkeypatch.setattr("smollm_jax.hf.mapping.TABLE", TABLE | swapped)
    with pytest.raises(RuntimeError, match="logits from PyTorch and JAX differ"):
        export_folder(numpy_params(TINY), TINY, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_fail_the_check(tmp_path):
    params = numpy_params(TINY)
    params["blocks"]["mlp"]["up"][1, 2, 3] = np.nan
    with pytest.raises(RuntimeError, match="differ by nan"):
        export_folder(params, TINY, tmp_path / "out")


def test_without_torch_the_file_is_read_back_and_the_card_says_no_more(tmp_path):
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from dataclasses import replace\nimport numpy as np\n"
        "from smollm_jax.config.architecture import MODELS\nfrom smollm_jax.hf.export import export_folder\n"
        "from smollm_jax.hf.mapping import from_hf, tensors\n"
        "config = replace(MODELS['quickstart'], num_layers=1, vocab_size=64)\n"
        "shapes = {t.name: t.shape for t in tensors(config)}\n"
        "params = from_hf(lambda name: np.ones(shapes[name], np.float32), config)\n"
        f"print(export_folder(params, config, {str(tmp_path / 'out')!r}))\n"
        "assert 'jax' not in sys.modules\n"  # numpy and safetensors are enough
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "read back through our own import, bit for bit; torch is not installed" in done.stdout
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Check at export: read back through our own import, bit for bit." in card
    assert "not installed" not in card, "of no interest to those who read it on the Hub"


def test_save_hf_takes_a_tokenizer_of_ours_and_of_transformers(tmp_path, folder):
    model = load_hf(folder)
    for name, tokenizer in (
        ("theirs", AutoTokenizer.from_pretrained(folder)),
        ("ours", train_tokenizer([convert.TEXT], 300)),
        ("folder", folder),
    ):
        save_hf(model, tmp_path / name, tokenizer=tokenizer)
        assert "English text" in (tmp_path / name / "README.md").read_text()
        assert AutoTokenizer.from_pretrained(tmp_path / name).eos_token == "<|endoftext|>"
    save_hf(model, tmp_path / "none")
    assert "random ids (no tokenizer)" in (tmp_path / "none" / "README.md").read_text()


def test_the_same_weights_give_the_same_file_in_every_process(tmp_path):
    program = (
        "import sys, numpy as np\n"
        "from dataclasses import replace\n"
        "from smollm_jax.config.architecture import MODELS\nfrom smollm_jax.hf import export_folder\n"
        "from smollm_jax.hf.mapping import from_hf, tensors\n"
        "config = replace(MODELS['quickstart'], num_layers=1, vocab_size=64)\n"
        "shapes = {t.name: t.shape for t in tensors(config)}\n"
        "params = from_hf(lambda name: np.ones(shapes[name], np.float32), config)\n"
        "export_folder(params, config, sys.argv[1], verify=False)\n"
    )
    files = []
    for i in range(3):
        subprocess.run([sys.executable, "-c", program, str(tmp_path / str(i))], check=True)
        files.append((tmp_path / str(i) / "model.safetensors").read_bytes())
    assert files[0] == files[1] == files[2]
    with safe_open(tmp_path / "0" / "model.safetensors", "numpy") as opened:
        assert opened.metadata() == {"format": "pt", "note": MARK}


def edited(name):
    return lambda folder: (folder / name).write_text((folder / name).read_text() + "mine\n")


def a_folder_named_as_a_tokenizer(folder):
    (folder / "tokenizer_old").mkdir()


def a_link_to_the_same_content(folder):
    (folder / "config.json").rename(folder.parent / "config.json")
    (folder / "config.json").symlink_to("../config.json")


CHANGES = [
    edited(name) for name in ("README.md", "config.json", "generation_config.json", "tokenizer_config.json")
] + [
    a_folder_named_as_a_tokenizer,
    a_link_to_the_same_content,
    lambda folder: (folder / "tokenizer_notes.md").write_text("mine"),
    lambda folder: (folder / "adapter.safetensors").write_bytes((folder / "model.safetensors").read_bytes()),
    lambda folder: (folder / "README.md").unlink(),
    lambda folder: (folder / "README.md").write_text("my model card"),
    lambda folder: change_tensors(folder, lambda t: t.update({"model.norm.weight": t["model.norm.weight"] * 2})),
]


@pytest.mark.parametrize("change", CHANGES)
def test_an_export_that_a_person_changed_is_refused_or_moved_aside_whole(folder, change, capsys):
    change(folder)
    before = {path.name: path.is_file() and path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="give another --out"):
        export_folder(numpy_params(TINY), TINY, folder, verify=False)
    assert {path.name: path.is_file() and path.read_bytes() for path in folder.iterdir()} == before
    export_folder(numpy_params(TINY), TINY, folder, verify=False, aside=True)
    aside = folder.with_name("folder.old1")
    assert {path.name: path.is_file() and path.read_bytes() for path in aside.iterdir()} == before
    assert f"moved to {aside}" in capsys.readouterr().err
    export_folder(numpy_params(TINY), TINY, folder, verify=False)


def test_what_is_added_while_an_export_is_written_is_not_lost(folder, monkeypatch):
    monkeypatch.setattr(convert, "check", lambda *_: f"{(folder / 'late.txt').write_text('mine')}")
    with pytest.raises(ValueError, match=r"late\.txt"):
        export_folder(numpy_params(TINY), TINY, folder)
    assert (folder / "late.txt").read_text() == "mine"


def test_a_link_given_for_the_export_stays_and_leads_to_it(tmp_path, folder):
    (tmp_path / "link").symlink_to("folder")
    export_folder(numpy_params(TINY, 1), TINY, tmp_path / "link", verify=False)
    assert (tmp_path / "link").is_symlink()
    assert_same_bits(read_folder(folder)[1], numpy_params(TINY, 1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link"]


def test_a_tokenizer_file_that_is_a_link_out_is_not_copied(tmp_path, folder):
    (tmp_path / "secret").write_text("mine")
    (folder / "merges.txt").symlink_to("../secret")
    with pytest.raises(ValueError, match=r"merges\.txt is a link out of its folder"):
        export_folder(numpy_params(TINY), TINY, tmp_path / "out", tokenizer_folder=folder, verify=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "secret"]


@pytest.mark.parametrize("name", ["e[1]", "a\\b", "a*", "gs:", "{x}", "line\nend"])
def test_an_export_has_any_name(tmp_path, name):
    for _ in range(2):
        assert "agree" in export_folder(numpy_params(TINY), TINY, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_curve_that_cannot_be_drawn_ends_no_export(tmp_path):
    export_folder(numpy_params(TINY), TINY, tmp_path / "out", verify=False, curve=lambda _: False)
    assert "loss.png" not in (tmp_path / "out" / "README.md").read_text().partition("<!--")[0]


def test_weights_of_another_config_are_refused_also_without_a_check(tmp_path):
    other = replace(TINY, vocab_size=TINY.vocab_size - 8)
    with pytest.raises(ValueError, match=r"embedding is \(300, 24\) in the weights, \(292, 24\) in the config"):
        export_folder(numpy_params(TINY), other, tmp_path / "out", verify=False)
    assert list(tmp_path.iterdir()) == []


def test_all_files_of_an_export_have_one_mode(folder):
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_a_full_disk_is_an_error_of_the_machine_that_names_the_file(tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        export_folder(numpy_params(TINY), TINY, tmp_path / "out")
    assert (caught.value.errno, caught.value.filename[-17:]) == (28, "model.safetensors")
    assert list(tmp_path.iterdir()) == []
