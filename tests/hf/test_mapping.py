"""Names, layouts and config.json: transformers is the oracle."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from smollm_jax.config.architecture import MODELS, parameter_shapes
from smollm_jax.config.serialization import from_dict, to_dict
from smollm_jax.config.settings import Config, DataConfig
from smollm_jax.hf.config_json import hf_config, model_config
from smollm_jax.hf.mapping import TABLE, from_hf, tensors, to_hf
from tests.support.hf_folders import (
    TINY,
    UNTIED,
    assert_same_bits,
    numpy_params,
)


@pytest.mark.parametrize("config", [TINY, UNTIED], ids=["tied", "untied"])
def test_the_table_goes_round_bit_for_bit_and_covers_every_parameter(config):
    params = numpy_params(config)
    params["embedding"][0, :3] = np.nan, -0.0, np.float32(1e-45)
    held = {tensor.name: to_hf(params, tensor) for tensor in tensors(config)}
    assert_same_bits(from_hf(held.__getitem__, config), params)
    assert set(parameter_shapes(config)) == {ours for ours in TABLE if config is UNTIED or ours != "head"}


@pytest.mark.parametrize("preset", ["135M", "360M", "1.7B"])
def test_each_published_architecture_has_the_tensors_that_transformers_expects(preset):
    config = MODELS[preset]
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(**hf_config(config, "float32")))
    theirs = {name: tuple(value.shape) for name, value in llama.state_dict().items()}
    del theirs["lm_head.weight"]  # tied
    assert {tensor.name: tensor.shape for tensor in tensors(config)} == theirs
    assert sum(int(np.prod(tensor.shape)) for tensor in tensors(config)) == config.num_parameters


SIZES = st.integers(1, 96)


@given(st.fixed_dictionaries({}, optional={
    "hidden_size": SIZES, "num_heads": SIZES, "head_dim": st.integers(1, 48).map(lambda half: 2 * half),
    "vocab_size": st.integers(1, 2**33), "num_layers": st.integers(1, 20_000), "max_seq_len": SIZES,
    "initializer_range": st.floats(1e-9, 9), "rms_norm_eps": st.floats(1e-12, 1e33),
    "rope_theta": st.floats(1, 1e33), "bos_token_id": st.integers(-9, 99), "eos_token_id": st.integers(-9, 99),
}))  # fmt: skip
@example({"hidden_size": 48, "num_heads": 9, "head_dim": 16})
@example({"initializer_range": 1.5})
@example({"vocab_size": 300, "bos_token_id": 300})
def test_what_is_not_refused_at_the_start_is_loaded_by_transformers_at_the_end(fields):
    config = replace(TINY, **({"num_kv_heads": 1} | fields))
    try:
        written = hf_config(config, "float32")
    except ValueError:
        return
    read = LlamaConfig(**json.loads(json.dumps(written)))
    assert (read.hidden_size, read.head_dim, read.vocab_size) == (
        config.hidden_size,
        config.head_dim,
        config.vocab_size,
    )
    assert model_config(written) == config


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


def test_several_ends_of_text_are_all_kept_the_first_as_eos():
    several = model_config(hf_config(TINY, "float32") | {"eos_token_id": [7, 9]})
    assert (several.eos_token_id, several.stop_ids) == (7, (7, 9))
    assert hf_config(several, "float32")["eos_token_id"] == [7, 9]
    assert model_config(hf_config(several, "float32")) == several
    kept = json.loads(json.dumps(to_dict(Config(model=several, data=DataConfig(seq_len=9)))))
    assert from_dict(kept).model == several


def test_no_end_of_text_is_none_and_a_field_left_out_is_llamas_own():
    none = model_config(hf_config(TINY, "float32") | {"eos_token_id": None})
    assert (none.eos_token_id, none.stop_ids) == (None, ())
    assert hf_config(none, "float32")["eos_token_id"] is None
    names = ("eos_token_id", "bos_token_id", "max_position_embeddings", "rope_theta", "rope_parameters")
    left_out = model_config({k: v for k, v in hf_config(TINY, "float32").items() if k not in names})
    assert (left_out.eos_token_id, left_out.bos_token_id, left_out.max_seq_len) == (2, 1, 2_048)
    assert left_out.rope_theta == 10_000


def test_a_pad_id_is_kept_and_minus_one_means_none():
    padded = model_config(hf_config(TINY, "float32") | {"pad_token_id": 3})
    assert padded.pad_token_id == hf_config(padded, "float32")["pad_token_id"] == 3
    assert model_config(hf_config(TINY, "float32") | {"pad_token_id": -1}).pad_token_id is None
    assert "pad_token_id" not in hf_config(TINY, "float32")
