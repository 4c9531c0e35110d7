"""Start adapters over a frozen base, and merge them to decode samples."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from smollm_jax.config.adapters import AdapterConfig, adapter_shapes, apply_adapters, lengths
from smollm_jax.config.architecture import ADAPTED, ModelConfig
from smollm_jax.config.settings import Config
from smollm_jax.distributed.sharding import layout_of, with_layout
from smollm_jax.runtime.trees import flatten, unflatten


def frozen_base(params: Any, dtype: Any) -> Any:
    """Return the weights in `dtype`. Norms stay f32: they are small."""
    named = flatten(params, "/")
    return unflatten({n: x if n.endswith("scale") else x.astype(dtype) for n, x in named.items()}, "/")


def init_adapters(config: AdapterConfig, model: ModelConfig, base: Any, seed: int) -> Any:
    """Return adapters that change nothing yet: A uniform within 1/sqrt(inputs), B zero, m the lengths of `base`.

    PEFT draws A so: Kaiming uniform with a = sqrt(5).
    """
    named, key = flatten(base, "/"), jax.random.key(seed)
    found = {}
    for number, (path, shape) in enumerate(adapter_shapes(config, model).items()):
        matrix, part = path.rsplit("_", 1)
        if part == "A":
            bound = math.prod(shape[1:-1]) ** -0.5
            found[path] = jax.random.uniform(jax.random.fold_in(key, number), shape, jnp.float32, -bound, bound)
        elif part == "B":
            found[path] = jnp.zeros(shape, jnp.float32)
        else:
            found[path] = lengths(named[matrix].astype(jnp.float32), 1, ADAPTED[matrix])
    return unflatten(found, "/")


def whole_weights(config: Config, state: dict[str, Any], mesh: Mesh) -> Any:
    """Return the weights of a train state, laid out by name, with any adapters merged in f32."""
    if not config.adapter.is_on:
        return state["params"]
    arguments = state["base"], state["params"], config.adapter.scale
    shapes = with_layout(jax.eval_shape(_merged, *arguments), mesh)
    return jax.jit(_merged, out_shardings=layout_of(shapes))(*arguments)


def _merged(base: Any, adapters: Any, scale: float) -> Any:
    named = flatten(base, "/")
    merged = apply_adapters(named, flatten(adapters, "/"), scale)
    return unflatten({name: leaf.astype(named[name].dtype) for name, leaf in merged.items()}, "/")
