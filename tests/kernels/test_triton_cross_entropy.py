"""The kernel of the loss against the reference, interpreted on a CPU, and lowered for its device."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smollm_jax.kernels.check import check_cross_entropy
from smollm_jax.kernels.triton_cross_entropy import WORDS, fused_cross_entropy
from smollm_jax.model.loss import reference_cross_entropy, summed_nll
from tests.support.lowering import KERNEL, lowered_for_cuda

interpreted = partial(fused_cross_entropy, interpret=True)


def some(words, *, spread=4.0, seed=0):
    rng = np.random.default_rng(seed)
    logits_BCV = jnp.asarray(spread * rng.normal(size=(2, 3, words)), jnp.float32)
    targets_BC = jnp.asarray(rng.integers(0, words, (2, 3)), jnp.int32)
    return logits_BCV, targets_BC, jnp.array([[1, 1, 0], [0.25, 0, -1.5]])


@pytest.mark.parametrize(
    ("words", "spread"),
    [
        (300, 0.1),
        (WORDS, 30.0),
        (50_000, 30.0),
        pytest.param(49_152, 0.1, marks=pytest.mark.slow),
        pytest.param(49_152, 30.0, marks=pytest.mark.slow),
        pytest.param(300, 30.0, marks=pytest.mark.release),
        pytest.param(WORDS, 0.1, marks=pytest.mark.release),
        pytest.param(50_000, 0.1, marks=pytest.mark.release),
    ],
)
def test_the_kernel_gives_the_loss_the_z_loss_and_their_gradient(words, spread):
    logits, targets, weights = some(words, spread=spread)

    def loss(logits, z_loss):
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
        z = z_loss * jnp.sum(weights * jax.nn.logsumexp(logits, axis=-1) ** 2)
        return z - jnp.sum(weights * picked), z

    for z_loss in (0.0, 0.01) if words == 300 else (0.01,):
        (expected, z), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(logits, z_loss)
        for kernel in (interpreted, reference_cross_entropy):
            score = jax.jit(kernel, static_argnums=(3, 4))
            found, found_z, d = score(logits, targets, weights, jnp.float32, z_loss)
            np.testing.assert_allclose(found, expected - z, rtol=2e-5)
            np.testing.assert_allclose(found_z, z, rtol=1e-5)
            np.testing.assert_allclose(d, gradient, atol=1e-5, rtol=1e-5)
            assert score(logits, targets, weights, jnp.bfloat16, z_loss)[2].dtype == jnp.bfloat16


def test_words_far_below_the_rest_and_equal_logits_stay_finite():
    logits = jnp.stack([jnp.full(5_000, -80.0).at[7].set(80.0), jnp.zeros(5_000), jnp.full(5_000, 1e4)])[None]
    nll, _, d = interpreted(logits, jnp.array([[7, 0, 1]]), jnp.ones((1, 3)), jnp.float32)
    np.testing.assert_allclose(nll, 2 * np.log(5_000), rtol=1e-6)
    assert np.isfinite(d).all()


def test_the_sum_over_chunks_and_both_gradients_are_the_reference_s():
    rng = np.random.default_rng(1)
    x_BTD, head_VD = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 5, 8), (70, 8)))
    targets_BT, weights_BT = (
        jnp.asarray(rng.integers(0, 70, (2, 5)), jnp.int32),
        jnp.asarray(rng.normal(size=(2, 5)), jnp.float32),
    )

    def outcome(score):
        def summed(x_BTD, head_VD):
            return 3 * summed_nll(x_BTD, head_VD, targets_BT, weights_BT, 4, score)

        return jax.jit(jax.value_and_grad(summed, argnums=(0, 1)))(x_BTD, head_VD)

    for a, b in zip(
        jax.tree.leaves(outcome(interpreted)), jax.tree.leaves(outcome(reference_cross_entropy)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("words", [49_152, 8_193])
def test_the_kernel_lowers_for_cuda(words):
    shapes = [(1, 64, words), (1, 64), (1, 64)]
    arguments = [
        jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, (jnp.float32, jnp.int32, jnp.float32), strict=True)
    ]
    score = jax.jit(lambda *given: fused_cross_entropy(*given, jnp.bfloat16))
    assert lowered_for_cuda(score, *arguments).count(KERNEL) == 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float32, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_the_check_finds_a_wrong_loss_a_wrong_gradient_and_a_kernel_that_does_not_run(dtype):
    def one_percent_more(*given):
        nll, z, d = reference_cross_entropy(*given)
        return nll * 1.01, z, d

    def without_the_weights(logits, targets, weights, dtype, z_loss):
        return reference_cross_entropy(logits, targets, jnp.sign(weights), dtype, z_loss)

    def without_the_target(logits, targets, weights, dtype, z_loss):
        nll, z, _ = reference_cross_entropy(logits, targets, weights, dtype, z_loss)
        return nll, z, (jax.nn.softmax(logits) * weights[..., None]).astype(dtype)

    def without_the_z_loss(logits, targets, weights, dtype, z_loss):
        _, z, _ = reference_cross_entropy(logits, targets, weights, dtype, z_loss)
        nll, _, d = reference_cross_entropy(logits, targets, weights, dtype)
        return nll, z, d

    assert check_cross_entropy(interpreted, 5_000, dtype) == ""
    wrong = check_cross_entropy(one_percent_more, 5_000, dtype)
    assert wrong == "cross entropy: the loss differs from the reference by 1.00%"
    wrong = check_cross_entropy(without_the_target, 5_000, dtype)
    assert wrong.startswith("cross entropy: its gradient differs from the reference by")
    assert check_cross_entropy(without_the_z_loss, 5_000, dtype).startswith("cross entropy: its gradient differs")
    assert "the loss differs" in check_cross_entropy(without_the_weights, 5_000, dtype)
    assert "does not run here: ValueError" in check_cross_entropy(fused_cross_entropy, 5_000, dtype)
