"""One thread that owns the model, a bounded line of requests before it, and the limits every request meets.

Pages and HTTP routes hand requests in and read pieces as they come; they never touch the engine. A reader that
goes away takes its request with it: out of the line at once, or at the next piece. Nothing here knows of
Gradio or HTTP. A request's numbers are checked here, so that no door can forget to.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
import traceback
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from smollm_jax.generation.sampling import Sampling
from smollm_jax.runtime.errors import require
from smollm_jax.serving.completion import Completer, TextChunk

LONGEST_PROMPT = 100_000  # characters; a context of 8,192 tokens holds about 35,000 of English
STOP_STRINGS, LONGEST_STOP = 4, 100
SECONDS_TO_CLOSE = 15
WARM_UP_TOKENS = 200  # the length that the page starts with
RANGES = {
    "temperature": (0.0, 2.0),
    "top_p": (0.01, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.5, 2.0),
    "top_k": (0, 1_000),
    "seed": (0, 2**32 - 1),
}
WHOLE = ("top_k", "seed", "max_new_tokens")


class QueueFull(Exception):
    """The line is full."""


@dataclass(eq=False)
class _Job:
    ids: Sequence[int]
    sampling: Sampling
    stop: tuple[str, ...]
    loop: asyncio.AbstractEventLoop
    owner: str | None
    pieces: asyncio.Queue[TextChunk | Exception] = field(default_factory=asyncio.Queue)
    left: threading.Event = field(default_factory=threading.Event)

    def put(self, item: TextChunk | Exception) -> None:
        try:
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, item)
        except RuntimeError:  # the reader's loop is closed: nobody listens any more
            self.left.set()


class Scheduler:
    """The only user of a `Completer`; requests are served in the order in which they came."""

    def __init__(self, completer: Completer, *, max_waiting: int, max_new_tokens: int):
        require(max_waiting > 0, f"max_waiting={max_waiting} must be at least 1")
        require(max_new_tokens > 0, f"max_new_tokens={max_new_tokens} must be at least 1")
        self.completer, self.max_waiting = completer, max_waiting
        self.max_new_tokens = min(max_new_tokens, completer.context - 1)
        self._line: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._now: _Job | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, daemon=True, name="model")
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests that a new one would have before it."""
        return len(self._line) + (self._now is not None)

    def prompt(self, text: Any) -> list[int]:
        """Ids of a prompt; raises `ValueError` for what is no text, empty or too long."""
        return self.fitting(self.completer.encode(check_text(text, "the prompt")))

    def fitting(self, ids: list[int]) -> list[int]:
        """`ids`, if the context has room for them and a token more; raises `ValueError`."""
        context = self.completer.context
        require(
            0 < len(ids) < context,
            f"the prompt has {len(ids):,} tokens; the model reads 1 to {context - 1:,}",
        )
        vocabulary = self.completer.tokenizer.vocab_size
        require(
            min(ids) >= 0 and max(ids) < vocabulary,
            f"the prompt holds a token id outside of the vocabulary, 0 to {vocabulary - 1:,}",
        )
        return ids

    def sampling(self, **numbers: Any) -> Sampling:
        """The checked `Sampling`; a seed of None is drawn. Raises `ValueError` naming the number."""
        if numbers.get("seed") is None:
            numbers["seed"] = secrets.randbelow(2**32)
        # JavaScript knows one kind of number
        numbers = {name: _whole(value) if name in WHOLE else value for name, value in numbers.items()}
        for name, value in numbers.items():
            low, high = RANGES.get(name, (1, self.max_new_tokens))
            kinds = int if name in WHOLE else int | float
            good = isinstance(value, kinds) and not isinstance(value, bool)
            good = good and low <= value <= high  # which neither NaN nor infinity satisfies
            kind = "whole number" if name in WHOLE else "number"
            require(good, f"{name}={_shown(value)} must be a {kind} from {low:,} to {high:,}")
        return Sampling(**numbers)

    def stop_strings(self, stop: str | Sequence[str] | None) -> tuple[str, ...]:
        """Checked stop strings; raises `ValueError`."""
        strings = (stop,) if isinstance(stop, str) else tuple(stop or ())
        good = len(strings) <= STOP_STRINGS and all(0 < len(one) <= LONGEST_STOP for one in strings)
        require(good, f"stop takes up to {STOP_STRINGS} strings of 1 to {LONGEST_STOP} characters")
        return strings

    async def pieces(
        self, ids: Sequence[int], sampling: Sampling, stop: tuple[str, ...] = (), *, owner: str | None = None
    ) -> AsyncGenerator[TextChunk, None]:
        """Pieces of the continuation, once its turn has come; closing this ends the work. Raises `QueueFull`.

        `cancel(owner)` ends it too, with a last piece that says so.
        """
        job = _Job(ids, sampling, stop, asyncio.get_running_loop(), owner)
        with self._changed:
            if len(self._line) >= self.max_waiting:
                raise QueueFull(f"the model is busy and {self.max_waiting} requests wait already; try again soon")
            self._line.append(job)
            self._changed.notify()
        try:
            while True:
                items = [await job.pieces.get()]
                while not job.pieces.empty():  # a slow reader gets what has gathered as one piece
                    items.append(job.pieces.get_nowait())
                last = items[-1]
                if isinstance(last, Exception):
                    raise last
                yield replace(last, text="".join(item.text for item in items if isinstance(item, TextChunk)))
                if last.reason is not None:
                    return
        finally:
            job.left.set()
            with self._changed:
                if job in self._line:
                    self._line.remove(job)

    def cancel(self, owner: str) -> None:
        """End the requests of `owner`, under way or waiting."""
        with self._changed:
            for job in [job for job in self._line if job.owner == owner]:
                self._line.remove(job)
                job.put(TextChunk(text="", tokens=0, prompt_tokens=len(job.ids), seconds=0.0,
                                  seconds_to_first=None,
                              reason="cancelled"))  # fmt: skip
            if self._now is not None and self._now.owner == owner:
                self._now.left.set()  # the stream itself says how it ended

    def close(self) -> None:
        """End what is under way and the thread: Python must not end inside of a model's own code."""
        with self._changed:
            self._closed = True
            for job in [*self._line, *([self._now] if self._now else [])]:
                job.left.set()
            self._changed.notify()
        self._thread.join(SECONDS_TO_CLOSE)

    def _warm_up(self) -> None:
        """Have what the first visitor will ask for compiled; a failure is for that visitor to meet."""
        with contextlib.suppress(Exception):
            ids, new = self.completer.encode("Once"), min(WARM_UP_TOKENS, self.max_new_tokens)
            sampling = Sampling(max_new_tokens=new, temperature=1.0, top_k=50, top_p=0.9)
            for _ in self.completer.stream(ids, sampling, cancelled=lambda: True):
                pass

    def _work(self) -> None:
        self._warm_up()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._line or self._closed)
                if self._closed:
                    return
                self._now = job = self._line.popleft()
            self._serve(job)
            with self._changed:
                self._now = None

    def _serve(self, job: _Job) -> None:
        try:
            for piece in self.completer.stream(job.ids, job.sampling, job.stop, cancelled=job.left.is_set):
                job.put(piece)
        except ValueError as error:
            job.put(error)
        except Exception as error:
            # whatever it was (memory, a device), the next request finds the worker there
            traceback.print_exc()
            job.put(RuntimeError(f"the model failed with {type(error).__name__}; the server's log says more"))


def check_text(text: Any, what: str) -> str:
    """`text`, if a model can be asked to read it; raises `ValueError` naming it `what`."""
    require(isinstance(text, str), f"{what} must be text")
    require(len(text) <= LONGEST_PROMPT, f"{what} has {len(text):,} characters; {LONGEST_PROMPT:,} is the most")
    require("\0" not in text, f"{what} holds a NUL character at position {text.find(chr(0))}; take it out")
    half = next((i for i, character in enumerate(text) if "\ud800" <= character <= "\udfff"), None)
    require(half is None, f"{what} holds half a character at position {half}")
    return text


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _shown(value: Any) -> str:
    """`value` as a person can read it in one line, however large it came."""
    try:
        text = repr(value)
    except ValueError:  # an int of too many digits to print
        return "a number of thousands of digits"
    return text if len(text) <= 40 else f"{text[:40]}…"
