"""Compute a chunk's loss and its logits' gradient in one kernel, for Ampere and later.

Logits are the largest array of a step, and XLA reads them three times. Here a program reads one token's logits
once for their maximum and sum of exponentials (Milakov & Gimelshein 2018). For the gradient, the program reads the
logits again while they are in the cache. Letters as in model/transformer.py. A chunk has M tokens.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from smollm_jax.kernels.triton_call import LOG2_E, triton_call
from smollm_jax.model.attention import MASKED
from smollm_jax.model.loss import z_term

# Words at a time, and warps: few programs at a time on a multiprocessor, so that their logits fit the cache
WORDS, WARPS = 4_096, 16


def fused_cross_entropy(
    logits_BCV: jax.Array, targets_BC: jax.Array, weights_BC: jax.Array, dtype: Any, z_loss: float = 0.0,
    *, interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Return what `reference_cross_entropy` returns: weighted loss in nats, z-loss, and gradient in `dtype`."""
    logits_MV, targets_M = logits_BCV.reshape(-1, logits_BCV.shape[-1]), targets_BC.reshape(-1)
    weights_M = weights_BC.reshape(-1)
    M, V = logits_MV.shape
    words = pl.BlockSpec((None, pl.cdiv(V, WORDS) * WORDS), lambda m: (m, 0))
    tokens = pl.BlockSpec((M,), lambda _: (0,))
    kernel = partial(_kernel, V=V, z_loss=z_loss)
    inputs = [(logits_MV, words), (targets_M, tokens), (weights_M, tokens)]
    outputs = [(weights_M, tokens), (weights_M, tokens), (jax.ShapeDtypeStruct((M, V), dtype), words)]
    nll_M, log_z_M, dlogits_MV = triton_call("loss", kernel, (M,), inputs, outputs, interpret, warps=WARPS)
    return jnp.sum(nll_M), z_term(log_z_M, weights_M, z_loss)[0], dlogits_MV.reshape(logits_BCV.shape)


def _kernel(logits_ref, targets_ref, weights_ref, nll_ref, log_z_ref, dlogits_ref, *, V: int, z_loss: float):
    token = pl.program_id(0)
    target, weight, turns = targets_ref[token], weights_ref[token], pl.cdiv(V, WORDS)

    def of_turn(j):
        words = pl.ds(j * WORDS, WORDS)
        word_W = j * WORDS + jnp.arange(WORDS)
        return words, word_W, plt.load(logits_ref.at[words], mask=word_W < V, other=MASKED)

    def look(j, carry):
        best_W, sum_W = carry
        *_, logit_W = of_turn(j)
        new_W = jnp.maximum(best_W, logit_W)
        return new_W, sum_W * _exp(best_W - new_W) + _exp(logit_W - new_W)

    start = jnp.full(WORDS, MASKED, jnp.float32), jnp.zeros(WORDS, jnp.float32)
    best_W, sum_W = jax.lax.fori_loop(0, turns, look, start)
    best = jnp.max(best_W)
    total = jnp.sum(sum_W * _exp(best_W - best))
    # subtract the maximum first: added to a large one, the logarithm would lose its digits
    log_total = jnp.log2(total) / LOG2_E
    nll_ref[token] = weight * (best - logits_ref[target] + log_total)
    log_z_ref[token] = best + log_total
    pull = 1 + 2 * z_loss * (best + log_total)  # of the z-loss, as in `z_term`

    def write(j, _):
        words, word_W, logit_W = of_turn(j)
        d_W = weight * (pull * _exp(logit_W - best) / total - (word_W == target).astype(jnp.float32))
        plt.store(dlogits_ref.at[words], d_W.astype(dlogits_ref.dtype), mask=word_W < V)

    jax.lax.fori_loop(0, turns, write, None)


def _exp(x: jax.Array) -> jax.Array:
    return jnp.exp2(x * LOG2_E)
