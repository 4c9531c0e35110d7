"""Conversion both ways: transformers is the oracle, and everything it would not load is refused in words."""

import json
import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from smollm_jax import load_hf, save_hf
from smollm_jax.config.architecture import MODELS, ModelConfig
from smollm_jax.hf import export as convert
from smollm_jax.hf import reader as hf_folder
from smollm_jax.hf.config_json import hf_config, model_config
from smollm_jax.hf.export import MARK, export, write_folder
from smollm_jax.hf.mapping import TABLE, from_hf, shapes_of, tensors, to_hf
from smollm_jax.hf.push import push
from smollm_jax.hf.reader import read_folder
from smollm_jax.model.transformer import init_params
from smollm_jax.tokenizer.tokenizer import train_tokenizer

TINY = ModelConfig(
    vocab_size=300,
    hidden_size=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=40,
    rope_theta=12_345.0,
    max_seq_len=96,
    initializer_range=0.3,
    bos_token_id=1,
    eos_token_id=2,
)
UNTIED = replace(TINY, tie_embeddings=False)


def numpy_params(config, seed=0):
    """Parameters every element of which differs, norms too: a swapped pair shows."""
    rng = np.random.default_rng(seed)
    like = jax.eval_shape(lambda: init_params(config, 0))
    return jax.tree.map(lambda p: rng.normal(0, 0.3, p.shape).astype(np.float32), like)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([convert.TEXT], TINY.vocab_size).save(folder)
    return folder


@pytest.fixture
def folder(tmp_path, tokenizer_folder):
    """An export of ours to damage."""
    out = tmp_path / "folder"
    export(numpy_params(TINY), TINY, out, tokenizer_folder=tokenizer_folder, verify=False)
    return out


def bits(tree):
    return [np.asarray(leaf).view(np.uint32) for leaf in jax.tree.leaves(tree)]


def assert_same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(bits(one), bits(other), strict=True):
        np.testing.assert_array_equal(a, b)


def change_config(folder, **changes):
    file = folder / "config.json"
    content = {k: v for k, v in (json.loads(file.read_text()) | changes).items() if v is not Ellipsis}
    file.write_text(json.dumps(content))


def change_tensors(folder, change):
    values = load_file(folder / "model.safetensors")
    change(values)
    save_file(values, folder / "model.safetensors")


def as_shards(folder, parts=3):
    """The same folder with its weights in several files."""
    values = load_file(folder / "model.safetensors")
    names, index = sorted(values), {}
    for i in range(parts):
        file = f"model-{i + 1:05}-of-{parts:05}.safetensors"
        save_file({name: values[name] for name in names[i::parts]}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names[i::parts], file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


# --- the table and the bits ---


@pytest.mark.parametrize("config", [TINY, UNTIED], ids=["tied", "untied"])
def test_the_table_goes_round_bit_for_bit_and_covers_every_parameter(config):
    params = numpy_params(config)
    params["embedding"][0, :3] = np.nan, -0.0, np.float32(1e-45)
    held = {tensor.name: to_hf(params, tensor) for tensor in tensors(config)}
    assert_same_bits(from_hf(held.__getitem__, config), params)
    assert set(shapes_of(config)) == {e.ours for e in TABLE if config is UNTIED or e.ours != ("head",)}


@pytest.mark.parametrize("preset", ["135M", "360M", "1.7B"])
def test_each_published_architecture_has_the_tensors_that_transformers_expects(preset):
    config = MODELS[preset]
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(**hf_config(config, "float32")))
    theirs = {name: tuple(value.shape) for name, value in llama.state_dict().items()}
    del theirs["lm_head.weight"]  # tied
    assert {tensor.name: tensor.shape for tensor in tensors(config)} == theirs
    assert sum(int(np.prod(tensor.shape)) for tensor in tensors(config)) == config.num_parameters


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [TINY, UNTIED], ids=["tied", "untied"])
def test_export_then_import_gives_the_bits_back(tmp_path, config, dtype):
    params = numpy_params(config)
    export(params, config, tmp_path / "out", dtype=dtype, verify=False)
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
    export(params, ours, tmp_path / "out", dtype=str(dtype).removeprefix("torch."), verify=False)
    back = load_file(tmp_path / "out" / "model.safetensors")
    expected = {}
    for file in (tmp_path / "theirs").glob("*.safetensors"):
        expected |= load_file(file)
    assert {n: v.tobytes() for n, v in back.items()} == {n: v.tobytes() for n, v in expected.items()}


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["135M", "360M", "1.7B"])
def test_published_widths_convert_and_agree_with_pytorch(tmp_path, preset):
    """Two layers of each, at full width; the number of layers changes no layout."""
    config = replace(MODELS[preset], num_layers=2)
    checked = export(numpy_params(config), config, tmp_path / "out")
    assert "agree" in checked
    assert_same_bits(read_folder(tmp_path / "out")[1], numpy_params(config))


# --- what other readers make of it ---


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [TINY, UNTIED], ids=["tied", "untied"])
def test_transformers_loads_an_export_with_nothing_missing_and_the_same_logits(
    tmp_path, tokenizer_folder, config, dtype
):
    out = tmp_path / "out"
    checked = export(numpy_params(config), config, out, dtype=dtype, tokenizer_folder=tokenizer_folder)
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


def test_config_json_tells_theta_to_readers_before_and_after_transformers_5(folder):
    written = json.loads((folder / "config.json").read_text())
    assert written["rope_theta"] == 12_345.0  # transformers 4
    assert written["rope_parameters"] == {"rope_theta": 12_345.0, "rope_type": "default"}
    read = AutoConfig.from_pretrained(folder)
    assert read.rope_parameters["rope_theta"] == 12_345.0
    assert (read.num_key_value_heads, read.head_dim, read.dtype) == (2, 8, torch.float32)
    assert (read.bos_token_id, read.eos_token_id, read.max_position_embeddings) == (1, 2, 96)


def test_either_spelling_of_theta_is_read_and_a_contradiction_is_refused():
    written = hf_config(TINY, "float32")
    old = {k: v for k, v in written.items() if k != "rope_parameters"}
    new = {k: v for k, v in written.items() if k not in ("rope_theta", "rope_scaling")}
    assert model_config(old) == model_config(new) == model_config(written) == TINY
    with pytest.raises(ValueError, match=r"contradicts itself: rope_parameters.rope_theta=12345, rope_theta=9"):
        model_config(written | {"rope_theta": 9.0})


def test_the_published_config_is_the_preset():
    base = os.environ.get("SMOLLM_TEST_DATA")
    if base is None:
        pytest.skip("SMOLLM_TEST_DATA names no folder with tokenizer/base/config.json")
    published = json.loads((Path(base) / "tokenizer" / "base" / "config.json").read_text())
    assert model_config(published) == MODELS["135M"]
    ours = hf_config(MODELS["135M"], "bfloat16")
    assert {k: v for k, v in published.items() if k != "transformers_version" and ours[k] != v} == {}


def test_greedy_text_is_the_same_from_pytorch_and_from_jax(tmp_path, tokenizer_folder):
    from smollm_jax.generation.generator import Generator
    from smollm_jax.generation.sampling import Sampling

    out = tmp_path / "out"
    # untied: random weights with a tied head repeat one token
    export(numpy_params(UNTIED, 5), UNTIED, out, tokenizer_folder=tokenizer_folder, verify=False)
    llama, prompt = AutoModelForCausalLM.from_pretrained(out), [5, 17, 200, 9]
    theirs = llama.generate(
        torch.tensor([prompt]), max_new_tokens=40, min_new_tokens=40, do_sample=False, eos_token_id=None
    )
    ours = Generator(load_hf(out)).generate([prompt], Sampling(max_new_tokens=40))
    assert len(set(ours[0])) > 3  # a text worth comparing
    assert ours[0] == theirs[0, len(prompt) :].tolist()


# --- the folder ---


def test_an_export_holds_what_the_published_repository_has(tmp_path, tokenizer_folder):
    curve = tmp_path / "curve.png"
    curve.write_bytes(b"png")
    facts = {"recipe": "replica", "data": "A=0.7|B", "steps": 5_000, "held_out_loss": 3.14159, "curve": curve}
    export(numpy_params(TINY), TINY, tmp_path / "out", tokenizer_folder=tokenizer_folder, card_facts=facts)
    held = {path.name for path in (tmp_path / "out").iterdir()}
    assert held == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
        "README.md", "loss.png",
    }  # fmt: skip
    card = (tmp_path / "out" / "README.md").read_text()
    for words in ("`replica`", "`A=0.7\\|B`", "5,000", "3.1416", "loss.png", "Check at export: logits"):
        assert words in card
    assert facts["curve"] == curve  # the caller's own are left alone


def test_without_verification_the_card_says_so(folder):
    assert "Check at export: not checked (--no-verify)" in (folder / "README.md").read_text()


def test_large_weights_are_split_into_files_that_transformers_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "SHARD_BYTES", 20_000)
    checked = export(numpy_params(TINY), TINY, tmp_path / "out")
    assert "agree" in checked
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    assert not (tmp_path / "out" / "model.safetensors").exists()
    export(numpy_params(TINY), TINY, tmp_path / "out", verify=False)  # and may be written over


def test_a_whole_foreign_folder_as_tokenizer_brings_nothing_but_its_tokenizer(tmp_path, folder):
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    change_config(folder, hidden_size=999)
    export(numpy_params(TINY), TINY, tmp_path / "out", tokenizer_folder=folder, verify=False)
    assert read_folder(tmp_path / "out")[0] == TINY
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, tokenizer_folder):
    small = replace(TINY, vocab_size=200)
    with pytest.raises(ValueError, match=r"tokenizer in .* has 300 entries, the model only 200"):
        export(numpy_params(small), small, tmp_path / "out", tokenizer_folder=tokenizer_folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sharded", [False, True])
def test_a_foreign_folder_is_never_written_over(tmp_path, sharded):
    out = tmp_path / "theirs"
    LlamaForCausalLM(LlamaConfig(**hf_config(TINY, "float32"))).save_pretrained(
        out, max_shard_size="20KB" if sharded else "5GB"
    )
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match="is not empty and no export of ours"):
        export(numpy_params(TINY), TINY, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_an_export_to_which_something_was_added_is_not_written_over(folder):
    (folder / "notes.md").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.md, which no export wrote"):
        export(numpy_params(TINY), TINY, folder)
    assert (folder / "notes.md").read_text() == "mine"


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        export(numpy_params(TINY), TINY, tmp_path / "out")


def test_a_failing_check_leaves_no_folder_behind_and_an_older_export_in_place(tmp_path, monkeypatch, folder):
    older = {path.name: path.read_bytes() for path in folder.iterdir()}
    honest = write_folder

    def swapped(params, config, out, **rest):
        honest(params, config, out, **rest)
        change_tensors(out, lambda t: t.update({"model.norm.weight": t["model.norm.weight"][::-1].copy()}))

    monkeypatch.setattr(convert, "write_folder", swapped)
    for out in (tmp_path / "new", folder):
        with pytest.raises(RuntimeError, match="final_norm/scale reads back otherwise"):
            export(numpy_params(TINY, 1), TINY, out)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == older


def test_a_layout_that_only_pytorch_can_expose_fails_the_check(tmp_path, monkeypatch):
    """Both directions of the table wrong in the same way: the bits come back, the logits differ."""
    table = [replace(e, theirs=e.theirs.replace("gate_proj", "x").replace("up_proj", "gate_proj")) for e in TABLE]
    table = tuple(replace(e, theirs=e.theirs.replace("mlp.x", "mlp.up_proj")) for e in table)
    monkeypatch.setattr("smollm_jax.hf.mapping.TABLE", table)
    with pytest.raises(RuntimeError, match="logits from PyTorch and JAX differ"):
        export(numpy_params(TINY), TINY, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_fail_the_check(tmp_path):
    params = numpy_params(TINY)
    params["blocks"]["mlp"]["up"][1, 2, 3] = np.nan
    with pytest.raises(RuntimeError, match="differ by nan"):
        export(params, TINY, tmp_path / "out")


def test_without_torch_the_file_is_read_back_and_the_card_says_that(tmp_path):
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from dataclasses import replace\nimport numpy as np\n"
        "from smollm_jax.config import MODELS\nfrom smollm_jax.convert import export\n"
        "from smollm_jax.layout import from_hf, tensors\n"
        "config = replace(MODELS['quickstart'], num_layers=1, vocab_size=64)\n"
        "shapes = {t.name: t.shape for t in tensors(config)}\n"
        "params = from_hf(lambda name: np.ones(shapes[name], np.float32), config)\n"
        f"print(export(params, config, {str(tmp_path / 'out')!r}))\n"
        "assert 'jax' not in sys.modules\n"  # numpy and safetensors are enough
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "read back through our own import, bit for bit; torch is not installed" in done.stdout
    assert "torch is not installed" in (tmp_path / "out" / "README.md").read_text()


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


# --- what is refused ---

HOSTILE = ("9", -1, 0, 1.5, float("nan"), float("inf"), True, [], {}, 10**400)
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
         "max_position_embeddings", "num_key_value_heads", "head_dim")  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", HOSTILE, ids=str)
def test_a_size_that_is_none_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a whole number"):
        model_config(hf_config(TINY, "float32") | {name: value})


@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_theta", "initializer_range"])
@pytest.mark.parametrize("value", ["9", -1.0, 0, float("nan"), float("inf"), True, [], 10**400], ids=str)
def test_a_number_that_is_none_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a number above 0"):
        model_config(hf_config(TINY, "float32") | {name: value})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'; only llama"),
        ({"model_type": ...}, "model_type is None; only llama"),
        ({"attention_bias": True}, "attention_bias is True; only False"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_interleaved": True}, "rope_interleaved is True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling asks for 'llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling asks for 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters asks for 'yarn'"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters has full_attention"),
        ({"rope_parameters": "default"}, "rope_parameters must be an object"),
        ({"rope_parameters": ..., "rope_theta": ...}, "neither rope_theta nor"),
        ({"rope_scaling": [1]}, "rope_scaling must be an object"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"eos_token_id": 300}, "eos_token_id must be an id below vocab_size=300"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be an id"),
        ({"bos_token_id": -1}, "bos_token_id must be an id"),
        ({"num_key_value_heads": 3}, "num_heads=4 must be a multiple of num_kv_heads=3"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"num_attention_heads": 100, "head_dim": ...}, "head_dim=0"),
        ({"vocab_size": ...}, "vocab_size must be a whole number"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_architecture_that_is_not_ours_is_refused_by_its_field(folder, changes, named):
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=named):
        read_folder(folder)


@pytest.mark.parametrize("content", [b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b""])
def test_a_config_json_that_is_none_is_refused(folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        read_folder(folder)


def test_several_ends_of_text_give_the_first():
    assert model_config(hf_config(TINY, "float32") | {"eos_token_id": [7, 9]}).eos_token_id == 7
    assert model_config(hf_config(TINY, "float32") | {"eos_token_id": None}).eos_token_id == 0


GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop(GATE), rf"lacks tensor {GATE} \(1 missing\)"),
        (lambda t: t.update({GATE: t[GATE].T.copy()}), rf"{GATE}: expected shape \(40, 24\).*got \(24, 40\)"),
        (lambda t: t.update({GATE: t[GATE].astype(np.int32)}), f"{GATE} holds int32"),
        (lambda t: t.update({GATE: t[GATE].astype(np.float64)}), f"{GATE} holds float64"),
        (lambda t: t.update({GATE: t[GATE].astype(ml_dtypes.float8_e4m3fn)}), f"{GATE}"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32)}),
            r"q_proj\.bias, which a Llama of this config\.json does not have",
        ),
        (
            lambda t: t.update({"model.layers.3.mlp.gate_proj.weight": t[GATE]}),
            r"layers\.3\.mlp\.gate_proj\.weight, which",
        ),
        (
            lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}),
            r"lm_head\.weight differs from the embedding",
        ),
    ],
    ids=["missing", "wrong-shape", "integers", "float64", "float8", "bias", "one-layer-more", "untied-head"],
)
def test_weights_that_do_not_fit_are_refused_by_name(folder, change, named):
    change_tensors(folder, change)
    with pytest.raises(ValueError, match=named):
        read_folder(folder)


def test_a_tied_head_that_is_written_twice_and_ropes_frequencies_are_taken(folder):
    change_tensors(
        folder,
        lambda t: t.update({
            "lm_head.weight": t["model.embed_tokens.weight"].copy(),
            "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
        }),
    )  # fmt: skip
    assert_same_bits(read_folder(folder)[1], numpy_params(TINY))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.9, 0.9999])
def test_a_file_cut_short_is_refused_by_name(folder, share):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read, it may be cut short"):
        read_folder(folder)


@pytest.mark.parametrize(
    "header", [b"{", b"[]", b'{"a": 1}', b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}']
)
def test_a_damaged_safetensors_header_is_refused(folder, header):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        read_folder(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "model.pkl", "last.ckpt"])
def test_a_pickle_is_never_loaded(folder, name):
    (folder / "model.safetensors").unlink()
    trap = f"cbuiltins\nexec\n(Vopen({str(folder / 'ran')!r}, 'w')\ntR."
    (folder / name).write_bytes(trap.encode())
    with pytest.raises(ValueError, match=f"but {name}, a pickle, which can run code; only safetensors"):
        read_folder(folder)
    assert not (folder / "ran").exists()


def test_code_that_comes_with_a_folder_is_not_run(folder):
    change_config(folder, auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"})
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    read_folder(folder)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 3}}',
     '{"weight_map": {"a": "../secret.safetensors"}}', '{"weight_map": {"a": "/etc/passwd"}}',
     '{"weight_map": {"a": "sub/x.safetensors"}}', '{"weight_map": {"a": "x.bin"}}', '{"weight_map": {"a": ".."}}',
     '{"weight_map": {"a": "gone.safetensors"}}'],
)  # fmt: skip
def test_a_damaged_or_straying_index_is_refused(folder, content):
    (folder.parent / "secret.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index\.json|gone\.safetensors"):
        read_folder(folder)


def test_shards_are_read_and_disagreements_between_them_and_the_index_are_named(folder):
    as_shards(folder)
    assert_same_bits(read_folder(folder)[1], numpy_params(TINY))
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"][GATE] = next(f for f in index["weight_map"].values() if f != index["weight_map"][GATE])
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"holds {GATE}, but it does not"):
        read_folder(folder)


def test_a_tensor_in_two_shards_is_refused(folder):
    as_shards(folder)
    shard = folder / "model-00001-of-00003.safetensors"
    other = load_file(folder / "model-00002-of-00003.safetensors")
    name = next(iter(other))
    save_file(load_file(shard) | {name: other[name]}, shard)
    with pytest.raises(ValueError, match="stands in more than one file"):
        read_folder(folder)


def test_a_missing_shard_is_named(folder):
    as_shards(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model-00002-of-00003\.safetensors"):
        read_folder(folder)


def test_no_folder_and_a_hub_that_does_not_answer_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="there is no folder"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        read_folder(tmp_path)

    def refused(*_, **__):
        raise OSError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refused)
    with pytest.raises(ValueError, match=r"^owner/name is no folder here and cannot be fetched .*\(no route\)$"):
        read_folder("owner/name")


def test_the_hub_is_asked_for_neither_pickles_nor_code(folder, monkeypatch):
    asked = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda _, **kw: asked.update(kw) or str(folder))
    assert hf_folder.local_folder("owner/name") == folder
    from fnmatch import fnmatch

    for name in ("pytorch_model.bin", "model.pt", "modeling_llama.py", "optimizer.pt"):
        assert not any(fnmatch(name, pattern) for pattern in asked["allow_patterns"])


# --- push ---


def test_a_dry_run_lists_files_and_sizes_without_a_token_or_the_network(folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: pytest.fail("asked for a token"))
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: pytest.fail("went to the Hub"))
    (folder / "secrets.env").write_text("TOKEN")
    listed = push(folder, "me/model", dry_run=True, private=True)
    size = (folder / "model.safetensors").stat().st_size
    assert f"{size:,}  model.safetensors" in listed
    assert "README.md" in listed
    assert "secrets.env" not in listed
    assert listed.splitlines()[-1].endswith("would go to me/model (private)")


def test_a_push_sends_the_listed_files_alone(folder, monkeypatch):
    sent = {}

    class Hub:
        def create_repo(self, repo, **kw):
            sent["made"] = (repo, kw)
            return f"https://hub/{repo}"

        def upload_folder(self, **kw):
            sent["files"] = kw["allow_patterns"]

    monkeypatch.setattr("huggingface_hub.get_token", lambda: "x")
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    (folder / "secrets.env").write_text("TOKEN")
    assert push(folder, "me/model") == "https://hub/me/model"
    assert sent["made"] == ("me/model", {"private": False, "exist_ok": True})
    assert sorted(sent["files"]) == sorted(p.name for p in folder.iterdir() if p.name != "secrets.env")


def test_a_push_without_token_network_or_export_is_one_line(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ValueError, match="no Hub token; set HF_TOKEN or run: hf auth login"):
        push(folder, "me/model")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "x")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="me/model could not be written on the Hub: ") as caught:
        push(folder, "me/model")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="must read OWNER/NAME"):
        push(folder, "model")
    with pytest.raises(ValueError, match=r"no config\.json"):
        push(tmp_path, "me/model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        push(folder, "me/model", dry_run=True)
    assert MARK
