"""Our parameters in Hugging Face's names and layouts, and config.json in ours: numpy alone.

One table serves both directions, so that they cannot disagree. HF keeps a matrix as (outputs, inputs) and
each layer apart; ours are (inputs..., outputs...) with the layers stacked. Turning one into the other moves
bits and rounds nothing. A config.json is read field by field, nothing of it on trust.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from smollm_jax.config.architecture import ModelConfig
from smollm_jax.runtime.errors import require

Params = dict[str, Any]


@dataclass(frozen=True)
class WeightMapping:
    """One parameter: our path, HF's name ("{}" is the layer), and HF's shape as ours flattened and turned."""

    ours: tuple[str, ...]
    theirs: str
    inputs: int = 0
    """Leading dims of ours (the layer's not counted) that are HF's second, input, dim; 0: the same layout."""


TABLE = (
    WeightMapping(("embedding",), "model.embed_tokens.weight"),
    WeightMapping(("blocks", "attention_norm", "scale"), "model.layers.{}.input_layernorm.weight"),
    WeightMapping(("blocks", "attention", "q"), "model.layers.{}.self_attn.q_proj.weight", 1),
    WeightMapping(("blocks", "attention", "k"), "model.layers.{}.self_attn.k_proj.weight", 1),
    WeightMapping(("blocks", "attention", "v"), "model.layers.{}.self_attn.v_proj.weight", 1),
    WeightMapping(("blocks", "attention", "o"), "model.layers.{}.self_attn.o_proj.weight", 2),
    WeightMapping(("blocks", "mlp_norm", "scale"), "model.layers.{}.post_attention_layernorm.weight"),
    WeightMapping(("blocks", "mlp", "gate"), "model.layers.{}.mlp.gate_proj.weight", 1),
    WeightMapping(("blocks", "mlp", "up"), "model.layers.{}.mlp.up_proj.weight", 1),
    WeightMapping(("blocks", "mlp", "down"), "model.layers.{}.mlp.down_proj.weight", 1),
    WeightMapping(("final_norm", "scale"), "model.norm.weight"),
    WeightMapping(("head",), "lm_head.weight"),
)


@dataclass(frozen=True)
class Tensor:
    """One tensor of a Hugging Face folder; `layer` is None for what is not stacked."""

    name: str
    entry: WeightMapping
    layer: int | None
    shape: tuple[int, ...]


def shapes_of(config: ModelConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    """The shape of each of our parameters, the layer dim left out."""
    D, F, N, K, H = (
        config.hidden_size, config.intermediate_size, config.num_heads, config.num_kv_heads, config.head_dim,
    )  # fmt: skip
    shapes = {
        "embedding": (config.vocab_size, D), "blocks/attention_norm/scale": (D,), "blocks/mlp_norm/scale": (D,),
        "blocks/attention/q": (D, N, H), "blocks/attention/k": (D, K, H), "blocks/attention/v": (D, K, H),
        "blocks/attention/o": (N, H, D), "blocks/mlp/gate": (D, F), "blocks/mlp/up": (D, F),
        "blocks/mlp/down": (F, D), "final_norm/scale": (D,),
    }  # fmt: skip
    if not config.tie_embeddings:
        shapes["head"] = (config.vocab_size, D)
    return {tuple(name.split("/")): shape for name, shape in shapes.items()}


def tensors(config: ModelConfig) -> list[Tensor]:
    """Every tensor that a folder of this config holds; a tied head is not one of them."""
    shapes, out = shapes_of(config), []
    for entry in TABLE:
        if entry.ours not in shapes:
            continue
        shape = shapes[entry.ours]
        if entry.inputs:
            shape = (math.prod(shape[entry.inputs :]), math.prod(shape[: entry.inputs]))
        for layer in range(config.num_layers) if entry.ours[0] == "blocks" else (None,):
            out.append(Tensor(entry.theirs.format(layer), entry, layer, shape))
    return out


def leaf(params: Params, path: tuple[str, ...]) -> Any:
    for part in path:
        params = params[part]
    return params


def to_hf(params: Params, tensor: Tensor) -> np.ndarray:
    """HF's tensor out of our numpy parameters, a view of them."""
    value = leaf(params, tensor.entry.ours)
    if tensor.layer is not None:
        value = value[tensor.layer]
    return value.reshape(tensor.shape[::-1]).T if tensor.entry.inputs else value


def from_hf(read: Callable[[str], np.ndarray], config: ModelConfig) -> Params:
    """Our f32 parameters from `read(name)`; raises `ValueError` naming a tensor of another shape."""
    shapes = shapes_of(config)
    params: Params = {}
    for tensor in tensors(config):
        value, path = read(tensor.name), tensor.entry.ours
        require(
            value.shape == tensor.shape,
            f"tensor {tensor.name}: expected shape {tensor.shape} from config.json, got {value.shape}",
        )
        value = (value.T if tensor.entry.inputs else value).reshape(shapes[path])
        branch = params
        for part in path[:-1]:
            branch = branch.setdefault(part, {})
        if tensor.layer is None:
            branch[path[-1]] = value.astype(np.float32)
        else:
            # made as it is met: a folder whose first tensors do not fit asks for no memory
            stacked = branch.setdefault(path[-1], np.empty((config.num_layers, *shapes[path]), np.float32))
            stacked[tensor.layer] = value
    return params
