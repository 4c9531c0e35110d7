"""Kernels run per device: the same values, whatever the mesh divides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from smollm_jax.kernels.shard import attention_per_device


@pytest.mark.parametrize("kv_heads", [2, 3])
def test_heads_are_divided_only_if_the_axis_divides_them(kv_heads):
    """Of three key/value heads two devices cannot have the same number, so each has all of them."""
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"))
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(4, 16, n, 8) for n in (2 * kv_heads, kv_heads, kv_heads)]
    arrays = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    seen = []

    def kernel(q, k, v, start):
        seen.append((q.shape, k.shape))
        groups = q.shape[2] // k.shape[2]
        return q + jnp.repeat(k + 2 * v, groups, axis=2) + start[:, :, None, None]

    start = jnp.zeros((4, 16), jnp.int32)
    divided = attention_per_device(mesh, kernel, rows=("data",), heads="tensor")(*arrays, start)
    np.testing.assert_allclose(divided, kernel(*arrays, start), rtol=1e-6)
    parts = 2 if kv_heads == 2 else 1
    assert seen[0] == ((2, 16, 2 * kv_heads // parts, 8), (2, 16, kv_heads // parts, 8))
