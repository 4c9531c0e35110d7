"""Compute with a decoder: read a part of a prompt, choose the first token, decode a chunk, score a text.

Pure functions, which `Generator` compiles. They know shapes and arrays, no request and no length that is allowed.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from smollm_jax.generation.decoder import Decoder
from smollm_jax.generation.sampling import Past, SamplingArrays, choose_first, choose_token, scores_of

Read = tuple[jax.Array, Any]  # features (B, D) of each row's last token once it is read, and the cache


class DecodeState(NamedTuple):
    """The state of a batch between chunks: next token, position, tokens for penalties, cache."""

    token_B: Any
    position_B: Any
    past: Past
    cache: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of a layer's keys (B, K, S, H), which names the programs of a state."""
        return tuple(self.cache[0][0].shape)


def nothing_read(decoder: Decoder, batch_size: int, length: int) -> Read:
    """Return what stands before the first part of prompts, with a cache of `length` positions."""
    last_BD = jnp.zeros((batch_size, decoder.config.hidden_size), decoder.dtype)
    return last_BD, decoder.init_cache(batch_size, length)


def read_part(decoder: Decoder, tokens_BT: Any, start: Any, lengths_B: Any, read: Read) -> Read:
    """Read the part of the prompts that begins at `start`. Rows are padded on their right to one length."""
    return _features(decoder, tokens_BT, start, lengths_B, read)[1]


def score_part(
    decoder: Decoder, both: tuple[Any, Any], start: Any, length_1: Any, read: Read
) -> tuple[tuple[jax.Array, ...], Read]:
    """Read a part of a text, and score what follows. `both` are its tokens (1, T) and the next ones (T,)."""
    tokens_1T, targets_T = both
    x_1TD, read = _features(decoder, tokens_1T, start, length_1, read)
    return scores_of(decoder.logits(x_1TD[0]), targets_T), read


def _features(decoder: Decoder, tokens_BT: Any, start: Any, lengths_B: Any, read: Read) -> tuple[jax.Array, Read]:
    (B, T), (last_BD, cache) = tokens_BT.shape, read
    positions_BT = start + jnp.broadcast_to(jnp.arange(T), (B, T))
    x_BTD, cache = decoder.features(tokens_BT, positions_BT, cache)
    at_B1 = lengths_B[:, None] - 1 - start
    here_BD = jnp.take_along_axis(x_BTD, jnp.clip(at_B1, 0, T - 1)[:, None], axis=1)[:, 0]
    return x_BTD, (jnp.where((at_B1 >= 0) & (at_B1 < T), here_BD, last_BD), cache)


def first_token(
    decoder: Decoder, tokens_BT: Any, lengths_B: Any, last_BD: Any, arrays: SamplingArrays, *,
    greedy: bool, scored: bool,
) -> tuple[jax.Array, Past, tuple[jax.Array, ...]]:  # fmt: skip
    """Return the first token (B,) after whole prompts, the past with it, and its scores if wanted."""
    B, T = tokens_BT.shape
    in_prompt_BT = jnp.arange(T)[None] < lengths_B[:, None]
    in_prompt_BV = jnp.zeros((B, decoder.config.vocab_size), bool)
    in_prompt_BV = in_prompt_BV.at[jnp.arange(B)[:, None], tokens_BT].max(in_prompt_BT)
    past = Past(in_prompt_BV, jnp.zeros(in_prompt_BV.shape, jnp.int32))
    logits_BV = decoder.logits(last_BD)
    token_B = choose_first(logits_BV, past, lengths_B, arrays, greedy)
    return token_B, past.plus(token_B), scores_of(logits_BV, token_B) if scored else ()


def decode_chunk(
    decoder: Decoder, rows: DecodeState, arrays: SamplingArrays, *, tokens: int, greedy: bool, scored: bool
) -> tuple[jax.Array, tuple[jax.Array, ...], DecodeState]:
    """Return the next tokens (B, C), their scores (B, C, ...) if wanted, and the state after them.

    The loop has a known trip count, because a GPU would copy the condition of another to the host every turn.
    """

    def step(i: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        out_BC, scores, rows = carry
        x_BTD, cache = decoder.features(rows.token_B[:, None], rows.position_B[:, None], rows.cache)
        # a row that has ended is decoded on, unread: it stays in its cache
        position_B = jnp.minimum(rows.position_B + 1, rows.shape[2] - 1)
        logits_BV = decoder.logits(x_BTD[:, 0])
        token_B = choose_token(logits_BV, rows.past, position_B, arrays, greedy)
        new = scores_of(logits_BV, token_B) if scored else ()
        scores = tuple(old.at[:, i].set(one) for old, one in zip(scores, new, strict=True))
        rows = DecodeState(token_B, position_B, rows.past.plus(token_B), cache)
        return out_BC.at[:, i].set(token_B), scores, rows

    B = rows.token_B.shape[0]
    out_BC = jnp.zeros((B, tokens), jnp.int32)
    logits_BV = jax.ShapeDtypeStruct((B, decoder.config.vocab_size), jnp.float32)
    kinds = jax.eval_shape(scores_of, logits_BV, rows.token_B) if scored else ()
    scores = tuple(jnp.zeros((B, tokens, *kind.shape[1:]), kind.dtype) for kind in kinds)
    return jax.lax.fori_loop(0, tokens, step, (out_BC, scores, rows))


def move_row(into: DecodeState, to: Any, source: DecodeState, at: Any) -> DecodeState:
    """Return `into` with row `at` of `source` as its row `to`. Of the caches the positions that both have."""
    length = min(into.shape[2], source.shape[2])

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        row = jax.lax.dynamic_slice_in_dim(new, at, 1, 0)
        row = row[:, :, :length] if row.ndim == 4 else row
        return jax.lax.dynamic_update_slice(old, row, (to, *(0 for _ in old.shape[1:])))

    return jax.tree.map(put, into, source)
