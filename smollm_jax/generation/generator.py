"""Generate token ids: prefill, then decode with a key/value cache on the device.

Prompts are padded to buckets and the cache to a power of two. So a new prompt length compiles nothing new. A long
prompt is read in parts, and `cancelled` is asked between them. Tokens are decoded in chunks, one device loop per
chunk with a known trip count. This file knows no tokenizer.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from smollm_jax.generation.decoder import Decoder
from smollm_jax.generation.lengths import bucket, check_prompt
from smollm_jax.generation.programs import Programs
from smollm_jax.generation.sampling import Sampling, SamplingArrays, Score, choose_first, choose_token
from smollm_jax.model.loss import target_logprobs
from smollm_jax.model.transformer import SmolLM
from smollm_jax.runtime.devices import precision_of
from smollm_jax.runtime.errors import require

SCORED = 256  # tokens of a text whose logits exist at once
ALTERNATIVES = 5  # likeliest tokens that come with the score of a token
PART, PART_ON_CPU = 512, 128  # tokens of a prompt per program. A request can be cancelled between two
CHUNK = 8  # tokens per round trip: few enough to read a text while it grows. One loop is compiled


class DecodeState(NamedTuple):
    """The state of a batch between chunks: next token, position, tokens seen (for penalty), cache."""

    token_B: jax.Array
    position_B: jax.Array
    seen_BV: jax.Array
    cache: Any


class Generator:
    """A model prepared to generate in its compute dtype. `kernels` is passed to `Decoder`.

    `cancelled` is asked while a long prompt is read: nobody may be waiting for it any more.
    """

    def __init__(self, model: SmolLM, *, kernels: bool | None = None):
        self._kernels = kernels
        self.num_parameters = model.config.num_parameters
        self.vocab_size, self.context = model.config.vocab_size, model.config.max_seq_len
        self.part = PART_ON_CPU if jax.default_backend() == "cpu" else PART
        self.load(model)
        precise = precision_of(model.dtype)  # as in training, whatever the process has set
        self._prefill = jax.jit(precise(self._prefill_rows), static_argnames=("length", "greedy"))
        self._read = jax.jit(precise(self._read_part), donate_argnames="read")
        self._first = jax.jit(precise(self._first_token), static_argnames="greedy")
        self._decode = jax.jit(precise(self._decode_rows), static_argnames="greedy", donate_argnames="rows")
        self._score = jax.jit(precise(self._score_chunk), donate_argnames="cache")
        self.programs = Programs()
        self.stop_reason: str | None = None
        self.cancelled: Callable[[], bool] = lambda: False

    def load(self, model: SmolLM) -> None:
        """Take the weights of `model`. Its architecture must be the same, so that nothing compiles again."""
        self._graphdef, state = nnx.split(Decoder(model, kernels=self._kernels))
        # plain leaves: walking an NNX state costs the host a millisecond a call
        self._weights, self._structure = jax.tree.flatten(state)
        self._shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in self._weights]

    @property
    def is_compiling(self) -> bool:
        """Return whether a text waits for a program to compile."""
        return self.programs.waiting > 0

    def unload(self) -> None:
        """Free the weights until the next `load`."""
        self._weights = []

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
        """Return each prompt's new ids, without the stop id. Raises `UserError` as `check_prompt` does."""
        texts: list[list[int]] = [[] for _ in prompts]
        for new in self.chunks(prompts, sampling) if texts else ():
            for text, ids in zip(texts, new, strict=True):
                text.extend(ids)
        return texts

    def stream(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[list[int]]:
        """Yield new ids as they are made, without the stop id.

        At the end `stop_reason` is "eos", "length" or "context". Closing the iterator ends the work. Raises
        `UserError` as `check_prompt` does.
        """
        self.stop_reason, made = "cancelled", 0
        for (ids,) in self.chunks([prompt], sampling):
            made += len(ids)
            if ids:
                yield ids
        if self.cancelled():
            return  # while the prompt was read, or with its last word
        if made == sampling.max_new_tokens:
            self.stop_reason = "length"
        else:
            self.stop_reason = "context" if made == self.context - len(prompt) else "eos"

    def logprobs(self, ids: Sequence[int]) -> tuple[list[float], list[bool]]:
        """Return the log-probability of each id but the first after the ids before it, and if it is the arg-max.

        A text is read in chunks with the cache, and the logits of one chunk exist at a time. Raises `UserError`.
        """
        scores = [score for part in self.score(ids) for score in part]
        return [score.logprob for score in scores], [score.is_likeliest for score in scores]

    def score(self, ids: Sequence[int]) -> Iterator[list[Score]]:
        """Yield the scores of each id but the first, part by part.

        They are of the softmax of the raw logits, whatever a sampling makes of these. Closing the iterator ends
        the work. Raises `UserError` as `check_prompt` does.
        """
        check_prompt(ids, context=self.context + 1, vocab_size=self.vocab_size)
        length, left = bucket(len(ids)), len(ids) - 1
        size = min(length, SCORED)
        padded = np.zeros(length + 1, np.int32)
        padded[: len(ids)] = ids
        cache = self._decoder(self._weights).init_cache(1, length)
        for start in range(0, left, size):
            tokens_1T, targets_T = padded[None, start : start + size], padded[start + 1 : start + 1 + size]
            with self.programs.calling("score", size, length):
                *found, cache = self._score(self._weights, tokens_1T, targets_T, np.int32(start), cache)
            logprobs, are_best, ids_TA, logprobs_TA = (np.asarray(one)[: left - start].tolist() for one in found)
            likeliest = (list(zip(*pair, strict=True)) for pair in zip(ids_TA, logprobs_TA, strict=True))
            yield [Score(*one) for one in zip(logprobs, are_best, likeliest, strict=True)]

    def _score_chunk(self, weights, tokens_1T, targets_T, start, cache):
        decoder = self._decoder(weights)
        positions_1T = start + jnp.arange(tokens_1T.shape[1])[None]
        x_1TD, cache = decoder.features(tokens_1T, positions_1T, cache)
        logits_TV = decoder.logits(x_1TD[0])
        best_TA, ids_TA = jax.lax.top_k(logits_TV, min(ALTERNATIVES, self.vocab_size))
        best_TA -= jax.nn.logsumexp(logits_TV, axis=1)[:, None]
        return *target_logprobs(logits_TV, targets_T), ids_TA, best_TA, cache

    def chunks(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int] | None = None
    ) -> Iterator[list[list[int]]]:
        """Yield the new ids of every row, chunk by chunk, until all rows have ended. An ended row has none.

        `seeds` has a seed per row, in place of the one of `sampling`. While others have room, a row that has ended
        is decoded on, unread. Raises `UserError` as `check_prompt` does.
        """
        for prompt in prompts:
            check_prompt(prompt, context=self.context, vocab_size=self.vocab_size)
        lengths = [len(prompt) for prompt in prompts]
        room = [min(sampling.max_new_tokens, self.context - length) for length in lengths]
        tokens_BT = np.zeros((len(prompts), min(bucket(max(lengths)), self.context)), np.int32)
        for row, prompt in enumerate(prompts):
            tokens_BT[row, : len(prompt)] = prompt
        arrays, greedy = SamplingArrays.from_sampling(sampling, seeds), sampling.temperature == 0
        rows = self._read_prompts(
            tokens_BT, np.asarray(lengths, np.int32), arrays, greedy=greedy,
            length=min(bucket(max(lengths) + max(room)), self.context),
        )  # fmt: skip
        if rows is None:
            return
        pending = rows.token_B[:, None]
        while any(room):
            ahead: Any = None
            if max(room) > pending.shape[1]:
                # the device computes the next chunk while the caller reads this one
                with self.programs.calling("decode", _shape(rows), greedy):
                    ahead, rows = self._decode(self._weights, rows, arrays, greedy=greedy)
            texts = []
            for row, ids in enumerate(np.asarray(pending).tolist()):
                new = ids[: room[row]]
                text = list(takewhile(lambda token: token not in sampling.stop_ids, new))
                room[row] = room[row] - len(text) if len(text) == len(new) else 0
                texts.append(text)
            yield texts
            pending = ahead

    def _read_prompts(self, tokens_BT, lengths_B, arrays, *, length: int, greedy: bool) -> DecodeState | None:
        """Return the state after the prompts, None if cancelled."""
        (B, T), part, programs = tokens_BT.shape, self.part, self.programs
        if part >= T:
            with programs.calling("prefill", B, T, length, greedy):
                return self._prefill(self._weights, tokens_BT, lengths_B, arrays, length=length, greedy=greedy)
        read = self._nothing_read(self._weights, len(tokens_BT), length)
        for start in range(0, int(lengths_B.max()), part):
            first = min(start, T - part)  # a part that begins earlier makes the same keys and values again
            part_BT = tokens_BT[:, first : first + part]
            with programs.calling("read", B, part, length):
                read = self._read(self._weights, part_BT, np.int32(first), lengths_B, read)
            read[0].block_until_ready()  # not to send the device all parts at once
            if self.cancelled():
                return None
        with programs.calling("first", B, T, greedy):
            token_B, seen_BV = self._first(self._weights, tokens_BT, lengths_B, read[0], arrays, greedy=greedy)
        return DecodeState(token_B, jnp.asarray(lengths_B), seen_BV, read[1])

    def programs_of(
        self, prompt: int, text: int, stop_ids: Sequence[int], *, greedy: bool
    ) -> list[Callable[[], None]]:
        """Return functions that compile, and do not run, the programs of a single text.

        `prompt` tokens are read, and the text then grows to `text` tokens. The functions may run in any thread.
        """
        T, length = (min(bucket(size), self.context) for size in (prompt, text))
        arrays = SamplingArrays.from_sampling(Sampling(stop_ids=tuple(stop_ids)))
        ints_1: Any = jax.ShapeDtypeStruct((1,), np.int32)
        weights = self._shapes  # the arrays may be freed meanwhile
        read = jax.eval_shape(lambda weights: self._nothing_read(weights, 1, length), weights)
        seen_1V: Any = jax.ShapeDtypeStruct((1, self.vocab_size), bool)
        rows = DecodeState(ints_1, ints_1, seen_1V, read[1])
        tokens_1T = np.zeros((1, T), np.int32)

        def ahead(key: tuple[Any, ...], program: Any, *arguments: Any, **static: Any) -> Callable[[], None]:
            def compile_it() -> None:
                with self.programs.compiling(*key) as is_new:
                    if is_new:
                        program.lower(weights, *arguments, **static).compile()

            return compile_it

        decode = ahead(("decode", _shape(rows), greedy), self._decode, rows, arrays, greedy=greedy)
        if self.part >= T:
            static = {"length": length, "greedy": greedy}
            return [
                ahead(("prefill", 1, T, *static.values()), self._prefill, tokens_1T, ints_1, arrays, **static),
                decode,
            ]
        part_1T = tokens_1T[:, : self.part]
        return [
            ahead(("read", 1, self.part, length), self._read, part_1T, np.int32(0), ints_1, read),
            ahead(("first", 1, T, greedy), self._first, tokens_1T, ints_1, read[0], arrays, greedy=greedy),
            decode,
        ]

    def _prefill_rows(self, weights, tokens_BT, lengths_B, arrays, *, length: int, greedy: bool) -> DecodeState:
        read = self._nothing_read(weights, len(tokens_BT), length)
        last_BD, cache = self._read_part(weights, tokens_BT, 0, lengths_B, read)
        token_B, seen_BV = self._first_token(weights, tokens_BT, lengths_B, last_BD, arrays, greedy=greedy)
        return DecodeState(token_B, lengths_B, seen_BV, cache)

    def _nothing_read(self, weights, batch_size: int, length: int) -> tuple[jax.Array, Any]:
        decoder = self._decoder(weights)
        last_BD = jnp.zeros((batch_size, decoder.config.hidden_size), decoder.dtype)
        return last_BD, decoder.init_cache(batch_size, length)

    def _read_part(self, weights, tokens_BT, start, lengths_B, read) -> tuple[jax.Array, Any]:
        """Return the features of each row's last token, once it is read, and the cache."""
        (B, T), (last_BD, cache) = tokens_BT.shape, read
        positions_BT = start + jnp.broadcast_to(jnp.arange(T), (B, T))
        x_BTD, cache = self._decoder(weights).features(tokens_BT, positions_BT, cache)
        at_B1 = lengths_B[:, None] - 1 - start
        here_BD = jnp.take_along_axis(x_BTD, jnp.clip(at_B1, 0, T - 1)[:, None], axis=1)[:, 0]
        return jnp.where((at_B1 >= 0) & (at_B1 < T), here_BD, last_BD), cache

    def _first_token(self, weights, tokens_BT, lengths_B, last_BD, arrays, *, greedy: bool):
        B, T = tokens_BT.shape
        in_prompt_BT = jnp.arange(T)[None] < lengths_B[:, None]
        seen_BV = jnp.zeros((B, self.vocab_size), bool)
        seen_BV = seen_BV.at[jnp.arange(B)[:, None], tokens_BT].max(in_prompt_BT)
        token_B = choose_first(self._decoder(weights).logits(last_BD), seen_BV, lengths_B, arrays, greedy)
        return token_B, seen_BV.at[jnp.arange(B), token_B].set(True)

    def _decode_rows(self, weights, rows: DecodeState, arrays, *, greedy: bool) -> tuple[jax.Array, DecodeState]:
        decoder = self._decoder(weights)
        B = rows.token_B.shape[0]

        def step(i: jax.Array, carry: tuple[jax.Array, DecodeState]) -> tuple[jax.Array, DecodeState]:
            out_BT, rows = carry
            x_BTD, cache = decoder.features(rows.token_B[:, None], rows.position_B[:, None], rows.cache)
            position_B = rows.position_B + 1
            token_B = choose_token(decoder.logits(x_BTD[:, 0]), rows.seen_BV, position_B, arrays, greedy)
            seen_BV = rows.seen_BV.at[jnp.arange(B), token_B].set(True)
            return out_BT.at[:, i].set(token_B), DecodeState(token_B, position_B, seen_BV, cache)

        return jax.lax.fori_loop(0, CHUNK, step, (jnp.zeros((B, CHUNK), jnp.int32), rows))

    def _decoder(self, weights: list[jax.Array]) -> Decoder:
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._structure, weights))


def generate(model: SmolLM, prompts: Sequence[Sequence[int]], **sampling: Any) -> list[list[int]]:
    """Return each prompt's new ids, up to an eos of the model. Keywords go to `Sampling`.

    A prompt that comes several times gets the same text each time: seed and position alone decide a draw. To call
    it more than once keep a `Generator`. Raises `UserError` for text, which `smollm_jax.load` takes.
    """
    require(isinstance(model, SmolLM), f"generate takes a SmolLM, as of load_hf; {type(model).__name__} came")
    texts = isinstance(prompts, str) or any(isinstance(prompt, str) for prompt in prompts)
    require(not texts, "generate takes lists of token ids; smollm_jax.load(PATH).generate(TEXT) takes text")
    flat = any(np.ndim(prompt) == 0 for prompt in prompts)
    require(not flat, "generate takes a list of prompts, each a list of token ids; give [ids] for a single prompt")
    return Generator(model).generate(prompts, Sampling(**{"stop_ids": model.config.stop_ids} | sampling))


def _shape(rows: DecodeState) -> tuple[int, ...]:
    return tuple(rows.cache[0][0].shape)
