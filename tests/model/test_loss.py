"""The chunked loss against the whole one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from smollm_jax.model.loss import summed_nll, targets_of


@pytest.mark.parametrize("chunk", [1, 7, 16, 10_000])
def test_the_chunked_loss_and_its_gradients_equal_the_whole_ones(chunk):
    rng = np.random.default_rng(0)
    x, head = jnp.asarray(rng.normal(size=(3, 11, 8))), jnp.asarray(rng.normal(size=(29, 8)))
    targets, valid = jnp.asarray(rng.integers(0, 29, (3, 11))), jnp.asarray(rng.random((3, 11)) < 0.7)

    def whole(x, head):
        nll = optax.losses.softmax_cross_entropy_with_integer_labels(x @ head.T, targets)
        return jnp.sum(nll * valid)

    def chunked(x, head):
        return summed_nll(x, head, targets, valid, chunk)

    def tripled(x, head):
        return 3 * chunked(x, head)

    value, gradients = jax.jit(jax.value_and_grad(whole, argnums=(0, 1)))(x, head)
    ours, our_gradients = jax.jit(jax.value_and_grad(tripled, argnums=(0, 1)))(x, head)
    np.testing.assert_allclose(ours, 3 * value, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(chunked)(x, head), value, rtol=1e-6)
    for a, b in zip(our_gradients, gradients, strict=True):
        np.testing.assert_allclose(a, 3 * b, atol=1e-5)


def test_the_logits_never_exist_whole():
    shape = {"B": 8, "T": 256, "D": 16, "V": 4_096}
    x = jnp.ones((shape["B"], shape["T"], shape["D"]))
    head = jnp.ones((shape["V"], shape["D"]))
    targets, valid = jnp.zeros(x.shape[:2], int), jnp.ones(x.shape[:2], bool)
    gradient = jax.jit(jax.grad(lambda x, h: summed_nll(x, h, targets, valid, 64), argnums=(0, 1)))
    temporary = gradient.lower(x, head).compile().memory_analysis().temp_size_in_bytes
    assert temporary < shape["B"] * shape["T"] * shape["V"] * 4 / 4


def test_the_gradient_of_the_head_is_not_rounded_to_the_compute_dtype():
    x = jax.random.normal(jax.random.key(0), (2, 9, 16)).astype(jnp.bfloat16)
    head, targets = jax.random.normal(jax.random.key(1), (53, 16)), jnp.arange(18).reshape(2, 9)
    valid = jnp.ones((2, 9), bool)
    nll = jax.jit(lambda x, head: summed_nll(x, head, targets, valid, 1024))
    dx, dhead = jax.jit(jax.grad(nll, argnums=(0, 1)))(x, head)
    assert (dx.dtype, dhead.dtype) == (jnp.bfloat16, jnp.float32)
    assert jnp.any(dhead != dhead.astype(jnp.bfloat16).astype(jnp.float32))
    assert nll(x, head) == nll(x, head.astype(jnp.bfloat16))


def test_eos_is_a_target_and_padding_and_document_starts_are_not():
    tokens = np.array([[5, 6, 0, 7, 8, 0, 0]])
    segment_ids = np.array([[1, 1, 1, 2, 2, 2, 0]])
    targets, valid = targets_of(tokens, segment_ids)
    assert targets[valid].tolist() == [6, 0, 8, 0]
