"""Generate token ids: prefill, then decode with a key/value cache on the device.

Prompts are padded to buckets and the cache to a power of two. So a new prompt length compiles nothing new. A long
prompt is read in parts, and `cancelled` is asked between them. Tokens are decoded in chunks, one device loop per
chunk with a known trip count. This file knows no tokenizer.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from smollm_jax.generation import steps
from smollm_jax.generation.decoder import Decoder
from smollm_jax.generation.lengths import bucket, check_prompt
from smollm_jax.generation.programs import Programs
from smollm_jax.generation.sampling import Past, Sampling, SamplingArrays, Score, as_scores
from smollm_jax.generation.steps import DecodeState, Read
from smollm_jax.model.transformer import SmolLM
from smollm_jax.runtime.devices import precision_of
from smollm_jax.runtime.errors import require

SCORED, SCORED_ON_CPU = 256, 64  # tokens of a text whose logits exist at once. Others write between two parts
PART, PART_ON_CPU = 512, 128  # tokens of a prompt per program. A request can be cancelled between two
CHUNK = 8  # tokens per round trip: few enough to read a text while it grows. One loop is compiled


class Generator:
    """A model prepared to generate in its compute dtype. `kernels` is passed to `Decoder`.

    `cancelled` is asked while a long prompt is read: nobody may be waiting for it any more.
    """

    def __init__(self, model: SmolLM, *, kernels: bool | None = None):
        self._kernels = kernels
        self.num_parameters = model.config.num_parameters
        self.vocab_size, self.context = model.config.vocab_size, model.config.max_seq_len
        on_cpu = jax.default_backend() == "cpu"
        self.part, self.scored = (PART_ON_CPU, SCORED_ON_CPU) if on_cpu else (PART, SCORED)
        self.load(model)
        precise = precision_of(model.dtype)  # as in training, whatever the process has set
        static = ("greedy", "scored")
        self._prefill = jax.jit(precise(self._prefill_rows), static_argnames=("length", *static))
        self._read = jax.jit(precise(self._read_part), donate_argnames="read")
        self._first = jax.jit(precise(self._first_token), static_argnames=static)
        self._decode = jax.jit(precise(self._decode_rows), static_argnames=static, donate_argnames="rows")
        self._score = jax.jit(precise(self._score_part), donate_argnames="read")
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
        length = bucket(len(ids))
        read = self.nothing_read(length)
        for start in range(0, len(ids) - 1, min(length, self.scored)):
            scores, read = self.score_part(ids, start, read, length)
            yield as_scores(scores, len(ids) - 1 - start)

    def nothing_read(self, length: int) -> Read:
        """Return what stands before the first part of a single text, with a cache of `length` positions."""
        return steps.nothing_read(self._decoder(self._weights), 1, length)

    def init_cache(self, batch_size: int, length: int) -> Any:
        """Return an empty cache, as `Decoder.init_cache` does."""
        return self._decoder(self._shapes).init_cache(batch_size, length)

    def score_part(self, ids: Sequence[int], start: int, read: Read, length: int) -> tuple[Any, Read]:
        """Read a part of a text from `start`, `scored` tokens or all that the cache holds, and score the next ids.

        Returns the arrays of the scores, padded, and what was read.
        """
        size = min(length, self.scored)
        padded = np.zeros(size + 1, np.int32)
        part = ids[start : start + size + 1]
        padded[: len(part)] = part
        with self.programs.calling("score", size, length):
            lengths_1 = np.asarray([len(ids)], np.int32)
            both = padded[None, :size], padded[1:]
            return self._score(self._weights, both, np.int32(start), lengths_1, read)

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
                ahead, _, rows = self.decode(rows, arrays, greedy=greedy)
            texts = []
            for row, ids in enumerate(np.asarray(pending).tolist()):
                new = ids[: room[row]]
                text = list(takewhile(lambda token: token not in sampling.stop_ids, new))
                room[row] = room[row] - len(text) if len(text) == len(new) else 0
                texts.append(text)
            yield texts
            pending = ahead

    def decode(self, rows: DecodeState, arrays: SamplingArrays, *, greedy: bool, scored: bool = False):
        """Return the next `CHUNK` tokens of each row, the arrays of their scores if wanted, and the new state."""
        with self.programs.calling("decode", rows.shape, greedy, scored):
            return self._decode(self._weights, rows, arrays, greedy=greedy, scored=scored)

    def _read_prompts(self, tokens_BT, lengths_B, arrays, *, length: int, greedy: bool) -> DecodeState | None:
        """Return the state after the prompts, None if cancelled."""
        (B, T), part = tokens_BT.shape, self.part
        if part >= T:
            return self.prefill(tokens_BT, lengths_B, arrays, length=length, greedy=greedy)[0]
        read = steps.nothing_read(self._decoder(self._weights), B, length)
        for start in range(0, int(lengths_B.max()), part):
            read = self.read_part(tokens_BT, start, lengths_B, read, length)
            read[0].block_until_ready()  # not to send the device all parts at once
            if self.cancelled():
                return None
        return self.first(tokens_BT, lengths_B, read, arrays, greedy=greedy)[0]

    def prefill(self, tokens_BT, lengths_B, arrays, *, length: int, greedy: bool, scored: bool = False):
        """Return the state after short prompts and their first tokens, and the arrays of the tokens' scores."""
        with self.programs.calling("prefill", *tokens_BT.shape, length, greedy, scored):
            static = {"length": length, "greedy": greedy, "scored": scored}
            return self._prefill(self._weights, tokens_BT, lengths_B, arrays, **static)

    def read_part(self, tokens_BT, start: int, lengths_B, read: Read, length: int) -> Read:
        """Read `self.part` tokens of prompts from `start` into a cache of `length` positions."""
        (B, T), part = tokens_BT.shape, self.part
        first = min(start, T - part)  # a part that begins earlier makes the same keys and values again
        part_BT = tokens_BT[:, first : first + part]
        with self.programs.calling("read", B, part, length):
            return self._read(self._weights, part_BT, np.int32(first), lengths_B, read)

    def first(self, tokens_BT, lengths_B, read: Read, arrays, *, greedy: bool, scored: bool = False):
        """Return the state after prompts that were read, and the arrays of the first tokens' scores."""
        with self.programs.calling("first", *tokens_BT.shape, greedy, scored):
            token_B, past, scores = self._first(
                self._weights, tokens_BT, lengths_B, read[0], arrays, greedy=greedy, scored=scored
            )
        return DecodeState(token_B, jnp.asarray(lengths_B), past, read[1]), scores

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
        read = jax.eval_shape(lambda weights: steps.nothing_read(self._decoder(weights), 1, length), weights)
        kinds: Any = (jax.ShapeDtypeStruct((1, self.vocab_size), dtype) for dtype in (bool, np.int32))
        rows = DecodeState(ints_1, ints_1, Past(*kinds), read[1])
        tokens_1T = np.zeros((1, T), np.int32)

        ahead = self.programs.ahead
        both = {"greedy": greedy, "scored": False}
        decode = self.decode_ahead(rows, arrays, greedy=greedy)
        if self.part >= T:
            static = {"length": length} | both
            return [
                ahead(
                    ("prefill", 1, T, *static.values()), self._prefill, weights, tokens_1T, ints_1, arrays,
                    **static,
                ),
                decode,
            ]  # fmt: skip
        part_1T, start = tokens_1T[:, : self.part], np.int32(0)
        return [
            ahead(("read", 1, self.part, length), self._read, weights, part_1T, start, ints_1, read),
            ahead(
                ("first", 1, T, *both.values()), self._first, weights, tokens_1T, ints_1, read[0], arrays, **both
            ),
            decode,
        ]

    def decode_ahead(self, rows: Any, arrays: SamplingArrays, *, greedy: bool) -> Callable[[], None]:
        """Return a function that compiles the program of `decode` for rows of these shapes."""
        both = {"greedy": greedy, "scored": False}
        key = "decode", rows.shape, *both.values()
        return self.programs.ahead(key, self._decode, self._shapes, rows, arrays, **both)

    def _prefill_rows(self, weights, tokens_BT, lengths_B, arrays, *, length: int, greedy: bool, scored=False):
        decoder = self._decoder(weights)
        read = steps.nothing_read(decoder, len(tokens_BT), length)
        last_BD, cache = steps.read_part(decoder, tokens_BT, 0, lengths_B, read)
        token_B, past, scores = steps.first_token(
            decoder, tokens_BT, lengths_B, last_BD, arrays, greedy=greedy, scored=scored
        )
        return DecodeState(token_B, lengths_B, past, cache), scores

    def _read_part(self, weights, tokens_BT, start, lengths_B, read) -> Read:
        return steps.read_part(self._decoder(weights), tokens_BT, start, lengths_B, read)

    def _score_part(self, weights, both, start, length_1, read):
        return steps.score_part(self._decoder(weights), both, start, length_1, read)

    def _first_token(self, weights, tokens_BT, lengths_B, last_BD, arrays, *, greedy: bool, scored: bool):
        decoder = self._decoder(weights)
        return steps.first_token(decoder, tokens_BT, lengths_B, last_BD, arrays, greedy=greedy, scored=scored)

    def _decode_rows(self, weights, rows: DecodeState, arrays, *, greedy: bool, scored: bool = False):
        decoder = self._decoder(weights)
        return steps.decode_chunk(decoder, rows, arrays, tokens=CHUNK, greedy=greedy, scored=scored)

    def _decoder(self, weights: list[Any]) -> Decoder:
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
