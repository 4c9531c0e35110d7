"""The chunked loss against the whole one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from smollm_jax.model.loss import reference_cross_entropy, summed_loss, summed_nll, targets_of, token_logprobs


@pytest.mark.parametrize("chunk", [1, 7, 16, 10_000])
def test_the_chunked_loss_and_its_gradients_equal_the_whole_ones(chunk):
    rng = np.random.default_rng(0)
    x, head = jnp.asarray(rng.normal(size=(3, 11, 8))), jnp.asarray(rng.normal(size=(29, 8)))
    targets, weights = jnp.asarray(rng.integers(0, 29, (3, 11))), jnp.asarray(rng.normal(size=(3, 11)))
    weights *= rng.random((3, 11)) < 0.7

    def whole(x, head):
        nll = optax.losses.softmax_cross_entropy_with_integer_labels(x @ head.T, targets)
        return jnp.sum(nll * weights)

    def chunked(x, head):
        return summed_nll(x, head, targets, weights, chunk)

    def tripled(x, head):
        return 3 * chunked(x, head)

    value, gradients = jax.jit(jax.value_and_grad(whole, argnums=(0, 1)))(x, head)
    ours, our_gradients = jax.jit(jax.value_and_grad(tripled, argnums=(0, 1)))(x, head)
    np.testing.assert_allclose(ours, 3 * value, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(chunked)(x, head), value, rtol=1e-6)
    for a, b in zip(our_gradients, gradients, strict=True):
        np.testing.assert_allclose(a, 3 * b, atol=1e-5)


@pytest.mark.parametrize("chunk", [7, pytest.param(10_000, marks=pytest.mark.release)])
def test_the_z_loss_and_its_gradients_equal_the_formula_s(chunk):
    rng = np.random.default_rng(0)
    x, head = jnp.asarray(rng.normal(size=(3, 11, 8))), jnp.asarray(rng.normal(size=(29, 8)))
    targets, weights = jnp.asarray(rng.integers(0, 29, (3, 11))), jnp.asarray(rng.normal(size=(3, 11)))

    def formula(x, head):
        nll = optax.losses.softmax_cross_entropy_with_integer_labels(x @ head.T, targets)
        z = 0.3 * jax.nn.logsumexp(x @ head.T, axis=-1) ** 2
        return jnp.sum((nll + z) * weights), jnp.sum(z * weights)

    def chunked(x, head):
        return summed_loss(x, head, targets, weights, chunk, reference_cross_entropy, 0.3)

    expected, gradients = jax.jit(jax.value_and_grad(formula, argnums=(0, 1), has_aux=True))(x, head)
    ours, our_gradients = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1), has_aux=True))(x, head)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(chunked)(x, head), expected, rtol=1e-5)
    for a, b in zip(our_gradients, gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-5)


def test_the_logits_never_exist_whole():
    shape = {"B": 8, "T": 256, "D": 16, "V": 4_096}
    x = jnp.ones((shape["B"], shape["T"], shape["D"]))
    head = jnp.ones((shape["V"], shape["D"]))
    targets, weights = jnp.zeros(x.shape[:2], int), jnp.ones(x.shape[:2])
    gradient = jax.jit(jax.grad(lambda x, h: summed_nll(x, h, targets, weights, 64), argnums=(0, 1)))
    temporary = gradient.lower(x, head).compile().memory_analysis().temp_size_in_bytes
    assert temporary < shape["B"] * shape["T"] * shape["V"] * 4 / 4
    forward = jax.jit(lambda x, h: token_logprobs(x, h, targets, 64))
    temporary = forward.lower(x, head).compile().memory_analysis().temp_size_in_bytes
    assert temporary < shape["B"] * shape["T"] * shape["V"] * 4 / 4


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_the_chunked_log_probabilities_equal_the_whole_ones(chunk):
    rng = np.random.default_rng(1)
    x, head = jnp.asarray(rng.normal(size=(3, 11, 8))), jnp.asarray(rng.normal(size=(29, 8)))
    logits = x @ head.T
    likeliest = jnp.argmax(logits, axis=-1)
    targets = jnp.where(rng.random((3, 11)) < 0.5, likeliest, rng.integers(0, 29, (3, 11)))
    logprobs, is_argmax = jax.jit(lambda x, head: token_logprobs(x, head, targets, chunk))(x, head)
    whole = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(logprobs, whole, rtol=1e-5, atol=1e-6)
    assert (is_argmax == (targets == likeliest)).all()
    assert 0 < is_argmax.sum() < is_argmax.size
    ones = jnp.ones(targets.shape)
    np.testing.assert_allclose(-jnp.sum(logprobs), summed_nll(x, head, targets, ones, chunk), rtol=1e-6)


def test_the_gradient_of_the_head_is_not_rounded_to_the_compute_dtype():
    x = jax.random.normal(jax.random.key(0), (2, 9, 16)).astype(jnp.bfloat16)
    head, targets = jax.random.normal(jax.random.key(1), (53, 16)), jnp.arange(18).reshape(2, 9)
    weights = jnp.ones((2, 9))
    nll = jax.jit(lambda x, head: summed_nll(x, head, targets, weights, 1024))
    dx, dhead = jax.jit(jax.grad(nll, argnums=(0, 1)))(x, head)
    assert (dx.dtype, dhead.dtype) == (jnp.bfloat16, jnp.float32)
    assert jnp.any(dhead != dhead.astype(jnp.bfloat16).astype(jnp.float32))
    assert nll(x, head) == nll(x, head.astype(jnp.bfloat16))


def test_eos_is_a_target_and_padding_and_document_starts_are_not():
    tokens = np.array([[5, 6, 0, 7, 8, 0, 0]])
    segment_ids = np.array([[1, 1, 1, 2, 2, 2, 0]])
    targets, weights = targets_of(tokens, segment_ids)
    assert weights.dtype == jnp.float32
    assert targets[weights == 1].tolist() == [6, 0, 8, 0]
    assert weights.sum() == 4


def test_a_token_of_a_negative_segment_is_read_and_is_no_target():
    tokens = np.array([[5, 6, 9, 7, 8, 3, 0]])
    segment_ids = np.array([[-1, -1, 1, 1, -2, 2, 0]])
    targets, weights = targets_of(tokens, segment_ids)
    assert targets[weights == 1].tolist() == [9, 7, 3]
