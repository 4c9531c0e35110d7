"""The embedding's repeatable gradient against the plain one."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smollm_jax.lookup import lookup_of, plain_lookup, repeatable_lookup, sums_by_token


@pytest.mark.parametrize(
    ("shape", "vocab"),
    [((1, 1), 1), ((2, 7), 5), ((3, 50), 11), ((2, 64), 4_096), ((4, 33), 1)],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_gradients_equal_the_plain_ones(shape, vocab, dtype):
    rng = np.random.default_rng(vocab)
    embedding = jnp.asarray(rng.normal(size=(vocab, 6)), jnp.float32)
    tokens = jnp.asarray(rng.zipf(1.3, shape) % vocab, jnp.int32)
    dx = jnp.asarray(rng.normal(size=(*shape, 6)), dtype)
    x, pull = jax.vjp(lambda e: repeatable_lookup(None)(e, tokens).astype(dtype), embedding)
    plain, plain_pull = jax.vjp(lambda e: plain_lookup(e, tokens).astype(dtype), embedding)
    np.testing.assert_array_equal(x, plain)
    assert pull(dx)[0].dtype == jnp.float32
    np.testing.assert_allclose(pull(dx)[0], plain_pull(dx)[0], atol=1e-5)


def test_sums_of_rows_of_all_magnitudes_are_those_of_f64():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, 512, 3)) * 10.0 ** rng.integers(-4, 5, (1, 512, 1)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, 2, (1, 512)), jnp.int32)
    exact = np.zeros((9, 3))
    np.add.at(exact, np.asarray(tokens)[0], np.asarray(x, np.float64)[0])
    np.testing.assert_allclose(sums_by_token(x, tokens, 9), exact, rtol=1e-4)


def test_on_a_gpu_no_place_is_added_to_twice():
    gpu = SimpleNamespace(devices=np.array([SimpleNamespace(platform="gpu")]), size=1)
    cpu = SimpleNamespace(devices=np.array([SimpleNamespace(platform="cpu")]), size=1)
    assert lookup_of(None) is lookup_of(cpu) is plain_lookup
    tokens = jnp.zeros((2, 8), jnp.int32)

    def scatters(lookup):
        gradient = jax.jit(jax.grad(lambda e: lookup(e, tokens).sum()))
        program = gradient.trace(jnp.ones((5, 4))).lower(lowering_platforms=("cuda",)).as_text()
        return re.findall(r"stablehlo.scatter.*?unique_indices = (true|false)", program, re.DOTALL)

    assert scatters(plain_lookup) == ["false"]
    assert scatters(lookup_of(gpu)) == ["true"]
