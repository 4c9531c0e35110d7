"""How the next token is chosen from logits: penalty, temperature, top-k, top-p, min-p, then one draw.

The rules and their order are those of transformers. None of them sorts the vocabulary: what top-k and top-p
keep is everything at or above a threshold, and that is found by bisection over the bits of a float, which is
exact and, on a CPU, thirty times as fast as a sort. Tokens that tie with the last one kept are kept too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from smollm_jax.runtime.errors import require

MASKED = -1e30
SMALLEST_TEMPERATURE = 1e-30  # below, a float32 quotient is not finite any more
DRAW_BLOCK = 128  # tokens whose probabilities are summed first, so that the draw needs no long cumsum


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen; temperature 0 takes the likeliest."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    """Keep the k likeliest; 0: all."""
    top_p: float = 1.0
    """Keep the likeliest that make up this probability (Holtzman et al. 2020)."""
    min_p: float = 0.0
    """Keep those at least this likely relative to the likeliest (Nguyen et al. 2024)."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative scores of tokens already there (Keskar et al. 2019)."""
    seed: int = 0
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require(self.max_new_tokens > 0, f"max_new_tokens={self.max_new_tokens} must be at least 1")
        require(0 <= self.temperature < np.inf, f"temperature={self.temperature} must be 0 or more")
        require(self.top_k >= 0, f"top_k={self.top_k} must be 0 (all) or more")
        require(0 < self.top_p <= 1, f"top_p={self.top_p} must lie in (0, 1]")
        require(0 <= self.min_p <= 1, f"min_p={self.min_p} must lie in [0, 1]")
        penalty = self.repetition_penalty
        require(0 < penalty < np.inf, f"repetition_penalty={penalty} must be above 0")
        require(0 <= self.seed < 2**32, f"seed={self.seed} must lie in [0, 2**32)")


class SamplingArrays(NamedTuple):
    """The numbers of a `Sampling` as device values: changing one compiles nothing."""

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    repetition_penalty: Any
    seed: Any

    @classmethod
    def from_sampling(cls, sampling: Sampling) -> SamplingArrays:
        return cls(
            np.float32(sampling.temperature or 1.0), np.int32(min(sampling.top_k, 2**31 - 1)),
            np.float32(sampling.top_p), np.float32(sampling.min_p), np.float32(sampling.repetition_penalty),
            np.uint32(sampling.seed),
        )  # fmt: skip


def choose(
    logits_BV: jax.Array, seen_BV: jax.Array, position_B: jax.Array, knobs: SamplingArrays, greedy: bool
) -> jax.Array:
    """The token (B,) that follows, of f32 logits; `seen_BV` marks tokens already there, for the penalty."""
    logits_BV = penalised(logits_BV, seen_BV, knobs.repetition_penalty)
    if greedy:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    # the place in the row makes the key: the same text whatever the chunks and whoever shares the batch
    keys_B = jax.vmap(partial(jax.random.fold_in, jax.random.key(knobs.seed)))(position_B)
    return draw(filtered(logits_BV, knobs), jax.vmap(jax.random.uniform)(keys_B))


def penalised(logits_BV: jax.Array, seen_BV: jax.Array, penalty: jax.Array) -> jax.Array:
    """Logits with those of tokens already there made less likely."""
    return jnp.where(seen_BV, jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def filtered(logits_BV: jax.Array, knobs: SamplingArrays) -> jax.Array:
    """Scores over temperature, the best at 0, with those that top-k, top-p or min-p rules out at `MASKED`."""
    best_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    scores_BV = (logits_BV - best_B1) / jnp.maximum(knobs.temperature, SMALLEST_TEMPERATURE)
    rules = ((knobs.top_k > 0, _top_k), (knobs.top_p < 1, _top_p))
    for wanted, rule in rules:
        scores_BV = jax.lax.cond(wanted, partial(rule, knobs), lambda scores: scores, scores_BV)
    keep_BV = (scores_BV >= jnp.log(knobs.min_p)) & (scores_BV > MASKED)
    return jnp.where(keep_BV | (scores_BV == 0), scores_BV, MASKED)


def draw(scores_BV: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """A token (B,) with probability softmax(scores), by where `uniform_B` in [0, 1) falls in their sum."""
    B, V = scores_BV.shape
    blocks = -(-V // DRAW_BLOCK)
    p_BV = jnp.pad(jnp.exp(scores_BV), ((0, 0), (0, blocks * DRAW_BLOCK - V)))
    p_BXY = p_BV.reshape(B, blocks, DRAW_BLOCK)
    block_BX = _sum(p_BXY)
    end_BX = jnp.cumsum(block_BX, axis=-1)
    target_B1 = uniform_B[:, None] * end_BX[:, -1:]
    block_B = _first(end_BX, block_BX, target_B1)
    row_B = jnp.arange(B)
    start_B = end_BX[row_B, block_B] - block_BX[row_B, block_B]
    p_BY = p_BXY[row_B, block_B]
    token_B = _first(jnp.cumsum(p_BY, axis=-1), p_BY, target_B1 - start_B[:, None])
    return (block_B * DRAW_BLOCK + token_B).astype(jnp.int32)


def _first(end_BX: jax.Array, p_BX: jax.Array, target_B1: jax.Array) -> jax.Array:
    """The first index (B,) whose running sum passes the target; never one without probability."""
    possible_BX = p_BX > 0
    passed_BX = (end_BX > target_B1) & possible_BX
    last_B = possible_BX.shape[-1] - 1 - jnp.argmax(possible_BX[:, ::-1], axis=-1)
    # rounding may leave the target a hair past the last sum
    return jnp.where(passed_BX.any(axis=-1), jnp.argmax(passed_BX, axis=-1), last_B)


def _top_k(knobs: SamplingArrays, scores_BV: jax.Array) -> jax.Array:
    return _at_least(scores_BV, jnp.ones_like(scores_BV), knobs.top_k.astype(jnp.float32))


def _top_p(knobs: SamplingArrays, scores_BV: jax.Array) -> jax.Array:
    p_BV = jnp.exp(scores_BV)
    return _at_least(scores_BV, p_BV, knobs.top_p * _sum(p_BV))


def _at_least(scores_BV: jax.Array, mass_BV: jax.Array, wanted_B: jax.Array) -> jax.Array:
    """The fewest highest scores whose mass is at least `wanted_B`, the rest `MASKED`."""
    order_BV = _ordered(scores_BV)

    def enough(threshold_B: jax.Array) -> jax.Array:
        return _sum(jnp.where(order_BV >= threshold_B[:, None], mass_BV, 0)) >= wanted_B

    threshold_B = _highest(enough, scores_BV.shape[0])
    return jnp.where(order_BV >= threshold_B[:, None], scores_BV, MASKED)


def _ordered(x: jax.Array) -> jax.Array:
    """uint32 in the order of the f32 `x`, which are differences to the best: hardly any is -0."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _highest(enough: Callable[[jax.Array], jax.Array], batch_size: int) -> jax.Array:
    """The highest uint32 (B,) for which `enough` holds, given that it holds for all below; else 0."""

    def bit(i: jax.Array, low_B: jax.Array) -> jax.Array:
        higher_B = low_B | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(enough(higher_B), higher_B, low_B)

    return jax.lax.fori_loop(0, 32, bit, jnp.zeros(batch_size, jnp.uint32))


def _sum(x: jax.Array) -> jax.Array:
    """Sum over the last dim as a product with ones: XLA's own sum adds one number at a time on a CPU."""
    return jnp.einsum("...V,V->...", x, jnp.ones(x.shape[-1]), precision=jax.lax.Precision.HIGHEST)
