"""The reproducible gradient of the embedding against the reference."""

import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from smollm_jax.kernels.embedding import reproducible_embed, sums_by_token
from smollm_jax.kernels.select import select_ops
from smollm_jax.model.ops import reference_embed


@pytest.mark.parametrize(
    ("shape", "vocab"),
    [((1, 1), 1), ((2, 7), 5), ((3, 50), 11), pytest.param((2, 64), 4_096, marks=pytest.mark.slow), ((4, 33), 1)],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_gradients_equal_the_plain_ones(shape, vocab, dtype):
    rng = np.random.default_rng(vocab)
    embedding = jnp.asarray(rng.normal(size=(vocab, 6)), jnp.float32)
    tokens = jnp.asarray(rng.zipf(1.3, shape) % vocab, jnp.int32)
    dx = jnp.asarray(rng.normal(size=(*shape, 6)), dtype)

    @partial(jax.jit, static_argnums=0)
    def outcome(lookup, embedding):
        x, pull = jax.vjp(lambda e: lookup(e, tokens).astype(dtype), embedding)
        return x, pull(dx)[0]

    (x, de), (plain, plain_de) = (
        outcome(lookup, embedding) for lookup in (reproducible_embed(None), reference_embed)
    )
    np.testing.assert_array_equal(x, plain)
    assert de.dtype == jnp.float32
    np.testing.assert_allclose(de, plain_de, atol=1e-5)


@pytest.mark.slow
def test_sums_of_rows_of_all_magnitudes_are_those_of_f64():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, 512, 3)) * 10.0 ** rng.integers(-4, 5, (1, 512, 1)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, 2, (1, 512)), jnp.int32)
    exact = np.zeros((9, 3))
    np.add.at(exact, np.asarray(tokens)[0], np.asarray(x, np.float64)[0])
    np.testing.assert_allclose(jax.jit(sums_by_token, static_argnums=2)(x, tokens, 9), exact, rtol=1e-4)


@pytest.mark.parametrize("shape", [(2, 2), (4, 1)])
def test_rows_divided_among_devices_give_the_same(shape):
    devices = jax.devices()[: np.prod(shape)]
    mesh = jax.make_mesh(shape, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=devices)
    rng = np.random.default_rng(0)
    embedding = jnp.asarray(rng.normal(size=(13, 6)), jnp.float32)
    tokens, dx = rng.integers(0, 13, (4, 20)), jnp.asarray(rng.normal(size=(4, 20, 6)), jnp.float32)

    def gradient(lookup, embedding, tokens):
        return jax.grad(lambda e: jnp.sum(lookup(e, tokens) * dx))(embedding)

    layouts = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    divided = jax.jit(partial(gradient, reproducible_embed(mesh, rows="data")), in_shardings=layouts)
    whole = jax.jit(partial(gradient, reference_embed))
    np.testing.assert_allclose(divided(embedding, tokens), whole(embedding, tokens), atol=1e-5)


def test_on_a_gpu_no_place_is_added_to_twice():
    def embed_of(mesh):
        return select_ops("plain", mesh, jnp.float32).embed

    gpu = SimpleNamespace(devices=np.array([SimpleNamespace(platform="gpu")]), size=1)
    cpu = SimpleNamespace(devices=np.array([SimpleNamespace(platform="cpu")]), size=1)
    assert embed_of(None) is embed_of(cpu) is reference_embed
    tokens = jnp.zeros((2, 8), jnp.int32)

    def scatters(lookup):
        gradient = jax.jit(jax.grad(lambda e: lookup(e, tokens).sum()))
        program = gradient.trace(jnp.ones((5, 4))).lower(lowering_platforms=("cuda",)).as_text()
        return re.findall(r"stablehlo.scatter.*?unique_indices = (true|false)", program, re.DOTALL)

    assert scatters(reference_embed) == ["false"]
    assert scatters(embed_of(gpu)) == ["true"]
