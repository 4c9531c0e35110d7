"""Text generation on token ids: prefill, then decode with a key/value cache on the device.

Prompts are padded to buckets and the cache to a power of two, so that a new prompt length compiles nothing
new. Tokens are decoded in chunks, one device loop each with a known trip count. The draw of a token depends
on the seed and its place in the row alone, so that chunks do not show. This file knows no tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from smollm_jax.config import require
from smollm_jax.model import SmolLM

SMALLEST_BUCKET = 32
FIRST_CHUNK, LONGEST_CHUNK = 4, 32  # the first text comes soon, later ones with fewer round trips
MASKED = -1e30


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
        require(self.temperature >= 0, f"temperature={self.temperature} must be 0 or more")
        require(self.top_k >= 0, f"top_k={self.top_k} must be 0 (all) or more")
        require(0 < self.top_p <= 1, f"top_p={self.top_p} must lie in (0, 1]")
        require(0 <= self.min_p <= 1, f"min_p={self.min_p} must lie in [0, 1]")
        require(self.repetition_penalty > 0, f"repetition_penalty={self.repetition_penalty} must be above 0")
        require(0 <= self.seed < 2**32, f"seed={self.seed} must lie in [0, 2**32)")


class Knobs(NamedTuple):
    """The numbers of a `Sampling` as device values: changing one compiles nothing."""

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    repetition_penalty: Any
    seed: Any


class Rows(NamedTuple):
    """State of the rows under way: next token, its position, tokens seen (for the penalty), and the cache."""

    token_B: jax.Array
    position_B: jax.Array
    seen_BV: jax.Array
    cache: Any


def choose(
    logits_BV: jax.Array, seen_BV: jax.Array, position_B: jax.Array, knobs: Knobs, greedy: bool
) -> jax.Array:
    """The token (B,) that follows: penalty, temperature, top-k, top-p, min-p, then a draw; in f32."""
    penalised = jnp.where(
        logits_BV > 0, logits_BV / knobs.repetition_penalty, logits_BV * knobs.repetition_penalty
    )
    logits_BV = jnp.where(seen_BV, penalised, logits_BV)
    if greedy:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = filtered(logits_BV / knobs.temperature, knobs)
    # the place in the row makes the key: the same text whatever the chunks and whoever shares the batch
    keys_B = jax.vmap(partial(jax.random.fold_in, jax.random.key(knobs.seed)))(position_B)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def filtered(logits_BV: jax.Array, knobs: Knobs) -> jax.Array:
    """Scores with those that top-k, then top-p, then min-p rule out at `MASKED`."""
    V = logits_BV.shape[-1]
    order_BV = jnp.argsort(logits_BV, axis=-1, descending=True)
    sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
    rank_V = jnp.arange(V)
    keep_BV = rank_V < jnp.where(knobs.top_k > 0, knobs.top_k, V)
    p_BV = jax.nn.softmax(jnp.where(keep_BV, sorted_BV, MASKED), axis=-1)
    keep_BV &= jnp.cumsum(p_BV, axis=-1) - p_BV < knobs.top_p
    p_BV = jax.nn.softmax(jnp.where(keep_BV, sorted_BV, MASKED), axis=-1)
    keep_BV &= p_BV >= knobs.min_p * p_BV[:, :1]
    keep_BV |= rank_V == 0
    kept_BV = jnp.where(keep_BV, sorted_BV, MASKED)
    return jnp.put_along_axis(jnp.zeros_like(logits_BV), order_BV, kept_BV, axis=-1, inplace=False)


class Generator:
    """A model made ready to generate, in its compute dtype; `context` tokens at most, prompt included."""

    def __init__(self, model: SmolLM, *, context: int | None = None):
        self.config = model.config
        self.context = min(context or model.config.max_seq_len, model.config.max_seq_len)
        self._graphdef, self._weights = nnx.split(model.decoder())
        self._prefill = jax.jit(self._prefill_rows, static_argnames=("length", "greedy"))
        self._decode = jax.jit(self._decode_rows, static_argnames=("steps", "greedy"), donate_argnames="rows")
        self.stop_reason: str | None = None

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
        """New ids of each prompt, without the stop id; raises `ValueError` for a prompt that does not fit."""
        texts: list[list[int]] = [[] for _ in prompts]
        done = [False] * len(prompts)
        for chunk in self._chunks(prompts, sampling, done):
            for row, ids in enumerate(chunk):
                if not done[row]:
                    kept = _until_stop(ids.tolist(), sampling.stop_ids)
                    texts[row] += kept
                    done[row] = len(kept) < len(ids)
        return texts

    def stream(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[list[int]]:
        """New ids as they come, without the stop id; `stop_reason` then says "eos", "length" or "context".

        Raises `ValueError` for a prompt that does not fit. Closing the iterator ends the work.
        """
        self.stop_reason, made, done = "cancelled", 0, [False]
        for chunk in self._chunks([prompt], sampling, done):
            ids = _until_stop(chunk[0].tolist(), sampling.stop_ids)
            made += len(ids)
            if ids:
                yield ids
            if len(ids) < len(chunk[0]):
                self.stop_reason = "eos"
                done[0] = True
        if not done[0]:
            self.stop_reason = "length" if made == sampling.max_new_tokens else "context"

    def _chunks(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, done: list[bool]
    ) -> Iterator[np.ndarray]:
        """Chunks (B, n) of new tokens until all rows are `done` or the length is reached."""
        lengths = [len(prompt) for prompt in prompts]
        for prompt in prompts:
            self._check(prompt)
        new = min(sampling.max_new_tokens, self.context - max(lengths))
        bucket = min(_bucket(max(lengths)), self.context)
        tokens_BT = np.zeros((len(prompts), bucket), np.int32)
        for row, prompt in enumerate(prompts):
            tokens_BT[row, : len(prompt)] = prompt
        greedy = sampling.temperature == 0
        knobs = Knobs(
            np.float32(sampling.temperature or 1.0), np.int32(sampling.top_k), np.float32(sampling.top_p),
            np.float32(sampling.min_p), np.float32(sampling.repetition_penalty), np.uint32(sampling.seed),
        )  # fmt: skip
        length = min(_bucket(max(lengths) + new), self.context)
        rows = self._prefill(
            self._weights, tokens_BT, np.asarray(lengths, np.int32), knobs, length=length, greedy=greedy
        )
        pending, made, steps = rows.token_B[:, None], 1, FIRST_CHUNK
        while True:
            # the next chunk is under way while this one is looked at
            ahead = None
            if made < new:
                ahead, rows = self._decode(self._weights, rows, knobs, steps=steps, greedy=greedy)
            yield np.asarray(pending)
            if ahead is None or all(done):
                return
            pending = ahead[:, : new - made]
            made, steps = made + steps, min(2 * steps, LONGEST_CHUNK)

    def _check(self, prompt: Sequence[int]) -> None:
        require(len(prompt) > 0, "the prompt is empty; give at least one token")
        require(
            len(prompt) < self.context,
            f"the prompt has {len(prompt):,} tokens, the context {self.context:,}; shorten the prompt",
        )
        highest = max(prompt)
        require(
            min(prompt) >= 0 and highest < self.config.vocab_size,
            f"token id {highest} lies outside of the vocabulary of {self.config.vocab_size:,}",
        )

    def _prefill_rows(self, weights, tokens_BT, lengths_B, knobs, *, length: int, greedy: bool) -> Rows:
        decoder = nnx.merge(self._graphdef, weights)
        B, T = tokens_BT.shape
        positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
        x_BTD, cache = decoder.features(tokens_BT, positions_BT, decoder.init_cache(B, length))
        last_BD = jnp.take_along_axis(x_BTD, lengths_B[:, None, None] - 1, axis=1)[:, 0]
        in_prompt_BT = positions_BT < lengths_B[:, None]
        seen_BV = jnp.zeros((B, self.config.vocab_size), bool)
        seen_BV = seen_BV.at[jnp.arange(B)[:, None], tokens_BT].max(in_prompt_BT)
        token_B = choose(decoder.logits(last_BD), seen_BV, lengths_B, knobs, greedy)
        return Rows(token_B, lengths_B, seen_BV.at[jnp.arange(B), token_B].set(True), cache)

    def _decode_rows(self, weights, rows: Rows, knobs, *, steps: int, greedy: bool) -> tuple[jax.Array, Rows]:
        decoder = nnx.merge(self._graphdef, weights)
        B = rows.token_B.shape[0]

        def step(i: jax.Array, carry: tuple[jax.Array, Rows]) -> tuple[jax.Array, Rows]:
            out_BT, rows = carry
            x_BTD, cache = decoder.features(rows.token_B[:, None], rows.position_B[:, None], rows.cache)
            position_B = rows.position_B + 1
            token_B = choose(decoder.logits(x_BTD[:, 0]), rows.seen_BV, position_B, knobs, greedy)
            seen_BV = rows.seen_BV.at[jnp.arange(B), token_B].set(True)
            return out_BT.at[:, i].set(token_B), Rows(token_B, position_B, seen_BV, cache)

        return jax.lax.fori_loop(0, steps, step, (jnp.zeros((B, steps), jnp.int32), rows))


def generate(model: SmolLM, prompts: Sequence[Sequence[int]], **sampling: Any) -> list[list[int]]:
    """New ids of each prompt; keywords are those of `Sampling`. For more than one call keep a `Generator`."""
    return Generator(model).generate(prompts, Sampling(**sampling))


def _until_stop(ids: list[int], stop_ids: tuple[int, ...]) -> list[int]:
    return next((ids[:i] for i, token in enumerate(ids) if token in stop_ids), ids)


def _bucket(length: int) -> int:
    """The power of two, at least `SMALLEST_BUCKET`, that holds `length` tokens."""
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())
