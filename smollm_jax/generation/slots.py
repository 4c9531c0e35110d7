"""Decode the texts of several requests together, in slots that a text takes and leaves at any time.

Prompts are read alone, a part at a time, so that a long one holds up no other text. A text that is alone is
decoded by the programs of a single text. Several texts are the rows of one batch: a step then reads the weights
once for all. A row's token depends on its own seed and position alone, so company changes no text, up to rounding.
"""

from collections import deque
from itertools import takewhile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from smollm_jax.generation import generator as generation
from smollm_jax.generation import steps
from smollm_jax.generation.generator import Generator
from smollm_jax.generation.lengths import bucket
from smollm_jax.generation.row import Made, Row
from smollm_jax.generation.sampling import Past, Sampling, SamplingArrays, as_scores
from smollm_jax.generation.steps import DecodeState

SLOT_TOKENS = 2_048  # positions of the cache per slot. Longer texts take the place of several
SHORTEST = 128  # positions of a row of the batch
PATIENCE = 8  # chunks for which fewer rows must have been enough: a client may ask again at once
PEAK = 3  # times all slots that caches take at most: a batch, the one that replaces it, prompts that are read


class Sent(NamedTuple):
    """What the device was asked for: tokens (B, C) of rows and their scores, or the scores of a prompt."""

    rows: list[Row | None]
    tokens_BC: Any
    scores: Any
    prompt_scores: int = 0  # how many


class Slots:
    """The rows that a generator decodes together, at most `count`. `generator` may be replaced while none is."""

    def __init__(self, generator: Generator, count: int):
        self.generator, self.count = generator, count
        self._tokens = max(count * SLOT_TOKENS, generator.context)
        self._reading, self._ready = deque[Row](), list[Row]()
        self._sent = deque[Sent]()
        self._shapes: dict[tuple[int, int], tuple[int, ...]] = {}
        self._spare = 0  # chunks for which fewer rows would have been enough
        self.zeros = jax.jit(self.nothing, static_argnums=(0, 1))
        self.move = jax.jit(steps.move_row, donate_argnums=0)
        self._clear()

    def _clear(self) -> None:
        self._rows: list[Row | None] = []
        self._state: DecodeState | None = None
        self._arrays: SamplingArrays | None = None

    @property
    def cache_bytes(self) -> int:
        """Return how much memory the caches take at most."""
        token = jax.eval_shape(lambda: self.nothing(1, 1))
        return PEAK * int(self._tokens * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(token.cache)))

    @property
    def rows(self) -> list[Row]:
        """Return the rows that have not ended."""
        return [row for row in (*self._reading, *self._ready, *self._rows) if row is not None and not row.reason]

    def fits(self, row: Row) -> bool:
        """Return whether there is a slot for a row, and room in the cache."""
        others = self.rows
        return not others or len(others) < self.slots_of(max(one.length for one in (row, *others)))

    def slots_of(self, length: int) -> int:
        return max(min(self.count, self._tokens // length), 1)

    def widths_of(self, length: int) -> list[int]:
        """Return the numbers of rows that a batch can have: powers of two below all slots, and all slots."""
        most = self.slots_of(length)
        return [*takewhile(lambda width: width < most, (2**i for i in range(1, most))), most]

    def _width_for(self, texts: int, length: int, scored: bool) -> int:
        """Return the fewest rows that hold `texts`, of a batch whose program exists. If none does, all slots.

        Each row costs time, also without a text. To compile would cost more.
        """
        *narrow, most = [width for width in self.widths_of(length) if width >= texts]
        known = (self.generator.programs.knows("decode", self.shape_of(x, length), False, scored) for x in narrow)
        return next((width for width, is_known in zip(narrow, known, strict=True) if is_known), most)

    def shape_of(self, count: int, length: int) -> tuple[int, ...]:
        """Return `DecodeState.shape` of a batch."""
        if (count, length) not in self._shapes:
            self._shapes[count, length] = jax.eval_shape(lambda: self.nothing(count, length)).shape
        return self._shapes[count, length]

    def add(self, row: Row) -> None:
        """Let a row take a slot. It must fit."""
        self._reading.append(row)

    def drop(self, row: Row) -> None:
        """Take a slot back from a row, which makes nothing more."""
        row.reason = row.reason or "cancelled"
        row.read = row.state = None
        if row in self._reading:
            self._reading.remove(row)
        self._free()

    def clear(self) -> None:
        """Drop all rows."""
        for row in self.rows:
            self.drop(row)
        self._free()

    def _free(self) -> None:
        """Free the cache if nobody is there."""
        if not self.rows:
            self._ready.clear()
            self._sent.clear()
            self._clear()

    def step(self) -> list[Made]:
        """Read a part of one prompt, ask for the next tokens of all rows, and return what was made before."""
        if self._reading:
            self._read_next()
        self._arrange()
        asked, made = self._ask(), list[Made]()
        while len(self._sent) > asked:  # the device computes while the caller reads
            made += self._look()
        self._free()
        return made

    def _read_next(self) -> None:
        """Read a part of the prompt whose turn it is. The device has one part at a time, so that rows go on."""
        row, engine = self._reading.popleft(), self.generator
        whole, size = len(row.prompt), min(bucket(len(row.prompt)), engine.context)
        tokens_1T, length_1 = np.zeros((1, size), np.int32), np.asarray([whole], np.int32)
        tokens_1T[0, :whole] = row.prompt[:size]
        how = {"greedy": row.greedy, "scored": row.scored}
        if not row.reads_scores and engine.part >= size:
            row.state, scores = engine.prefill(tokens_1T, length_1, row.arrays, length=row.length, **how)
            self._begin(row, scores)
            return
        read, start = engine.nothing_read(row.length) if row.read is None else row.read, row.read_to
        read[0].block_until_ready()
        if row.reads_scores:
            found, row.read = engine.score_part(row.prompt, start, read, row.length)
            row.read_to += min(row.length, engine.scored)
            self._sent.append(Sent([row], None, found, max(min(row.read_to, whole - 1) - start, 0)))
        else:
            row.read = engine.read_part(tokens_1T, start, length_1, read, row.length)
            row.read_to += engine.part
        if row.read_to < whole - (row.room == 0):
            self._reading.append(row)
        elif row.room:
            row.state, scores = engine.first(tokens_1T, length_1, row.read, row.arrays, **how)
            self._begin(row, scores)

    def _begin(self, row: Row, scores: Any) -> None:
        """Let a row whose prompt is read join the others."""
        assert row.state is not None
        row.sent, row.read = 1, None
        self._ready.append(row)
        self._sent.append(Sent([row], row.state.token_B[:, None], tuple(one[:, None] for one in scores)))

    def _arrange(self) -> None:
        """Give each row its place: alone as a single text, with others in a batch."""
        self._ready = [row for row in self._ready if not row.reason]
        going = [row for row in self._rows if row is not None and not row.reason]
        everyone = going + self._ready
        if not everyone:
            return
        length = max(SHORTEST, *(row.length for row in everyone)) if len(everyone) > 1 else everyone[0].length
        batched = len(self._rows) > 1
        if len(everyone) == 1 and not (batched and going and self._reading):
            if batched and going:  # nobody else comes
                self._build(everyone, 1, length)
            elif not going:
                (row,) = self._ready
                self._rows, self._state, self._arrays, row.state = [row], row.state, row.arrays, None
        elif len(everyone) > 1 and (size := self._new_size(everyone, length)) is not None:
            self._build(everyone, *size)
        else:
            for row in self._ready:
                self._put(row, next(i for i, old in enumerate(self._rows) if old is None or old.reason))
        if self._ready and len(self._rows) > 1:
            self._stack()
        self._ready.clear()

    def _new_size(self, everyone: list[Row], length: int) -> tuple[int, int] | None:
        """Return rows and positions of the batch that is needed. None if there is one, or a somewhat larger."""
        held = self._state.shape[2] if self._state is not None and len(self._rows) > 1 else 0
        keeps = length <= held <= 2 * length and len(everyone) <= self.slots_of(held)
        length = held if keeps else length
        texts = len(everyone) + sum(row.room > 0 for row in self._reading)  # prompts under way come soon
        scored = any(row.scored for row in everyone)
        width = self._width_for(min(texts, self.slots_of(length)), length, scored)
        if keeps and sum(row is None or row.reason is not None for row in self._rows) >= len(self._ready):
            self._spare = self._spare + 1 if width < len(self._rows) else 0
            if self._spare < PATIENCE:
                return None
        self._spare = 0
        return width, length

    def _build(self, everyone: list[Row], count: int, length: int) -> None:
        """Move rows into a new batch."""
        old, places = self._state, {id(row): i for i, row in enumerate(self._rows) if row is not None}
        with self.generator.programs.calling("zeros", count, length):
            self._rows, self._state = [None] * count, self.zeros(count, length)
        for to, row in enumerate(everyone):
            if row.state is not None:
                self._put(row, to)
            else:
                self._rows[to] = row
                self._state = self._moved(to, old, places[id(row)])
        self._stack()

    def _put(self, row: Row, to: int) -> None:
        assert row.state is not None
        self._rows[to], self._state, row.state = row, self._moved(to, row.state, 0), None

    def _moved(self, to: int, source: Any, at: int) -> DecodeState:
        assert self._state is not None
        with self.generator.programs.calling("move", self._state.shape, source.shape):
            return self.move(self._state, np.int32(to), source, np.int32(at))

    def _stack(self) -> None:
        """Put the settings of all rows on the device, once for all their chunks."""
        idle = SamplingArrays.from_sampling(Sampling())
        rows = [row.arrays if row is not None and not row.reason else idle for row in self._rows]
        self._arrays = jax.device_put(SamplingArrays.stacked(rows)) if len(rows) > 1 else rows[0]

    def nothing(self, count: int, length: int) -> DecodeState:
        """Return a batch of `count` rows without text."""
        engine = self.generator
        cache = engine.init_cache(count, length)
        kinds = (jnp.zeros((count, engine.vocab_size), dtype) for dtype in (bool, jnp.int32))
        token_B, position_B = jnp.zeros((2, count), jnp.int32)
        return DecodeState(token_B, position_B, Past(*kinds), cache)

    def _ask(self) -> bool:
        """Send the device the next chunk, while the caller reads the last one. Returns whether there is one."""
        rows = [row if row is not None and not row.reason else None for row in self._rows]
        wanted = [row for row in rows if row is not None and row.sent < row.room]
        if not wanted:
            return False
        assert self._state is not None
        assert self._arrays is not None
        scored = any(row.scored for row in wanted)
        greedy = len(rows) == 1 and wanted[0].greedy  # one program serves all batches
        tokens_BC, scores, self._state = self.generator.decode(
            self._state, self._arrays, greedy=greedy, scored=scored
        )
        for row in wanted:
            row.sent += generation.CHUNK
        self._sent.append(Sent(rows, tokens_BC, scores))
        return True

    def _look(self) -> list[Made]:
        """Wait for the oldest of what the device was asked for, and give it to its rows."""
        sent, made = self._sent.popleft(), []
        if sent.tokens_BC is None:
            (row,) = sent.rows
            if row is None or row.reason:
                return []
            done = row.room == 0 and row.read_to >= len(row.prompt) - 1
            row.reason, row.read = ("scored", None) if done else (None, row.read)
            return [Made(row, [], [], as_scores(sent.scores, sent.prompt_scores), row.reason)]
        for i, (row, new) in enumerate(zip(sent.rows, np.asarray(sent.tokens_BC).tolist(), strict=True)):
            if row is None or row.reason:
                continue
            new = new[: row.room - row.made]  # noqa: PLW2901
            stop_ids = row.sampling.stop_ids
            ends = next((at for at, token in enumerate(new) if token in stop_ids), len(new))
            ids = new[:ends]
            row.made += len(ids)
            if len(ids) < len(new):
                row.reason = "eos"
            elif row.made == row.room:
                row.reason = "length" if row.room == row.sampling.max_new_tokens else "context"
            scored = []
            if row.scored:
                count = len(ids) + (row.reason == "eos")
                scored = list(zip(new, as_scores([one[i] for one in sent.scores], count), strict=False))
            made.append(Made(row, ids, scored, [], row.reason))
        return made
