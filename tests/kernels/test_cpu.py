"""The forms for XLA:CPU against the reference."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smollm_jax.config.architecture import ModelConfig
from smollm_jax.kernels.cpu import residuals_as_bits, wide_linear
from smollm_jax.model.ops import REFERENCE, Ops, reference_linear
from smollm_jax.model.transformer import SmolLM, init_params

TINY = ModelConfig(
    vocab_size=61, hidden_size=24, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=40,
    rope_theta=10_000.0,
)  # fmt: skip


@pytest.mark.parametrize("letters", ["BTD,DNH->BTNH", "BTNH,NHD->BTD", "BTD,DF->BTF"])
def test_a_wide_linear_and_its_gradients_are_rounded_once_at_most(letters):
    sizes = dict(zip("BTDFNH", (2, 64, 96, 80, 4, 24), strict=True))
    of_x, of_weights, of_y = letters.replace("->", ",").split(",")
    x, weights, dy = (
        jax.random.normal(jax.random.key(i), [sizes[letter] for letter in of])
        for i, of in enumerate((of_x, of_weights, of_y))
    )

    @partial(jax.jit, static_argnums=0)
    def outcome(linear, x, weights, dy):
        y, pull = jax.vjp(lambda x, weights: linear(letters, x, weights), x, weights)
        return y, *pull(dy)

    for wide, plain in zip(
        outcome(wide_linear, x, weights, dy), outcome(reference_linear, x, weights, dy), strict=True
    ):
        assert wide.dtype == plain.dtype == jnp.float32
        np.testing.assert_allclose(wide, plain, atol=1e-4)

    short = [array.astype(jnp.bfloat16) for array in (x, weights, dy)]
    exact = outcome(reference_linear, *(array.astype(jnp.float32) for array in short))
    y, dx, dweights = outcome(wide_linear, short[0], weights, short[2])
    for wide, true in ((y, exact[0]), (dx, exact[1])):
        assert wide.dtype == jnp.bfloat16
        np.testing.assert_allclose(wide.astype(jnp.float32), true, rtol=2**-8, atol=1e-4)
    assert dweights.dtype == jnp.float32
    np.testing.assert_allclose(dweights, exact[2], atol=1e-4)


@pytest.mark.parametrize(
    ("linear", "remat"),
    [
        (wide_linear, "none"),
        pytest.param(reference_linear, "none", marks=pytest.mark.slow),
        pytest.param(wide_linear, "dots", marks=pytest.mark.slow),
        pytest.param(wide_linear, "full", marks=pytest.mark.slow),
        pytest.param(reference_linear, "dots", marks=pytest.mark.release),
        pytest.param(reference_linear, "full", marks=pytest.mark.release),
    ],
)
@pytest.mark.slow
def test_residuals_kept_as_bits_give_the_same_gradients(remat, linear):
    params, tokens = init_params(TINY, 0), np.random.default_rng(1).integers(0, 61, (2, 11)).astype(np.int32)
    segment_ids = jnp.asarray([[1] * 4 + [2] * 7, [1] * 11])

    def compiled(wrap_layer):
        def loss(p):
            ops = Ops(linear=linear, wrap_layer=wrap_layer)
            model = SmolLM.from_params(TINY, p, dtype=jnp.bfloat16, remat=remat, ops=ops)
            return jnp.square(model(tokens, segment_ids)).mean()

        return jax.jit(jax.value_and_grad(loss)).lower(params).compile()

    plain, bits = compiled(REFERENCE.wrap_layer), compiled(residuals_as_bits)
    stack = f"u16[{TINY.num_layers},"
    assert stack in bits.as_text()
    assert stack not in plain.as_text()
    (loss, gradients), (same, plainly) = bits(params), plain(params)
    assert loss == same
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(plainly), strict=True):
        largest = float(np.abs(theirs).max())
        assert largest > 0
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=0.01 * largest)
