"""Every folder that transformers would not load is refused by name."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from smollm_jax.hf import reader
from smollm_jax.hf.reader import read_folder
from smollm_jax.runtime import retry
from tests.support.hf_folders import (
    TINY,
    as_shards,
    assert_same_bits,
    change_config,
    change_tensors,
    numpy_params,
)


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
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling has rope_type='llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling has type='linear'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters has rope_type='yarn'"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters has full_attention"),
        ({"rope_parameters": "default"}, "rope_parameters must be an object"),
        ({"rope_scaling": [1]}, "rope_scaling must be an object"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"eos_token_id": 300}, "eos_token_id must be an id below vocab_size=300"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be an id"),
        ({"bos_token_id": -1}, "bos_token_id must be an id"),
        ({"num_key_value_heads": 3}, "num_heads=4 must be a multiple of num_kv_heads=3"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"num_attention_heads": 100, "head_dim": ...}, "head_dim must be a whole number from 1 .* 0 came"),
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
    (folder / "model.safetensors").rename(folder.parent / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index\.json|gone\.safetensors"):
        read_folder(folder)


def test_the_single_file_goes_before_an_older_index(folder):
    new = (folder / "model.safetensors").read_bytes()
    change_tensors(folder, lambda t: t.update({name: value * 0.5 for name, value in t.items()}))
    as_shards(folder)
    (folder / "model.safetensors").write_bytes(new)
    assert_same_bits(read_folder(folder)[1], numpy_params(TINY))
    for shard in folder.glob("model-0*"):
        shard.unlink()
    assert_same_bits(read_folder(folder)[1], numpy_params(TINY))


def test_a_tied_head_may_stand_under_either_name(folder):
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    assert_same_bits(read_folder(folder)[1], numpy_params(TINY))
    change_config(folder, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"lacks tensor model\.embed_tokens\.weight"):
        read_folder(folder)


def test_a_model_saved_without_its_head_is_read_under_its_own_names(folder):
    def without_prefix(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    change_tensors(folder, without_prefix)
    assert_same_bits(read_folder(folder)[1], numpy_params(TINY))


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        ([2, 7], ..., (2, 7)), (2, [2, 7], (2, 7)), ([7], [2], (7, 2)), (None, 9, (9,)), (2, None, (2,)),
        (2, ..., (2,)), (..., ..., (2,)), ([], [], ()), (2, [7, 300], (2, 7)),
    ],
)  # fmt: skip
def test_a_text_ends_where_either_file_says(folder, config, generation, ends):
    change_config(folder, eos_token_id=config)
    file = folder / "generation_config.json"
    file.unlink() if generation is ... else file.write_text(json.dumps({"eos_token_id": generation}))
    assert read_folder(folder)[0].stop_ids == ends


@pytest.mark.parametrize("content", ["{", "[]", '{"eos_token_id": "x"}'])
def test_a_damaged_generation_config_is_one_line(folder, content):
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"generation_config|eos_token_id") as caught:
        read_folder(folder)
    assert "\n" not in str(caught.value)


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

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refused)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(retry, "FRESH_SECONDS", 0)
    with pytest.raises(
        ValueError, match=r"^owner/name is no folder here and cannot be fetched .*\(OSError: no route to host\)\)$"
    ):
        read_folder("owner/name")


def test_the_hub_is_asked_for_neither_pickles_nor_code(folder, monkeypatch):
    asked = {}
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda _, **kw: asked.update(kw) or str(folder))
    assert reader.local_folder("owner/name") == folder
    from fnmatch import fnmatch

    for name in ("pytorch_model.bin", "model.pt", "modeling_llama.py", "optimizer.pt"):
        assert not any(fnmatch(name, pattern) for pattern in asked["allow_patterns"])


@pytest.mark.parametrize("name", ["x" * 5_000 + ".safetensors", "a\0.safetensors"])
def test_an_index_that_names_no_possible_file_is_one_line(folder, name):
    (folder / "model.safetensors").unlink()  # it would be read in place of the index
    (folder / reader.INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(ValueError, match="no safetensors file of this folder") as caught:
        read_folder(folder)
    assert len(str(caught.value)) < 500


def test_weights_that_may_not_be_read_are_not_called_cut_short(folder, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", denied)
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read: Permission denied"):
        reader.tensor_files(folder)
