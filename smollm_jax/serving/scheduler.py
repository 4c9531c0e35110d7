"""A bounded queue of requests served by one thread, which alone uses the model.

The thread serves as many as the model has slots, a part of each in turn (turns.py). If a reader leaves, its
request leaves the queue at once or ends at the next chunk. Longest prompt, numbers and stop strings are checked by
limits.py. A request holds its engine, so new weights wait for the next request.
"""

import asyncio
import contextlib
import threading
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from smollm_jax.generation.sampling import Sampling, Score
from smollm_jax.runtime.errors import UserError, require, say
from smollm_jax.serving import SLOTS, ladder
from smollm_jax.serving.claims import Claims, begun
from smollm_jax.serving.completion import Completer, check_text
from smollm_jax.serving.jobs import END, Asked, Job, ModelGone, Work
from smollm_jax.serving.limits import QueueFull, check_length, checked_bias, checked_sampling
from smollm_jax.serving.text import TextChunk
from smollm_jax.serving.turns import Turns
from smollm_jax.serving.weights import NEWEST, Key, Weights
from smollm_jax.tokenizer.chat_template import encode_chat
from smollm_jax.tokenizer.renderer import Renderer, RenderingLimit
from smollm_jax.tokenizer.tokenizer import SpecialTokens

MOST_ANNOUNCED = 1_000  # requests on their way, of which Stop may be pressed already
SECONDS_TO_CLOSE = 15
GONE = "the model has stopped; start the server again"
ENCODING = 2  # threads at most, so that other work finds a free thread
T = TypeVar("T")


class Scheduler:
    """The only user of a `Completer`. It serves clients in turn, and a client's requests in order of arrival."""

    def __init__(
        self, completer: Completer, *, max_waiting: int, max_new_tokens: int, weights: Weights | None = None,
        slots: int = SLOTS,
    ):  # fmt: skip
        require(max_waiting > 0, f"max_waiting={max_waiting} must be at least 1")
        require(max_new_tokens > 0, f"max_new_tokens={max_new_tokens} must be at least 1")
        require(completer.context > 1, "the context of the model is one token, which leaves no room for a new one")
        self.completer, self.max_waiting = completer, max_waiting
        self.weights = weights or Weights(completer.engine)
        self.max_new_tokens = min(max_new_tokens, completer.context - 1)
        self.turns = Turns(completer, slots)
        self._queue: deque[Job] = deque()
        self._changed = threading.Condition()
        self._now: list[Job] = []
        self.has_chat = bool(completer.tokenizer.chat_template)
        self._renderer = Renderer()
        self._announced: dict[str, bool] = {}  # owners of requests on their way, and whether they cancelled
        self._served: dict[str, int] = {}  # per client the number of its last served request
        self._encoding, self._rendering = asyncio.Semaphore(ENCODING), asyncio.Semaphore(1)
        self._claims = Claims(self.weights)
        self._closed, self._ends = False, threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name="model")
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Count the requests before a new request."""
        return max(len(self._queue) + len(self._now) + 1 - self.turns.count, 0)

    @property
    def is_closed(self) -> bool:
        """Return whether the model's thread has ended."""
        return self._closed

    @property
    def is_busy(self) -> bool:
        """Return whether a request waits or is served."""
        return bool(self._queue or self._now)

    @property
    def is_compiling(self) -> bool:
        """Return whether the running request waits for a program to compile."""
        return getattr(self.completer.engine, "is_compiling", False)

    def before(self, owner: str) -> int:
        """Count the requests before the waiting request of `owner`. Returns 0 without a waiting request."""
        with self._changed:
            waiting = [job.owner for job in self._queue]
            return waiting.index(owner) + bool(self._now) if owner in waiting else 0

    async def in_turn(self, encode: Callable[..., T], *arguments: Any, chat: bool = False) -> T:
        """Call `encode` in a thread. At most `ENCODING` calls run at a time, besides one that renders a chat.

        A cancelled call no longer waits for its turn. A thread cannot be ended, so the turn ends with the thread.
        """
        return await asyncio.shield(await begun(self._rendering if chat else self._encoding, encode, *arguments))

    def encode(self, text: Any, special_tokens: SpecialTokens | None = None) -> list[int]:
        """Encode a prompt. Raises `UserError` if the prompt is no text, empty or too long."""
        check_length(text if isinstance(text, str) else "", "the prompt has")
        return self.completer.encode(text, special_tokens)

    def encode_chat(
        self, messages: list[dict[str, str]], special_tokens: SpecialTokens | None = None
    ) -> list[int]:
        """Encode a conversation under the chat template. Raises `UserError` as `encode` does."""
        check_length("".join(message["content"] for message in messages), "the messages have")
        for message in messages:
            check_text(message["content"], "a message")
        tokenizer, render = self.completer.tokenizer, self._renderer.render
        return self.completer.checked(encode_chat(tokenizer, messages, special_tokens, render=render))

    def try_chat(self) -> None:
        """Render the chat template once. The server has no chat if the template goes beyond its limits."""
        if self.has_chat:
            try:
                encode_chat(
                    self.completer.tokenizer, [{"role": "user", "content": "Hi"}], render=self._renderer.render
                )
            except RenderingLimit as error:
                say(f"no chat: {error}")
                self.has_chat = False
            except UserError:  # the template may require other turns
                pass

    def sampling(self, *, ignore_eos: bool = False, logit_bias: Any = None, **numbers: Any) -> Sampling:
        """Check the numbers of a request. Draws `seed` if it is None. Raises `UserError` naming the number."""
        bias = checked_bias(logit_bias, self.completer.vocab_size)
        return replace(checked_sampling(numbers, self.max_new_tokens), ignore_eos=ignore_eos, logit_bias=bias)

    @contextlib.asynccontextmanager
    async def request(self, client: str) -> AsyncGenerator[Asked, None]:
        """Give what the texts of a request belong to, with the newest weights for all of them."""
        async with self._claims.of(NEWEST, client) as weights:
            yield Asked(weights)

    async def stream(
        self, ids: Sequence[int], sampling: Sampling, stop: tuple[str, ...] = (), *,
        owner: str | None = None, client: str = "", weights: str = NEWEST, asked: Asked | None = None,
        scored: bool = False, reads_scores: bool = False,
    ) -> AsyncGenerator[TextChunk, None]:  # fmt: skip
        """Queue a request and yield its chunks. Closing the iterator ends the work. Raises `QueueFull`.

        `cancel(owner)` ends the work too. The last chunk then has the reason "cancelled". Clients are served in
        turn, and the requests of one client in order. `weights` are a name of `Weights.choices`. `asked` is what
        several texts belong to, and `Work` says what the scores are. Raises `ModelGone` after the end of the
        thread.
        """
        cancelled = TextChunk(text="", prompt_tokens=len(ids), reason="cancelled")
        work = Work(ids=tuple(ids), sampling=sampling, stop=stop, scored=scored, reads_scores=reads_scores)
        items_of = self._items(work, cancelled, owner, client, weights, asked or Asked())
        async with contextlib.aclosing(items_of) as parts:
            async for key, items in parts:  # a slow reader gets all waiting chunks as one
                yield replace(
                    items[-1], text="".join(item.text for item in items), weights=key,
                    scored=tuple(token for item in items for token in item.scored),
                    prompt_scores=tuple(score for item in items for score in item.prompt_scores),
                )  # fmt: skip
                if items[-1].reason is not None:
                    return

    async def score(
        self, ids: Sequence[int], *, owner: str | None = None, client: str = "", weights: str = NEWEST,
        asked: Asked | None = None,
    ) -> list[Score] | None:  # fmt: skip
        """Queue the scoring of a text and return the scores of each id but the first. None if cancelled."""
        work, found = Work(ids=tuple(ids)), []
        items_of = self._items(work, END, owner, client, weights, asked or Asked())
        async with contextlib.aclosing(items_of) as parts:
            async for _, items in parts:
                found += [score for item in items for score in item]
        return found if len(found) == len(ids) - 1 else None

    async def _items(  # noqa: PLR0917
        self, work: Work, cancelled: Any, owner: str | None, client: str, weights: str, asked: Asked
    ) -> AsyncGenerator[tuple[Key, list[Any]], None]:
        """Queue a job. Yield the key of its weights and its items, all that are ready at a time, until `END`."""
        whole = asked.weights and contextlib.nullcontext(asked.weights)
        async with whole or self._claims.of(weights, client) as (key, engine):
            job = Job(work, engine, cancelled, asyncio.get_running_loop(), owner, client, asked)
            try:
                with self._changed:
                    if self._closed:
                        raise ModelGone(GONE)
                    if owner is not None and self._announced.pop(owner, False):
                        job.items.put_nowait(cancelled)
                    else:
                        waiting = {other.asked for other in self._queue} - {asked}
                        if len(waiting) >= self.max_waiting and not asked.is_served:
                            self._make_room(client)
                        self._queue.append(job)
                        self._changed.notify()
                while True:
                    items = [await job.items.get()]
                    while not job.items.empty():
                        items.append(job.items.get_nowait())
                    if isinstance(items[-1], Exception):
                        raise items[-1]
                    if (is_over := items[-1] is END) and len(items) == 1:
                        return
                    yield key, items[:-1] if is_over else items
                    if is_over:
                        return
            finally:
                job.left.set()
                with self._changed:
                    if job in self._queue:
                        self._queue.remove(job)

    def _make_room(self, client: str) -> None:
        """Refuse the newest request of the busiest client. Raises `QueueFull` unless `client` has two fewer."""
        full = QueueFull(f"the model is busy and {self.max_waiting} requests are waiting; try again soon")
        unserved = {job.asked: job.client for job in self._queue if not job.asked.is_served}  # in order of arrival
        waiting = Counter(unserved.values())
        other, most = waiting.most_common(1)[0] if waiting else (client, 0)
        if waiting[client] + 1 >= most:
            raise full
        newest = [asked for asked, name in unserved.items() if name == other][-1]
        for job in [job for job in self._queue if job.asked is newest]:
            self._queue.remove(job)
            job.put(full)

    def announce(self, owner: str) -> None:
        """Expect a request of `owner`, which `cancel` then ends even if it comes later than the cancelling."""
        with self._changed:
            self._announced.pop(owner, None)
            self._announced[owner] = False
            if len(self._announced) > MOST_ANNOUNCED:
                del self._announced[next(iter(self._announced))]

    def cancel(self, owner: str) -> None:
        """End the running, waiting and announced requests of `owner`."""
        with self._changed:
            if owner in self._announced:
                self._announced[owner] = True
            for job in [job for job in self._queue if job.owner == owner]:
                self._queue.remove(job)
                job.put(job.cancelled)
            for job in self._now:
                if job.owner == owner:
                    job.left.set()  # the completer's stream yields the last chunk

    def close(self) -> None:
        """End the running request and the thread, because Python must not exit inside native code."""
        with self._changed:
            self._closed = True
            for job in self._now:
                job.left.set()
            self._changed.notify()
        self._ends.set()
        self._renderer.close()
        self.weights.close()
        self._thread.join(SECONDS_TO_CLOSE)

    def _work(self) -> None:
        ladder.first_rung(self.completer, self.max_new_tokens)
        ladder.climb(self.completer, self.max_new_tokens, lambda: self.is_busy, self._ends, self.turns.slots)
        try:
            while self._take():
                self.turns.step()
                with self._changed:
                    self._now = self.turns.jobs
        finally:
            with self._changed:
                self._closed = True
                for job in (*self._now, *self._queue):
                    job.put(ModelGone(GONE))

    def _take(self) -> bool:
        """Begin the jobs that fit, and wait for one if none is under way. False after `close`."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._now or self._closed)
                if self._closed and not self._now:
                    return False
                if self._closed or len(self._now) >= self.turns.count:
                    return True
                job = self._next()
                if job is None or not self.turns.fits(job):
                    return True
                self._queue.remove(job)
                job.asked.is_served = True
                count = max(self._served.values(), default=0) + 1
                here = {job.client for job in self._queue}  # clients that do not wait are forgotten
                kept = {name: at for name, at in self._served.items() if name in here}
                self._served = kept | {job.client: count}
                self.turns.begin(job)
                self._now = self.turns.jobs

    def _next(self) -> Job | None:
        """Return the first request of the client that was served longest ago."""
        return min(self._queue, key=lambda job: self._served.get(job.client, 0), default=None)
