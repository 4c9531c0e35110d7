"""Choose the next token from logits: penalty, temperature, filters, then one draw.

The filters are top-k, top-p and min-p. The rules and their order match transformers, ties included. Top-k keeps
all tokens that tie with the last kept one. Top-p keeps only as many ties as it needs, the highest ids. Bisection
over the bits of a float finds the threshold exactly, thirty times faster than a sort on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from smollm_jax.model.attention import MASKED
from smollm_jax.runtime.errors import require

SMALLEST_TEMPERATURE = 1e-30  # below this a float32 quotient is no longer finite
BANNED_BLOCK, NO_ID = 8, 2**31 - 1
DRAW_BLOCK = 128  # probabilities are summed in blocks of tokens first, so that the draw needs no long cumsum


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings that choose the next token. Raises `UserError` naming a setting out of range."""

    max_new_tokens: int = 128
    min_new_tokens: int = 0  # 1: a first token that is a stop id is drawn again without them, so a text goes on
    temperature: float = 0.0  # 0 takes the likeliest token (greedy)
    top_k: int = 0  # keep the k likeliest tokens (0: all)
    top_p: float = 1.0  # keep the likeliest tokens that make up this probability (Holtzman et al. 2020)
    min_p: float = 0.0  # keep tokens at least this likely relative to the likeliest (Nguyen et al. 2024)
    # divides positive and multiplies negative scores of tokens already in the text (Keskar et al. 2019)
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require(self.max_new_tokens > 0, f"max_new_tokens={self.max_new_tokens} must be at least 1")
        least = self.min_new_tokens
        require(least in (0, 1), f"min_new_tokens={least} must be 0 or 1")
        require(0 <= self.temperature < np.inf, f"temperature={self.temperature} must be 0 or more")
        require(self.top_k >= 0, f"top_k={self.top_k} must be 0 (all) or more")
        require(0 < self.top_p <= 1, f"top_p={self.top_p} must lie in (0, 1]")
        require(0 <= self.min_p <= 1, f"min_p={self.min_p} must lie in [0, 1]")
        penalty = self.repetition_penalty
        require(0 < penalty < np.inf, f"repetition_penalty={penalty} must be above 0")
        require(0 <= self.seed < 2**32, f"seed={self.seed} must lie in [0, 2**32)")


class Score(NamedTuple):
    """What a model expected at a token: its log-probability, and the likeliest ids there with theirs."""

    logprob: float
    is_likeliest: bool
    likeliest: list[tuple[int, float]]


class SamplingArrays(NamedTuple):
    """The numbers of a `Sampling` as device values: a new value compiles nothing."""

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    repetition_penalty: Any
    seed: Any  # one for all rows of a batch, or one per row (B,)
    banned: Any  # ids that the first token may not be; padded, so that their number compiles nothing

    @classmethod
    def from_sampling(cls, sampling: Sampling, seeds: Sequence[int] | None = None) -> SamplingArrays:
        size = -len(sampling.stop_ids) % BANNED_BLOCK + len(sampling.stop_ids)
        banned = np.full(max(size, BANNED_BLOCK), NO_ID, np.int32)
        if sampling.min_new_tokens:
            banned[: len(sampling.stop_ids)] = sampling.stop_ids
        return cls(
            np.float32(sampling.temperature or 1.0), np.int32(min(sampling.top_k, 2**31 - 1)),
            np.float32(sampling.top_p), np.float32(sampling.min_p), np.float32(sampling.repetition_penalty),
            np.asarray(sampling.seed if seeds is None else seeds, np.uint32), banned,
        )  # fmt: skip


def choose_token(
    logits_BV: jax.Array, seen_BV: jax.Array, position_B: jax.Array, arrays: SamplingArrays, greedy: bool
) -> jax.Array:
    """Choose the next token (B,) from f32 logits. The penalty applies to the tokens that `seen_BV` marks."""
    logits_BV = penalised(logits_BV, seen_BV, arrays.repetition_penalty)
    if greedy:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    # the key depends on seed and position alone: chunks and other rows of the batch do not change a text
    seed_B = jnp.broadcast_to(arrays.seed, position_B.shape)
    keys_B = jax.vmap(jax.random.fold_in)(jax.vmap(jax.random.key)(seed_B), position_B)
    return draw(filtered(logits_BV, arrays), jax.vmap(jax.random.uniform)(keys_B))


def choose_first(
    logits_BV: jax.Array, seen_BV: jax.Array, position_B: jax.Array, arrays: SamplingArrays, greedy: bool
) -> jax.Array:
    """Choose as `choose_token`, and once more without the banned ids if one of them was chosen.

    A token that is not banned stays as drawn, so a text that is continued reads on as if it had never stopped.
    """

    def again(_: jax.Array) -> jax.Array:
        others_BV = logits_BV.at[:, arrays.banned].set(MASKED, mode="drop")
        return choose_token(others_BV, seen_BV, position_B, arrays, greedy)

    token_B = choose_token(logits_BV, seen_BV, position_B, arrays, greedy)
    banned_B = jnp.isin(token_B, arrays.banned)
    return jnp.where(banned_B, jax.lax.cond(banned_B.any(), again, lambda token_B: token_B, token_B), token_B)


def penalised(logits_BV: jax.Array, seen_BV: jax.Array, penalty: jax.Array) -> jax.Array:
    """Apply the repetition penalty to the logits of tokens already in the text."""
    return jnp.where(seen_BV, jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def filtered(logits_BV: jax.Array, arrays: SamplingArrays) -> jax.Array:
    """Divide by the temperature, shift the best score to 0. Masks what top-k, top-p or min-p rules out."""
    best_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    scores_BV = (logits_BV - best_B1) / jnp.maximum(arrays.temperature, SMALLEST_TEMPERATURE)

    def top_k(scores_BV: jax.Array) -> jax.Array:
        order_BV = _order(scores_BV)
        lowest_B1 = _threshold(order_BV, jnp.ones_like(scores_BV), arrays.top_k.astype(jnp.float32), bits=32)
        return jnp.where(order_BV >= lowest_B1, scores_BV, MASKED)

    def top_p(scores_BV: jax.Array) -> jax.Array:
        p_BV, order_BV = jnp.exp(scores_BV), _order(scores_BV)
        wanted_B, ids_V = arrays.top_p * _sum(p_BV), jnp.arange(scores_BV.shape[-1], dtype=jnp.uint32)
        lowest_B1 = _threshold(order_BV, p_BV, wanted_B, bits=32)
        above_BV, tied_BV = order_BV > lowest_B1, order_BV == lowest_B1
        wanted_B -= _sum(jnp.where(above_BV, p_BV, 0))
        lowest_id_B1 = _threshold(ids_V[None], jnp.where(tied_BV, p_BV, 0), wanted_B, bits=len(ids_V).bit_length())
        return jnp.where(above_BV | (tied_BV & (ids_V[None] >= lowest_id_B1)), scores_BV, MASKED)

    for wanted, rule in ((arrays.top_k > 0, top_k), (arrays.top_p < 1, top_p)):
        scores_BV = jax.lax.cond(wanted, rule, lambda scores_BV: scores_BV, scores_BV)
    keep_BV = (scores_BV >= jnp.log(arrays.min_p)) & (scores_BV > MASKED)
    return jnp.where(keep_BV | (scores_BV == 0), scores_BV, MASKED)


def draw(scores_BV: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """Draw tokens (B,) from softmax(scores): the first whose cumulative probability passes `uniform_B`."""
    B, V = scores_BV.shape
    p_BV = jnp.pad(jnp.exp(scores_BV), ((0, 0), (0, -V % DRAW_BLOCK)))
    p_BXY = p_BV.reshape(B, -1, DRAW_BLOCK)
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
    """Return the first index (B,) with probability not 0 whose running sum passes the target."""
    possible_BX = p_BX > 0
    passed_BX = (end_BX > target_B1) & possible_BX
    last_B = possible_BX.shape[-1] - 1 - jnp.argmax(possible_BX[:, ::-1], axis=-1)
    # rounding may leave the target slightly above the last sum
    return jnp.where(passed_BX.any(axis=-1), jnp.argmax(passed_BX, axis=-1), last_B)


def _order(scores_BV: jax.Array) -> jax.Array:
    """Return uint32 of the order of the f32 scores. As differences to the best, hardly any is -0."""
    bits_BV = jax.lax.bitcast_convert_type(scores_BV, jnp.uint32)
    return jnp.where(bits_BV >> 31 == 1, ~bits_BV, bits_BV | jnp.uint32(1 << 31))


def _threshold(order_BV: jax.Array, mass_BV: jax.Array, wanted_B: jax.Array, *, bits: int) -> jax.Array:
    """Return the highest `bits`-bit threshold (B, 1) on `order_BV` with enough mass at or above."""

    def raise_bit(i: jax.Array, low_B: jax.Array) -> jax.Array:
        higher_B = low_B | (jnp.uint32(1) << (bits - 1 - i).astype(jnp.uint32))
        mass_B = _sum(jnp.where(order_BV >= higher_B[:, None], mass_BV, 0))
        return jnp.where(mass_B >= wanted_B, higher_B, low_B)

    return jax.lax.fori_loop(0, bits, raise_bit, jnp.zeros(len(mass_BV), jnp.uint32))[:, None]


def _sum(x: jax.Array) -> jax.Array:
    """Sum over the last dim by a matmul with ones. XLA:CPU's own sum adds one number at a time."""
    return jnp.einsum("...V,V->...", x, jnp.ones(x.shape[-1]), precision=jax.lax.Precision.HIGHEST)
