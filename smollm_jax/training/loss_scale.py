"""Scale the loss of a float16 run, so that small gradients do not vanish (Micikevicius et al. 2018).

float16 holds no number below 6e-8 and none above 65,504. The loss is scaled inside the chunked loss, before the
logits' gradient is rounded, and the optimizer removes the scale before it clips. If a gradient overflows, the step
is skipped and the scale halved. Other dtypes have no such state, and their program is as without this file.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

FIRST, LEAST = 2.0**16, 1.0  # of the mean loss. At LEAST an overflow is no fault of the scale: a bad step
GOOD_STEPS = 2_000  # after which the scale doubles

Scale = dict[str, jax.Array]  # `scale`, f32 (), and `good_steps` in a row, int32 ()


def first_scale() -> Scale:
    """Return the state before the first step."""
    return {"scale": jnp.float32(FIRST), "good_steps": jnp.int32(0)}


def factor_of(scale: Scale, tokens: int) -> jax.Array:
    """Return the factor of a loss that is a sum over about `tokens`. A power of two, so that it rounds nothing."""
    return scale["scale"] / 2.0 ** round(math.log2(tokens))


def overflowed(scale: Scale, nll: Any, norm: Any) -> jax.Array:
    """Return whether the scale was too large: the loss is finite, its gradient is not."""
    return jnp.isfinite(nll) & ~jnp.isfinite(norm) & (scale["scale"] > LEAST)


def next_scale(scale: Scale, *, overflow: Any, finite: Any, counts: Any) -> Scale:
    """Return the state after a step. A step that does not count leaves it as it is."""
    good = jnp.where(finite, scale["good_steps"] + 1, 0)
    doubles = good >= GOOD_STEPS
    factor = jnp.where(overflow, 0.5, jnp.where(doubles, 2.0, 1.0))
    after = {"scale": scale["scale"] * factor, "good_steps": jnp.where(doubles, 0, good)}
    return {name: jnp.where(counts, value, scale[name]) for name, value in after.items()}
