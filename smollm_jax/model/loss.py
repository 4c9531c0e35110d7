"""Compute next-token loss in chunks: the (B, T, V) logits never exist whole.

The logits of 32 rows of 2,048 tokens over 49,152 words are 12.9 GB in f32. The logits of a chunk give its share of
the loss and of both gradients in one pass. The gradients are linear in the upstream cotangent. So the forward pass
computes the gradients, and the backward pass only scales them. Returns sums, never means: only the caller knows
the targets of the whole step.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


def targets_of(tokens_BT1: jax.Array, segment_ids_BT1: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return targets (B, T) of rows of T+1 tokens, and their weights in the loss: (B, T) f32.

    A token is a target, of weight 1, if the token before it belongs to the same document. Segment 0 is padding. In
    a document, a token of segment -s instead of s is read, and its weight is 0.
    """
    before, after = segment_ids_BT1[:, :-1], segment_ids_BT1[:, 1:]
    return tokens_BT1[:, 1:], ((jnp.abs(before) == after) & (after > 0)).astype(jnp.float32)


def reference_cross_entropy(
    logits_BCV: jax.Array, targets_BC: jax.Array, weights_BC: jax.Array, dtype: Any, z_loss: float = 0.0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the weighted negative log-likelihood in nats, the z-loss, and the gradient of both in `dtype`.

    The gradient is to the f32 logits. A weight multiplies the loss of its token. It is f32, of either sign. The
    z-loss of a token is `z_loss` times its squared log-partition, which keeps logits small (PaLM, Chowdhery et al.
    2022, section 5).
    """
    nll, log_z_BC = _chunk_nll(logits_BCV, targets_BC, weights_BC)
    probabilities_BCV = jnp.exp(logits_BCV - log_z_BC[..., None])
    is_target_BCV = jax.nn.one_hot(targets_BC, logits_BCV.shape[-1], dtype=jnp.float32)
    z, pull_BC = z_term(log_z_BC, weights_BC, z_loss)
    if z_loss:
        probabilities_BCV *= pull_BC[..., None]
    return nll, z, ((probabilities_BCV - is_target_BCV) * weights_BC[..., None]).astype(dtype)


def z_term(log_z: jax.Array, weights: jax.Array, z_loss: float) -> tuple[jax.Array, jax.Array]:
    """Return the weighted z-loss, and the factor of the probabilities in the gradient to the logits, per token."""
    if not z_loss:
        return jnp.float32(0), jnp.ones_like(log_z)
    return z_loss * jnp.sum(weights * log_z**2), 1 + 2 * z_loss * log_z


def summed_nll(  # noqa: PLR0917 - custom_vjp goes by position
    x_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    chunk_tokens: int,
    cross_entropy: Callable[..., tuple[jax.Array, ...]] = reference_cross_entropy,
) -> jax.Array:
    """Return the negative log-likelihood in nats, summed over the targets by f32 weights: an f32 scalar.

    The arguments are as for `summed_loss`.
    """
    return summed_loss(x_BTD, head_VD, targets_BT, weights_BT, chunk_tokens, cross_entropy, 0.0)[0]


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def summed_loss(  # noqa: PLR0917 - custom_vjp goes by position
    x_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    chunk_tokens: int,
    cross_entropy: Callable[..., tuple[jax.Array, ...]],
    z_loss: float,
) -> tuple[jax.Array, jax.Array]:
    """Return the loss, and the part of it that is z-loss: f32 scalars, summed over the targets by f32 weights.

    The loss is the negative log-likelihood in nats plus the z-loss. The loss alone has a gradient. `x_BTD` has the
    compute dtype, `head_VD` its stored dtype, so that the gradient of the head is not rounded. A chunk has about
    `chunk_tokens` tokens. `cross_entropy` (see `Ops`) is used only if a gradient is wanted.
    """
    del cross_entropy
    head_VD = head_VD.astype(x_BTD.dtype)

    def add(total: Any, chunk: tuple[jax.Array, ...]) -> tuple[Any, None]:
        x_BCD, targets_BC, weights_BC = chunk
        nll, log_z_BC = _chunk_nll(_logits(head_VD, x_BCD), targets_BC, weights_BC)
        return (total[0] + nll, total[1] + z_term(log_z_BC, weights_BC, z_loss)[0]), None

    zero = (jnp.float32(0), jnp.float32(0))
    (nll, z), _ = jax.lax.scan(add, zero, _chunks(chunk_tokens, x_BTD, targets_BT, weights_BT))
    return nll + z, z


def _forward(x_BTD, head_VD, targets_BT, weights_BT, chunk_tokens, cross_entropy, z_loss):  # noqa: PLR0917
    kept_dtype, head_VD = head_VD.dtype, head_VD.astype(x_BTD.dtype)

    def add(carry, chunk):
        total, total_z, dhead_VD = carry
        x_BCD, targets_BC, weights_BC = chunk
        logits_BCV = _logits(head_VD, x_BCD)
        nll, z, dlogits_BCV = cross_entropy(logits_BCV, targets_BC, weights_BC, x_BCD.dtype, z_loss)
        # f32 results: faster products on a CPU. On other devices they are for dhead, a sum over chunks
        dx_BCD = jnp.einsum("BCV,VD->BCD", dlogits_BCV, head_VD, preferred_element_type=jnp.float32)
        dhead_VD += jnp.einsum("BCV,BCD->VD", dlogits_BCV, x_BCD, preferred_element_type=jnp.float32)
        return (total + nll, total_z + z, dhead_VD), dx_BCD.astype(x_BCD.dtype)

    start = (jnp.float32(0), jnp.float32(0), jnp.zeros(head_VD.shape, jnp.float32))
    (nll, z, dhead_VD), dx = jax.lax.scan(add, start, _chunks(chunk_tokens, x_BTD, targets_BT, weights_BT))
    B, T, D = x_BTD.shape
    dx_BTD = dx.swapaxes(0, 1).reshape(B, -1, D)[:, :T]
    return (nll + z, z), (dx_BTD, dhead_VD.astype(kept_dtype))


def _backward(_chunk_tokens, _cross_entropy, _z_loss, gradients, cotangents):
    dx_BTD, dhead_VD = ((x.astype(jnp.float32) * cotangents[0]).astype(x.dtype) for x in gradients)
    return dx_BTD, dhead_VD, None, None


summed_loss.defvjp(_forward, _backward)


def _logits(head_VD: jax.Array, x_BCD: jax.Array) -> jax.Array:
    return jnp.einsum("BCD,VD->BCV", x_BCD, head_VD, preferred_element_type=jnp.float32)


def token_logprobs(
    x_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, chunk_tokens: int
) -> tuple[jax.Array, jax.Array]:
    """Return the log-probability of each target in nats, (B, T) f32, and whether it is the arg-max, (B, T) bool.

    The arrays are as for `summed_nll`. No gradient is meant to be taken: a gradient would keep all logits.
    """
    B, T = targets_BT.shape
    head_VD = head_VD.astype(x_BTD.dtype)
    each = jax.lax.map(
        lambda chunk: target_logprobs(_logits(head_VD, chunk[0]), chunk[1]),
        _chunks(chunk_tokens, x_BTD, targets_BT),
    )
    logprob_BT, is_argmax_BT = (x.swapaxes(0, 1).reshape(B, -1)[:, :T] for x in each)
    return logprob_BT, is_argmax_BT


def target_logprobs(logits_BCV: jax.Array, targets_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return what `token_logprobs` returns, of f32 logits."""
    target_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
    is_argmax_BC = jnp.argmax(logits_BCV, axis=-1) == targets_BC
    return target_BC - jax.nn.logsumexp(logits_BCV, axis=-1), is_argmax_BC


def _chunk_nll(logits_BCV: jax.Array, targets_BC: jax.Array, weights_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the weighted sum, and the log-partition of each token."""
    log_z_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
    target_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
    return jnp.sum(weights_BC * (log_z_BC - target_BC)), log_z_BC


def _chunks(chunk_tokens: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Cut (B, T, ...) into (T/C, B, C, ...). Zeros, which add nothing, fill the last chunk."""
    B, T = arrays[0].shape[:2]
    C = max(1, min(T, chunk_tokens // B))

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, -T % C)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(B, -1, C, *x.shape[2:]).swapaxes(0, 1)

    return tuple(cut(x) for x in arrays)
