"""Call a Pallas kernel that Triton compiles for a GPU, with loads and stores."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

LOG2_E = math.log2(math.e)  # a GPU's exponential has base 2: e^x = 2^(x log2 e)


def triton_call(
    name: str,
    kernel: Callable[..., None],
    grid: tuple[int, ...],
    inputs: Sequence[tuple[jax.Array, pl.BlockSpec]],
    outputs: Sequence[tuple[Any, pl.BlockSpec]],
    interpret: bool,
    *,
    warps: int = 4,
    stages: int | None = None,
    aliases: dict[int, int] | None = None,
) -> list[jax.Array]:
    """Return the outputs of `kernel`, run per program of `grid` on the specs' blocks.

    The first of each pair in `outputs` has the shape and dtype. `stages` are the loads in flight. `aliases` maps
    an input to the output that takes its memory. `interpret` runs the kernel on any device, slowly.
    """
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[spec for _, spec in inputs],
        out_specs=[spec for _, spec in outputs],
        out_shape=[jax.ShapeDtypeStruct(like.shape, like.dtype) for like, _ in outputs],
        input_output_aliases=aliases or {},
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name=name,
    )(*(array for array, _ in inputs))


def load_f32(ref, mask: jax.Array | None) -> jax.Array:
    """Load as f32, 0 where masked."""
    loaded = plt.load(ref) if mask is None else plt.load(ref, mask=mask, other=0.0)
    return loaded.astype(jnp.float32)


def store(ref, x: jax.Array, mask: jax.Array | None) -> None:
    """Store in the dtype of `ref`, nothing where masked."""
    plt.store(ref, x.astype(ref.dtype), mask=mask)
