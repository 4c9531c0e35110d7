"""A layer of fused projections against the reference, interpreted on a CPU and lowered for a GPU."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from smollm_jax.config.architecture import MODELS
from smollm_jax.kernels import triton_layer
from smollm_jax.kernels.check import check_layer
from smollm_jax.kernels.triton_layer import fused_layer
from smollm_jax.model.ops import REFERENCE, Ops
from smollm_jax.model.transformer import SmolLM, init_params
from tests.support.lowering import KERNEL, lowered_for_cuda

TINY = replace(MODELS["quickstart"], num_layers=2, vocab_size=100)


def fused(*mesh, **how):
    project_heads, feed_forward = fused_layer(*mesh, **how)
    return Ops(project_heads=project_heads, feed_forward=feed_forward)


def gradients(config, *, rows=2, length=70, dtype=jnp.float32, **compute):
    """Of a weighted sum of the features, over packed rows."""
    params = jax.tree.map(lambda p: p.astype(jnp.float32), init_params(config, 0))
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, config.vocab_size, (rows, length)))
    segment_ids = jnp.asarray(1 + np.cumsum(rng.random((rows, length)) < 0.05, axis=1))
    weights = jnp.asarray(rng.normal(size=(rows, length, config.hidden_size)), jnp.float32)

    def total(params):
        features = SmolLM.from_params(config, params, dtype=dtype, **compute).features(tokens, segment_ids)
        return jnp.sum(weights * features)

    return jax.jit(jax.grad(total))(params)


def assert_close(found, expected, tolerance):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, atol=tolerance * float(np.abs(b).max()))


ODD = replace(TINY, hidden_size=96, num_heads=3, num_kv_heads=1, head_dim=32)


@pytest.mark.parametrize(
    ("config", "remat"),
    [
        (ODD, "none"),
        pytest.param(TINY, "none", marks=pytest.mark.slow),
        pytest.param(TINY, "dots", marks=pytest.mark.slow),
        pytest.param(ODD, "full", marks=pytest.mark.slow),
        pytest.param(ODD, "dots", marks=pytest.mark.release),
        pytest.param(TINY, "full", marks=pytest.mark.release),
    ],
)
@pytest.mark.slow
def test_gradients_are_those_of_each_matrix_alone(config, remat):
    found = gradients(config, remat=remat, ops=fused(interpret=True))
    assert_close(found, gradients(config), 1e-5)


@pytest.mark.slow
def test_in_bfloat16_they_are_as_near_to_the_exact_ones():
    exact = jax.tree.leaves(gradients(TINY))

    def far(**compute):
        found = jax.tree.leaves(gradients(TINY, dtype=jnp.bfloat16, **compute))
        return [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(found, exact, strict=True)]

    for ours, plain in zip(far(ops=fused(interpret=True)), far(), strict=True):
        assert ours < 1.1 * plain < 0.05


@pytest.mark.parametrize(
    "intermediate_size",
    [triton_layer.NUMBERS + 8, *(pytest.param(n, marks=pytest.mark.slow) for n in (triton_layer.NUMBERS, 40))],
)
@pytest.mark.slow
def test_a_feed_forward_of_any_width(intermediate_size):
    config = replace(TINY, intermediate_size=intermediate_size)
    assert_close(gradients(config, ops=fused(interpret=True)), gradients(config), 1e-5)


@pytest.mark.slow
def test_tokens_divided_among_devices():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    found = gradients(TINY, rows=4, ops=fused(mesh, rows="data", interpret=True))
    assert_close(found, gradients(TINY, rows=4), 1e-5)


def test_the_kernels_lower_for_cuda():
    (project_heads, feed_forward), config = fused_layer(), MODELS["135M"]
    block = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape[1:], w.dtype), _blocks(config))
    x = jax.ShapeDtypeStruct((2, 100, config.hidden_size), jnp.bfloat16)
    angle = jax.ShapeDtypeStruct((2, 100, 1, config.head_dim // 2), jnp.float32)

    def loss(x, block, cos, sin):
        linear = REFERENCE.linear
        q, k, v = project_heads(x, *(block["attention"][name] for name in "qkv"), (cos, sin), linear=linear)
        out = feed_forward(x, *(block["mlp"][name] for name in ("gate", "up", "down")), linear=linear)
        return sum(jnp.sum(jnp.square(each.astype(jnp.float32))) for each in (q, k, v, out))

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))
    assert lowered_for_cuda(gradients, x, block, angle, angle).count(KERNEL) == 2


def _blocks(config):
    return jax.eval_shape(lambda: init_params(config, 0))["blocks"]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float32, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_the_check_finds_wrong_layers_and_kernels_that_do_not_run(dtype):
    project_heads, feed_forward = fused_layer(interpret=True)

    def not_rotated(x, q, k, v, rope, *, linear):
        return project_heads(x, q, k, v, (jnp.ones_like(rope[0]), jnp.zeros_like(rope[1])), linear=linear)

    def without_gradient_of_up(x, gate, up, down, *, linear):
        return feed_forward(x, gate, jax.lax.stop_gradient(up), down, linear=linear)

    assert check_layer(project_heads, feed_forward, TINY, dtype) == ""
    assert "a layer: queries differs from the reference" in check_layer(not_rotated, feed_forward, TINY, dtype)
    wrong = check_layer(project_heads, without_gradient_of_up, TINY, dtype)
    assert wrong == "a layer: dup differs from the reference by 100.00%"
    assert "a layer: does not run here: ValueError" in check_layer(*fused_layer(), TINY, dtype)
