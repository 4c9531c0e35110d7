"""Choose the next token from logits: bias, penalties, temperature, filters, then one draw.

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
MOST_BIASED = 300  # ids with a bias, as in OpenAI's API
ALTERNATIVES = 5  # likeliest tokens that come with the score of a token
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
    # taken off the score of a token that was generated before: once, and once per time. As in OpenAI's API the
    # prompt does not count
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # ids, and what is added to their scores first of all
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False  # a completer then adds no stop ids

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
        for name in ("presence_penalty", "frequency_penalty"):
            require(np.isfinite(getattr(self, name)), f"{name}={getattr(self, name)} must be finite")
        biased = len(self.logit_bias)
        require(biased <= MOST_BIASED, f"logit_bias has {biased:,} ids; the most is {MOST_BIASED}")
        require(all(np.isfinite(bias) for _, bias in self.logit_bias), "logit_bias must be finite")
        require(0 <= self.seed < 2**32, f"seed={self.seed} must lie in [0, 2**32)")


class Score(NamedTuple):
    """What a model expected at a token: its log-probability, and the likeliest ids there with theirs."""

    logprob: float
    is_likeliest: bool
    likeliest: list[tuple[int, float]]


class SamplingArrays(NamedTuple):
    """The numbers of a `Sampling` as device values: a new value compiles nothing.

    Each has a row for all texts of a batch (1, ...), or a row per text (B, ...).
    """

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    repetition_penalty: Any
    presence_penalty: Any
    frequency_penalty: Any
    seed: Any
    is_greedy: Any
    biased: Any  # ids (B, X), and the biases of these. Padded, so that their number compiles nothing
    bias: Any
    banned: Any  # ids (Y,) that the first token may not be, padded too

    @classmethod
    def from_sampling(cls, sampling: Sampling, seeds: Sequence[int] | None = None) -> SamplingArrays:
        size = -len(sampling.stop_ids) % BANNED_BLOCK + len(sampling.stop_ids)
        banned = np.full(max(size, BANNED_BLOCK), NO_ID, np.int32)
        if sampling.min_new_tokens:
            banned[: len(sampling.stop_ids)] = sampling.stop_ids
        biased, bias = np.full((1, MOST_BIASED), NO_ID, np.int32), np.zeros((1, MOST_BIASED), np.float32)
        for i, (token, value) in enumerate(sampling.logit_bias):
            biased[0, i], bias[0, i] = token, value

        def row(value: float) -> np.ndarray:
            return np.asarray([value], np.float32)

        return cls(
            temperature=row(sampling.temperature or 1.0),
            top_k=np.asarray([min(sampling.top_k, 2**31 - 1)], np.int32),
            top_p=row(sampling.top_p),
            min_p=row(sampling.min_p),
            repetition_penalty=row(sampling.repetition_penalty),
            presence_penalty=row(sampling.presence_penalty),
            frequency_penalty=row(sampling.frequency_penalty),
            seed=np.asarray([sampling.seed] if seeds is None else seeds, np.uint32),
            is_greedy=np.asarray([sampling.temperature == 0]),
            biased=biased,
            bias=bias,
            banned=banned,
        )

    @classmethod
    def stacked(cls, rows: Sequence[SamplingArrays]) -> SamplingArrays:
        """Return the arrays of rows, each of a single text, for later tokens than the first."""
        together = cls(*(np.concatenate(values) for values in zip(*rows, strict=True)))
        return together._replace(banned=np.full(BANNED_BLOCK, NO_ID, np.int32))


class Past(NamedTuple):
    """The tokens that penalties look at: those in the prompt (B, V), and how often others were generated."""

    in_prompt_BV: Any
    counts_BV: Any

    def plus(self, token_B: jax.Array) -> Past:
        """Return the past with another generated token in each row."""
        counts_BV = self.counts_BV.at[jnp.arange(len(token_B)), token_B].add(1)
        return Past(self.in_prompt_BV, counts_BV)


def choose_token(
    logits_BV: jax.Array, past: Past, position_B: jax.Array, arrays: SamplingArrays, greedy: bool
) -> jax.Array:
    """Choose the next token (B,) from f32 logits. `greedy` says that all rows are, which saves the draw."""
    logits_BV = adjusted(logits_BV, past, arrays)

    def likeliest(_: Any = None) -> jax.Array:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    if greedy:
        return likeliest()
    # the key depends on seed and position alone: chunks and other rows of the batch do not change a text
    seed_B = jnp.broadcast_to(arrays.seed, position_B.shape)
    keys_B = jax.vmap(jax.random.fold_in)(jax.vmap(jax.random.key)(seed_B), position_B)
    token_B = draw(filtered(logits_BV, arrays), jax.vmap(jax.random.uniform)(keys_B))
    mixed = lambda: jnp.where(arrays.is_greedy, likeliest(), token_B)  # noqa: E731
    return jax.lax.cond(arrays.is_greedy.any(), mixed, lambda: token_B)


def choose_first(
    logits_BV: jax.Array, past: Past, position_B: jax.Array, arrays: SamplingArrays, greedy: bool
) -> jax.Array:
    """Choose as `choose_token`, and once more without the banned ids if one of them was chosen.

    A token that is not banned stays as drawn, so a text that is continued reads on as if it had never stopped.
    """

    def again(_: jax.Array) -> jax.Array:
        others_BV = logits_BV.at[:, arrays.banned].set(MASKED, mode="drop")
        return choose_token(others_BV, past, position_B, arrays, greedy)

    token_B = choose_token(logits_BV, past, position_B, arrays, greedy)
    banned_B = jnp.isin(token_B, arrays.banned)
    return jnp.where(banned_B, jax.lax.cond(banned_B.any(), again, lambda token_B: token_B, token_B), token_B)


def scores_of(logits_BV: jax.Array, token_B: jax.Array) -> tuple[jax.Array, ...]:
    """Return the arrays of a `Score` per row, from f32 logits before any rule of sampling.

    Log-probabilities (B,), whether the token is the arg-max (B,), likeliest ids (B, A) and theirs (B, A).
    """
    log_z_B1 = jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)
    token_B1 = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1) - log_z_B1
    best_BA, ids_BA = jax.lax.top_k(logits_BV, min(ALTERNATIVES, logits_BV.shape[-1]))
    return token_B1[:, 0], jnp.argmax(logits_BV, axis=-1) == token_B, ids_BA, best_BA - log_z_B1


def as_scores(arrays: Sequence[Any], count: int) -> list[Score]:
    """Return the first `count` scores of what `scores_of` gives, as numbers of Python."""
    logprobs, are_best, ids_TA, logprobs_TA = (np.asarray(one)[:count].tolist() for one in arrays)
    likeliest = [list(zip(*pair, strict=True)) for pair in zip(ids_TA, logprobs_TA, strict=True)]
    return [Score(*one) for one in zip(logprobs, are_best, likeliest, strict=True)]


def adjusted(logits_BV: jax.Array, past: Past, arrays: SamplingArrays) -> jax.Array:
    """Add the biases to the logits, then apply the penalties."""

    def with_bias(logits_BV: jax.Array) -> jax.Array:
        rows_B1 = jnp.arange(len(logits_BV))[:, None]
        biased, bias = (jnp.broadcast_to(x, (len(logits_BV), MOST_BIASED)) for x in (arrays.biased, arrays.bias))
        return logits_BV.at[rows_B1, biased].add(bias, mode="drop")

    logits_BV = jax.lax.cond((arrays.bias != 0).any(), with_bias, lambda logits_BV: logits_BV, logits_BV)
    made_BV = past.counts_BV > 0
    logits_BV = penalised(logits_BV, past.in_prompt_BV | made_BV, arrays.repetition_penalty)
    frequency_B1, presence_B1 = arrays.frequency_penalty[:, None], arrays.presence_penalty[:, None]
    return logits_BV - jnp.where(made_BV, past.counts_BV * frequency_B1 + presence_B1, 0.0)


def penalised(logits_BV: jax.Array, seen_BV: jax.Array, penalty_B: jax.Array) -> jax.Array:
    """Apply the repetition penalty to the logits of tokens already in the text."""
    penalty_B1 = penalty_B[:, None]
    changed_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return jnp.where(seen_BV, changed_BV, logits_BV)


def filtered(logits_BV: jax.Array, arrays: SamplingArrays) -> jax.Array:
    """Divide by the temperature, shift the best score to 0. Masks what top-k, top-p or min-p rules out."""
    best_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    scores_BV = (logits_BV - best_B1) / jnp.maximum(arrays.temperature[:, None], SMALLEST_TEMPERATURE)
    wants_k_B, wants_p_B = arrays.top_k > 0, arrays.top_p < 1

    def top_k(scores_BV: jax.Array) -> jax.Array:
        order_BV = _order(scores_BV)
        wanted_B = jnp.where(wants_k_B, arrays.top_k.astype(jnp.float32), scores_BV.shape[-1])
        lowest_B1 = _threshold(order_BV, jnp.ones_like(scores_BV), wanted_B, bits=32)
        return jnp.where((order_BV >= lowest_B1) | ~wants_k_B[:, None], scores_BV, MASKED)

    def top_p(scores_BV: jax.Array) -> jax.Array:
        p_BV, order_BV = jnp.exp(scores_BV), _order(scores_BV)
        wanted_B, ids_V = arrays.top_p * _sum(p_BV), jnp.arange(scores_BV.shape[-1], dtype=jnp.uint32)
        lowest_B1 = _threshold(order_BV, p_BV, wanted_B, bits=32)
        above_BV, tied_BV = order_BV > lowest_B1, order_BV == lowest_B1
        wanted_B -= _sum(jnp.where(above_BV, p_BV, 0))
        lowest_id_B1 = _threshold(ids_V[None], jnp.where(tied_BV, p_BV, 0), wanted_B, bits=len(ids_V).bit_length())
        kept_BV = above_BV | (tied_BV & (ids_V[None] >= lowest_id_B1))
        return jnp.where(kept_BV | ~wants_p_B[:, None], scores_BV, MASKED)

    for wanted_B, rule in ((wants_k_B, top_k), (wants_p_B, top_p)):
        scores_BV = jax.lax.cond(wanted_B.any(), rule, lambda scores_BV: scores_BV, scores_BV)
    keep_BV = (scores_BV >= jnp.log(arrays.min_p)[:, None]) & (scores_BV > MASKED)
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
