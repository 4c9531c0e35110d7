"""Convert our parameters to Hugging Face's names and layouts and back, with numpy alone.

One table serves both directions, so that they cannot disagree. HF keeps a matrix as (outputs, inputs) and each
layer apart; ours are (inputs..., outputs...) with the layers stacked. A conversion moves bits and rounds nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from smollm_jax.config.architecture import ModelConfig, parameter_shapes
from smollm_jax.runtime.errors import require
from smollm_jax.runtime.trees import flatten, unflatten

Params = dict[str, Any]


@dataclass(frozen=True)
class WeightMapping:
    """One parameter: our path and HF's name, in which "{}" is the layer."""

    ours: str
    theirs: str
    inputs: int = 0
    """Number of our leading dims, the layer dim not counted, that are HF's second dim; 0: the same layout."""


TABLE = (
    WeightMapping("embedding", "model.embed_tokens.weight"),
    WeightMapping("blocks/attention_norm/scale", "model.layers.{}.input_layernorm.weight"),
    WeightMapping("blocks/attention/q", "model.layers.{}.self_attn.q_proj.weight", 1),
    WeightMapping("blocks/attention/k", "model.layers.{}.self_attn.k_proj.weight", 1),
    WeightMapping("blocks/attention/v", "model.layers.{}.self_attn.v_proj.weight", 1),
    WeightMapping("blocks/attention/o", "model.layers.{}.self_attn.o_proj.weight", 2),
    WeightMapping("blocks/mlp_norm/scale", "model.layers.{}.post_attention_layernorm.weight"),
    WeightMapping("blocks/mlp/gate", "model.layers.{}.mlp.gate_proj.weight", 1),
    WeightMapping("blocks/mlp/up", "model.layers.{}.mlp.up_proj.weight", 1),
    WeightMapping("blocks/mlp/down", "model.layers.{}.mlp.down_proj.weight", 1),
    WeightMapping("final_norm/scale", "model.norm.weight"),
    WeightMapping("head", "lm_head.weight"),
)


@dataclass(frozen=True)
class Tensor:
    """One tensor of a Hugging Face folder; `layer` is None if the parameter has no layer dim."""

    name: str
    entry: WeightMapping
    layer: int | None
    shape: tuple[int, ...]


def tensors(config: ModelConfig) -> list[Tensor]:
    """Return every tensor that a folder of this config holds, without a tied head."""
    shapes, out = parameter_shapes(config, one_layer=True), []
    for entry in TABLE:
        if entry.ours not in shapes:
            continue
        shape = shapes[entry.ours]
        if entry.inputs:
            shape = (math.prod(shape[entry.inputs :]), math.prod(shape[: entry.inputs]))
        for layer in range(config.num_layers) if entry.ours.startswith("blocks/") else (None,):
            out.append(Tensor(entry.theirs.format(layer), entry, layer, shape))
    return out


def to_hf(params: Params, tensor: Tensor) -> np.ndarray:
    """Return HF's tensor as a view of our numpy parameters."""
    value = flatten(params, "/")[tensor.entry.ours]
    value = value if tensor.layer is None else value[tensor.layer]
    return value.reshape(tensor.shape[::-1]).T if tensor.entry.inputs else value


def from_hf(read: Callable[[str], np.ndarray], config: ModelConfig) -> Params:
    """Return our f32 parameters from `read(name)`; raises `UserError` naming a tensor of another shape."""
    shapes = parameter_shapes(config, one_layer=True)
    named: dict[str, np.ndarray] = {}
    for tensor in tensors(config):
        value, path, shape = read(tensor.name), tensor.entry.ours, shapes[tensor.entry.ours]
        expected = f"expected shape {tensor.shape} from config.json, got {value.shape}"
        require(value.shape == tensor.shape, f"tensor {tensor.name}: {expected}")
        value = (value.T if tensor.entry.inputs else value).reshape(shape)
        if tensor.layer is None:
            named[path] = value.astype(np.float32)
        else:
            # allocated when its first tensor fits: a folder that does not fit takes no memory
            if path not in named:
                named[path] = np.empty((config.num_layers, *shape), np.float32)
            named[path][tensor.layer] = value
    return unflatten(named, "/")
