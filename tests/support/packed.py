"""Packed rows of attention, and the outcome of an attention on them."""

import jax
import jax.numpy as jnp
import numpy as np

from smollm_jax.model.attention import starts_of

# of the largest entry
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.02}


def random_rows(seed, *, rows=2, length=256, heads=(9, 3), head_dim=64, dtype=jnp.float32):
    """q, k, v, an output's gradient, and documents of random lengths with padding, segment 0, at the end."""
    rng = np.random.default_rng(seed)
    N, K = heads
    arrays = [jnp.asarray(rng.normal(size=(rows, length, n, head_dim)), dtype) for n in (N, K, K, N)]
    begins = rng.random((rows, length)) < rng.choice([0.005, 0.05, 0.5])
    segment_ids = 1 + np.cumsum(begins, axis=1).astype(np.int32)
    for row, padding in enumerate(rng.integers(0, max(1, length // 3), rows)):
        segment_ids[row, length - padding :] = 0
    return *arrays, starts_of(jnp.asarray(segment_ids))


def outcome(kernel, *rows):
    q, k, v, do, start = rows
    out, pull = jax.vjp(lambda q, k, v: kernel(q, k, v, start), q, k, v)
    return out, *pull(do)
