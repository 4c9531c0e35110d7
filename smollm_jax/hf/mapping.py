"""Convert our parameters to Hugging Face's names and layouts and back, with numpy alone.

One table serves both directions, so that they cannot disagree. HF keeps a matrix as (outputs, inputs) and each
layer apart. Ours are (inputs..., outputs...) with the layers stacked. A conversion moves bits and rounds nothing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from smollm_jax.config.architecture import ModelConfig, parameter_shapes
from smollm_jax.runtime.errors import require
from smollm_jax.runtime.trees import flatten, unflatten

Params = dict[str, Any]


# our path: HF's name, in which "{}" is the layer, and how many of our leading dims, without the layer dim, are
# HF's second dim; 0: the same layout
TABLE = {
    "embedding": ("model.embed_tokens.weight", 0),
    "blocks/attention_norm/scale": ("model.layers.{}.input_layernorm.weight", 0),
    "blocks/attention/q": ("model.layers.{}.self_attn.q_proj.weight", 1),
    "blocks/attention/k": ("model.layers.{}.self_attn.k_proj.weight", 1),
    "blocks/attention/v": ("model.layers.{}.self_attn.v_proj.weight", 1),
    "blocks/attention/o": ("model.layers.{}.self_attn.o_proj.weight", 2),
    "blocks/mlp_norm/scale": ("model.layers.{}.post_attention_layernorm.weight", 0),
    "blocks/mlp/gate": ("model.layers.{}.mlp.gate_proj.weight", 1),
    "blocks/mlp/up": ("model.layers.{}.mlp.up_proj.weight", 1),
    "blocks/mlp/down": ("model.layers.{}.mlp.down_proj.weight", 1),
    "final_norm/scale": ("model.norm.weight", 0),
    "head": ("lm_head.weight", 0),
}


@dataclass(frozen=True)
class Tensor:
    """A tensor of a Hugging Face folder, and the parameter of ours that holds it."""

    name: str
    shape: tuple[int, ...]
    ours: str
    layer: tuple[int, ...]
    """Index into our parameter; empty if the parameter has no layer dim."""
    is_transposed: bool


def tensors(config: ModelConfig) -> list[Tensor]:
    """Return every tensor that a folder of this config holds, without a tied head."""
    found = []
    for ours, dims in parameter_shapes(config, one_layer=True).items():
        theirs, inputs = TABLE[ours]
        shape = (math.prod(dims[inputs:]), math.prod(dims[:inputs])) if inputs else dims
        for layer in [(i,) for i in range(config.num_layers)] if ours.startswith("blocks/") else [()]:
            found.append(Tensor(theirs.format(*layer), shape, ours, layer, inputs > 0))
    return found


def to_hf(params: Params, tensor: Tensor) -> np.ndarray:
    """Return HF's tensor as a view of our numpy parameters."""
    value = flatten(params, "/")[tensor.ours][tensor.layer]
    return value.reshape(tensor.shape[::-1]).T if tensor.is_transposed else value


def from_hf(read: Callable[[str], np.ndarray], config: ModelConfig) -> Params:
    """Return our f32 parameters from `read(name)`. Raises `UserError` naming a tensor of another shape."""
    shapes = parameter_shapes(config)
    named: dict[str, np.ndarray] = {}
    for tensor in tensors(config):
        value = read(tensor.name)
        expected = f"expected shape {tensor.shape} from config.json, got {value.shape}"
        require(value.shape == tensor.shape, f"tensor {tensor.name}: {expected}")
        # allocated when its first tensor fits: a folder that does not fit takes no memory
        if tensor.ours not in named:
            named[tensor.ours] = np.empty(shapes[tensor.ours], np.float32)
        place = named[tensor.ours][tensor.layer]
        place[...] = (value.T if tensor.is_transposed else value).reshape(place.shape)
    return unflatten(named, "/")
