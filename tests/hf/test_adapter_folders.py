"""Adapters in PEFT's folders: names, orientation and settings, and a base that is the right one."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from smollm_jax.config.adapters import AdapterConfig, adapter_shapes, apply_adapters
from smollm_jax.hf.adapters import open_adapters, read_adapters, weights_sha256
from smollm_jax.hf.card import About
from smollm_jax.hf.export import export_adapters, export_folder
from smollm_jax.hf.publish import push
from smollm_jax.hf.reader import read_folder
from smollm_jax.runs import load
from smollm_jax.runs.load import load_model, open_for_adapters
from smollm_jax.runtime.errors import UserError
from smollm_jax.runtime.trees import flatten, unflatten
from tests.support.hf_folders import TINY, assert_same_bits, numpy_params

SETTINGS = AdapterConfig(lora_rank=4, lora_alpha=6.0, dora=True)
SHAPES = adapter_shapes(SETTINGS, TINY)


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer_folder):
    """Two bases, and adapters over the first."""
    path, rng = tmp_path_factory.mktemp("adapters"), np.random.default_rng(0)
    for seed, name in enumerate(("base", "other")):
        export_folder(numpy_params(TINY, seed), TINY, path / name, tokenizer_folder=tokenizer_folder, verify=False)
    adapters = {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in SHAPES.items()}
    record = {"path": str(path / "base"), "sha256": weights_sha256(read_folder(path / "base")[1])}
    export_adapters(
        unflatten(adapters, "/"), SETTINGS, TINY, path / "adapters", base=record, about=About(title="mine"),
        tokenizer_folder=tokenizer_folder, verify=True, aside=False,
    )  # fmt: skip
    return path, adapters


def changed(place, tmp_path, **settings):
    """A copy of the adapters, or of a folder, with other settings."""
    source = place if isinstance(place, Path) else place[0] / "adapters"
    folder = shutil.copytree(source, tmp_path / "copy")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


def test_the_files_have_pefts_names_and_orientation(place):
    path, adapters = place
    settings = json.loads((path / "adapters" / "adapter_config.json").read_text())
    assert {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 6,
        "use_dora": True,
        "bias": "none",
    }.items() <= settings.items()
    assert settings["base_model_name_or_path"] == str(path / "base")
    assert settings["target_modules"] == [f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")]
    written = load_file(path / "adapters" / "adapter_model.safetensors")
    assert len(written) == 7 * 3 * TINY.num_layers
    layer = "base_model.model.model.layers.1"
    D, N, H, F = TINY.hidden_size, TINY.num_heads, TINY.head_dim, TINY.intermediate_size
    o_A, o_B, o_m = (adapters[f"blocks/attention/o_{part}"][1] for part in "ABm")
    np.testing.assert_array_equal(written[f"{layer}.self_attn.o_proj.lora_A.weight"], o_A.reshape(N * H, 4).T)
    np.testing.assert_array_equal(written[f"{layer}.self_attn.o_proj.lora_B.weight"], o_B.T)
    np.testing.assert_array_equal(written[f"{layer}.self_attn.o_proj.lora_magnitude_vector"], o_m)
    q_B, up_A = adapters["blocks/attention/q_B"][1], adapters["blocks/mlp/up_A"][1]
    np.testing.assert_array_equal(written[f"{layer}.self_attn.q_proj.lora_B.weight"], q_B.reshape(4, N * H).T)
    assert written[f"{layer}.mlp.up_proj.lora_A.weight"].shape == (4, D) == up_A.T.shape
    assert written[f"{layer}.mlp.up_proj.lora_B.weight"].shape == (F, 4)


def test_the_product_is_pefts_on_the_matrices_of_the_base(place):
    """W + (alpha/r)·B·A per layer on Hugging Face's (outputs, inputs) matrices, rows to length m (DoRA)."""
    path, _ = place
    base = load_file(path / "base" / "model.safetensors")
    found = load_file(path / "adapters" / "adapter_model.safetensors")
    config, params, _ = load_model(path / "adapters")
    export_folder(params, config, path / "whole", verify=False)
    merged = load_file(path / "whole" / "model.safetensors")
    for name, W in base.items():
        of = f"base_model.model.{name.removesuffix('.weight')}"
        expected = W
        if f"{of}.lora_A.weight" in found:
            whole = W + 6.0 / 4 * found[f"{of}.lora_B.weight"] @ found[f"{of}.lora_A.weight"]
            m = found[f"{of}.lora_magnitude_vector"]
            expected = m[:, None] * whole / np.linalg.norm(whole, axis=1, keepdims=True)
        np.testing.assert_allclose(merged[name], expected, rtol=1e-4, atol=1e-5)


def test_a_folder_is_read_back_and_opens_as_base_and_adapters(place):
    path, adapters = place
    read, scale = read_adapters(open_adapters(path / "adapters"), TINY)
    assert_same_bits(read, unflatten(adapters, "/"))
    assert scale == 6.0 / 4
    base = flatten(read_folder(path / "base")[1], "/")
    merged = apply_adapters(base, adapters, scale)
    assert_same_bits(load_model(path / "adapters")[1], unflatten(merged, "/"))


def test_the_scale_of_rslora_divides_by_the_root_of_the_rank(place, tmp_path):
    assert read_adapters(open_adapters(changed(place, tmp_path, use_rslora=True)), TINY)[1] == 6.0 / 2


def test_the_card_says_that_it_is_an_adapter_and_the_folder_can_be_pushed(place, tmp_path):
    path, _ = place
    card = (path / "adapters" / "README.md").read_text()
    assert "library_name: peft" in card
    assert "This folder holds adapters alone" in card
    assert "DoRA, rank 4, alpha 6, on q_proj" in card
    assert "PeftModel.from_pretrained(base" in card
    with pytest.raises(UserError, match="which nobody else has; put its Hub id there"):
        push(path / "adapters", "me/mine", dry_run=True)
    files = push(changed(place, tmp_path, base_model_name_or_path="me/base"), "me/mine", dry_run=True)
    assert "adapter_config.json" in files
    assert "adapter_model.safetensors" in files


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3'; LORA can be read"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern="),
        ({"r": 0}, "says r=0; expected a number above 0"),
        ({"r": True}, "says r=True; expected a number above 0"),
        ({"lora_alpha": "8"}, "says lora_alpha='8'; expected a number above 0"),
        ({"r": 5}, r"expected shape \(5, 24\) from the base, got \(4, 24\)"),
        ({"use_dora": False}, "holds tensor .*lora_magnitude_vector, which the base does not have"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path=None; expected a name"),
        ({"base_model_name_or_path": ""}, "base_model_name_or_path=''; expected a name"),
        ({"lora_alpha": float("inf")}, "lora_alpha=inf; expected a number above 0"),
        ({"revision": "v2"}, "revision='v2'; only None can be read"),
        ({"use_new_thing": {"a": 1}}, "says use_new_thing, which this version does not know"),
        ({"base_model_name_or_path": "/nowhere"}, "the base of the adapters cannot be opened"),
    ],
)  # fmt: skip
def test_adapters_that_cannot_be_read_are_refused(place, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        load_model(changed(place, tmp_path, **change))


def test_adapters_over_another_base_or_themselves_are_refused(place, tmp_path):
    other = changed(place, tmp_path, base_model_name_or_path=str(place[0] / "other"))
    with pytest.raises(UserError, match="other is another base than the adapters were trained on"):
        load_model(other)
    itself = changed(place, tmp_path / "2", base_model_name_or_path=str(tmp_path / "2" / "copy"))
    with pytest.raises(UserError, match="leads back to itself"):
        load_model(itself)


def test_adapters_over_adapters_open_as_all_three_merged(place, tmp_path):
    path, adapters = place
    below = load_model(path / "adapters")[1]
    record = {"path": str(path / "adapters"), "sha256": weights_sha256(below)}
    export_adapters(
        unflatten(adapters, "/"), SETTINGS, TINY, tmp_path / "two", base=record, about=About(title="mine"),
        tokenizer_folder=path / "adapters", verify=True, aside=False,
    )  # fmt: skip
    merged = apply_adapters(flatten(below, "/"), adapters, 6.0 / 4)
    assert_same_bits(load_model(tmp_path / "two")[1], unflatten(merged, "/"))


def test_the_hash_of_a_base_with_adapters_does_not_depend_on_how_it_is_merged(place, tmp_path, monkeypatch):
    """The last bits of a product differ between machines."""
    path, adapters = place
    record = open_for_adapters(str(path / "adapters"))[3]
    export_adapters(
        unflatten(adapters, "/"), SETTINGS, TINY, tmp_path / "two", base=record, about=About(title="mine"),
        tokenizer_folder=path / "adapters", verify=True, aside=False,
    )  # fmt: skip
    exact = load.merge
    monkeypatch.setattr(load, "merge", lambda *them: unflatten(
        {name: leaf * np.float32(1 + 2e-7) for name, leaf in flatten(exact(*them), "/").items()}, "/"
    ))  # fmt: skip
    load_model(tmp_path / "two")
    other = json.loads((path / "adapters" / "adapter_config.json").read_text()) | {"lora_alpha": 7}
    (shutil.copytree(path / "adapters", tmp_path / "other") / "adapter_config.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match="is another base than the adapters were trained on"):
        load_model(changed(tmp_path / "two", tmp_path, base_model_name_or_path=str(tmp_path / "other")))


def test_a_tensor_that_is_missing_is_named(place, tmp_path):
    folder = changed(place, tmp_path)
    file = folder / "adapter_model.safetensors"
    values = load_file(file)
    gone = values.popitem()[0]
    save_file(values, file)
    with pytest.raises(UserError, match=f"lacks tensor {gone}"):
        load_model(folder)
    file.write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="cannot be read"):
        load_model(folder)
