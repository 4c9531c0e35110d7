"""Text generation on token ids: prefill, then decode with a key/value cache on the device.

Prompts are padded to buckets and the cache to a power of two, so that a new prompt length compiles nothing
new. Tokens are decoded in chunks, one device loop each with a known trip count. The draw of a token depends
on the seed and its place in the row alone, so that chunks do not show. This file knows no tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from smollm_jax.generation.decoder import Decoder
from smollm_jax.generation.sampling import Sampling, SamplingArrays, choose
from smollm_jax.model.transformer import SmolLM
from smollm_jax.runtime.errors import require

SMALLEST_BUCKET = 32
CHUNK = 8  # tokens a round trip: text comes often enough to be read as it is made, and one loop is compiled


class DecodeState(NamedTuple):
    """State of the rows under way: next token, its position, tokens seen (for the penalty), and the cache."""

    token_B: jax.Array
    position_B: jax.Array
    seen_BV: jax.Array
    cache: Any


class Generator:
    """A model made ready to generate, in its compute dtype; `context` tokens at most, prompt included.

    `kernels` is that of `Decoder`.
    """

    def __init__(self, model: SmolLM, *, context: int | None = None, kernels: bool | None = None):
        self._kernels = kernels
        self.config = model.config
        longest = model.config.max_seq_len
        require(context is None or context > 1, f"context={context} must hold a prompt and a token")
        self.context = longest if context is None else min(context, longest)
        self.load(model)
        self._prefill = jax.jit(self._prefill_rows, static_argnames=("length", "greedy"))
        self._decode = jax.jit(self._decode_rows, static_argnames="greedy", donate_argnames="rows")
        self.stop_reason: str | None = None

    def load(self, model: SmolLM) -> None:
        """Take the weights of `model`, which must be of the same architecture: nothing compiles again."""
        self._graphdef, state = nnx.split(Decoder(model, kernels=self._kernels))
        # plain leaves: walking an NNX state costs the host a millisecond a call
        self._weights, self._structure = jax.tree.flatten(state)

    def unload(self) -> None:
        """Let go of the weights, until the next `load`."""
        self._weights = []

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
        """New ids of each prompt, without the stop id; raises `ValueError` for a prompt that does not fit."""
        texts: list[list[int]] = [[] for _ in prompts]
        if not texts:
            return texts
        done = [False] * len(prompts)
        room = [min(sampling.max_new_tokens, self.context - len(prompt)) for prompt in prompts]
        for chunk in self._chunks(prompts, sampling, done):
            for row, ids in enumerate(chunk):
                if not done[row]:
                    kept = _until_stop(ids.tolist(), sampling.stop_ids)
                    texts[row] = (texts[row] + kept)[: room[row]]
                    done[row] = len(kept) < len(ids) or len(texts[row]) == room[row]
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
        """Chunks (B, n) of new tokens until all rows are `done` or the length is reached.

        A row that reaches the end of the context goes on as nonsense while others have room.
        """
        lengths = [len(prompt) for prompt in prompts]
        for prompt in prompts:
            self._check(prompt)
        new = min(sampling.max_new_tokens, self.context - min(lengths))
        bucket = min(_bucket(max(lengths)), self.context)
        tokens_BT = np.zeros((len(prompts), bucket), np.int32)
        for row, prompt in enumerate(prompts):
            tokens_BT[row, : len(prompt)] = prompt
        greedy = sampling.temperature == 0
        knobs = SamplingArrays.from_sampling(sampling)
        length = min(_bucket(max(lengths) + new), self.context)
        rows = self._prefill(
            self._weights, tokens_BT, np.asarray(lengths, np.int32), knobs, length=length, greedy=greedy
        )
        pending, wanted, made = rows.token_B[:, None], 1, 1
        while True:
            # the next chunk is under way while this one is looked at
            ahead = None
            if made < new:
                ahead, rows = self._decode(self._weights, rows, knobs, greedy=greedy)
            yield np.asarray(pending)[:, :wanted]  # cut here: on the device each length is a program of its own
            if ahead is None or all(done):
                return
            pending, wanted = ahead, new - made
            made += CHUNK

    def _check(self, prompt: Sequence[int]) -> None:
        require(len(prompt) > 0, "the prompt is empty; give at least one token")
        require(
            len(prompt) < self.context,
            f"the prompt has {len(prompt):,} tokens, the context {self.context:,}; shorten the prompt",
        )
        for token in (min(prompt), max(prompt)):
            require(
                0 <= token < self.config.vocab_size,
                f"token id {token} lies outside of the vocabulary of {self.config.vocab_size:,}",
            )

    def _prefill_rows(self, weights, tokens_BT, lengths_B, knobs, *, length: int, greedy: bool) -> DecodeState:
        decoder = self._decoder(weights)
        B, T = tokens_BT.shape
        positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
        x_BTD, cache = decoder.features(tokens_BT, positions_BT, decoder.init_cache(B, length))
        last_BD = jnp.take_along_axis(x_BTD, lengths_B[:, None, None] - 1, axis=1)[:, 0]
        in_prompt_BT = positions_BT < lengths_B[:, None]
        seen_BV = jnp.zeros((B, self.config.vocab_size), bool)
        seen_BV = seen_BV.at[jnp.arange(B)[:, None], tokens_BT].max(in_prompt_BT)
        token_B = choose(decoder.logits(last_BD), seen_BV, lengths_B, knobs, greedy)
        return DecodeState(token_B, lengths_B, seen_BV.at[jnp.arange(B), token_B].set(True), cache)

    def _decode_rows(self, weights, rows: DecodeState, knobs, *, greedy: bool) -> tuple[jax.Array, DecodeState]:
        decoder = self._decoder(weights)
        B = rows.token_B.shape[0]

        def step(i: jax.Array, carry: tuple[jax.Array, DecodeState]) -> tuple[jax.Array, DecodeState]:
            out_BT, rows = carry
            x_BTD, cache = decoder.features(rows.token_B[:, None], rows.position_B[:, None], rows.cache)
            position_B = rows.position_B + 1
            token_B = choose(decoder.logits(x_BTD[:, 0]), rows.seen_BV, position_B, knobs, greedy)
            seen_BV = rows.seen_BV.at[jnp.arange(B), token_B].set(True)
            return out_BT.at[:, i].set(token_B), DecodeState(token_B, position_B, seen_BV, cache)

        return jax.lax.fori_loop(0, CHUNK, step, (jnp.zeros((B, CHUNK), jnp.int32), rows))

    def _decoder(self, weights: list[jax.Array]) -> Decoder:
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._structure, weights))


def generate(model: SmolLM, prompts: Sequence[Sequence[int]], **sampling: Any) -> list[list[int]]:
    """New ids of each prompt; keywords are those of `Sampling`. For more than one call keep a `Generator`."""
    return Generator(model).generate(prompts, Sampling(**sampling))


def _until_stop(ids: list[int], stop_ids: tuple[int, ...]) -> list[int]:
    return next((ids[:i] for i, token in enumerate(ids) if token in stop_ids), ids)


def _bucket(length: int) -> int:
    """The power of two, at least `SMALLEST_BUCKET`, that holds `length` tokens."""
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())
