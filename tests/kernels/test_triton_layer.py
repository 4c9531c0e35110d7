"""A layer with matrices side by side against one with each alone, interpreted on a CPU and lowered for a GPU."""

import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from smollm_jax.config.architecture import MODELS
from smollm_jax.kernels import triton_layer as gpu_layer
from smollm_jax.kernels.check import layer_disagreement as disagreement
from smollm_jax.kernels.select import joined_of
from smollm_jax.kernels.triton_layer import joined
from smollm_jax.model.ops import Joined
from smollm_jax.model.transformer import SmolLM, init_params
from tests.support.lowering import KERNEL, lowered_for_cuda

TINY = replace(MODELS["quickstart"], num_layers=2, vocab_size=100)


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
        np.testing.assert_allclose(a, b, atol=tolerance * float(jnp.abs(b).max()))


@pytest.mark.parametrize("config", [TINY, replace(TINY, hidden_size=96, num_heads=3, num_kv_heads=1, head_dim=32)])
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_gradients_are_those_of_each_matrix_alone(config, remat):
    found = gradients(config, remat=remat, joined=joined(interpret=True))
    assert_close(found, gradients(config), 1e-5)


def test_in_bfloat16_they_are_as_near_to_the_exact_ones():
    exact = jax.tree.leaves(gradients(TINY))

    def far(**compute):
        found = jax.tree.leaves(gradients(TINY, dtype=jnp.bfloat16, **compute))
        return [float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in zip(found, exact, strict=True)]

    for ours, plain in zip(far(joined=joined(interpret=True)), far(), strict=True):
        assert ours < 1.1 * plain < 0.05


@pytest.mark.parametrize("intermediate_size", [gpu_layer.NUMBERS, gpu_layer.NUMBERS + 8, 40])
def test_a_feed_forward_of_any_width(intermediate_size):
    config = replace(TINY, intermediate_size=intermediate_size)
    assert_close(gradients(config, joined=joined(interpret=True)), gradients(config), 1e-5)


def test_tokens_divided_among_devices():
    if len(jax.devices()) < 2:
        pytest.skip("too few devices; the test below has two")
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    found = gradients(TINY, rows=4, joined=joined(mesh, rows="data", interpret=True))
    assert_close(found, gradients(TINY, rows=4), 1e-5)


def test_with_two_devices():
    devices = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-m", "pytest", __file__, "-k", "divided_among"]
    done = subprocess.run(command, env=os.environ | devices, capture_output=True, text=True, check=False)
    assert "1 passed" in done.stdout, done.stdout


def test_the_kernels_lower_for_cuda():
    ours, config = joined(), MODELS["135M"]
    block = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape[1:], w.dtype), _blocks(config))
    x = jax.ShapeDtypeStruct((2, 100, config.hidden_size), jnp.bfloat16)
    angle = jax.ShapeDtypeStruct((2, 100, 1, config.head_dim // 2), jnp.float32)

    def loss(x, block, cos, sin):
        q, k, v = ours.heads(x, *(block["attention"][name] for name in "qkv"), (cos, sin))
        out = ours.feed_forward(x, *(block["mlp"][name] for name in ("gate", "up", "down")))
        return sum(jnp.sum(jnp.square(each.astype(jnp.float32))) for each in (q, k, v, out))

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))
    assert lowered_for_cuda(gradients, x, block, angle, angle).count(KERNEL) == 2


def _blocks(config):
    return jax.eval_shape(lambda: init_params(config, 0))["blocks"]


def test_the_check_at_the_start_finds_wrong_layers_and_kernels_that_do_not_run():
    ours = joined(interpret=True)

    def not_turned(x, q, k, v, rope):
        return ours.heads(x, q, k, v, (jnp.ones_like(rope[0]), jnp.zeros_like(rope[1])))

    def without_gradient_of_up(x, gate, up, down):
        return ours.feed_forward(x, gate, jax.lax.stop_gradient(up), down)

    for dtype in (jnp.float32, jnp.bfloat16):
        assert disagreement(ours, TINY, dtype) == ""
        for wrong in (ours._replace(heads=not_turned), ours._replace(feed_forward=without_gradient_of_up)):
            assert "a layer differs from the plain form" in disagreement(Joined(*wrong), TINY, dtype)
        assert "a layer does not run here: ValueError" in disagreement(joined(), TINY, dtype)


def test_layers_are_joined_where_attention_is_a_gpus_and_no_device_has_a_part_of_a_matrix():
    one, two = SimpleNamespace(size=1), SimpleNamespace(size=2, shape={"tensor": 2})
    assert joined_of("pallas", one) is not None
    assert joined_of("cudnn", SimpleNamespace(size=2, shape={"tensor": 1})) is not None
    assert joined_of("pallas", two) is None
    assert joined_of("plain", one) is None
    assert joined_of("splash", one) is None
