"""Get the weights of a request, loaded in a thread if needed, so that no client keeps them from the others."""

import asyncio
import contextlib
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from smollm_jax.serving.completion import Engine
from smollm_jax.serving.limits import QueueFull
from smollm_jax.serving.weights import NEWEST, Key, Weights

T = TypeVar("T")


async def begun(turn: asyncio.Semaphore, call: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:
    """Begin a call in a thread when it has its turn, which ends with the thread."""
    await turn.acquire()
    working = asyncio.ensure_future(asyncio.to_thread(call, *arguments))
    working.add_done_callback(lambda _: turn.release())
    return working


class Claims:
    """The weights that the requests of each client use. Old ones are few, and take seconds to load."""

    def __init__(self, weights: Weights):
        self._weights, self._loading = weights, asyncio.Semaphore(1)
        self._claimed: defaultdict[str, Counter[str]] = defaultdict(Counter)

    @contextlib.asynccontextmanager
    async def of(self, choice: str, client: str) -> AsyncIterator[tuple[Key, Engine]]:
        """Give key and engine of some weights to a request.

        Raises `UserError` for weights that are missing or damaged, and `QueueFull` if too many are in use, or if
        another request of the client uses other old ones.
        """
        claimed, name = self._claimed[client], str(choice)  # a page may send anything
        if name != NEWEST and any(count for other, count in claimed.items() if other not in (name, NEWEST)):
            raise QueueFull("your other request uses another checkpoint; wait for it, or stop it")
        claimed[name] += 1
        try:
            key, engine = await self._take(choice)
            try:
                yield key, engine
            finally:
                self._weights.give_back(key)
        finally:
            claimed[name] -= 1
            if not claimed.total():
                self._claimed.pop(client, None)

    async def _take(self, choice: str) -> tuple[Key, Engine]:
        if (taken := self._weights.take_loaded(choice)) is not None:
            return taken
        loading = await begun(self._loading, self._weights.take, choice)
        try:
            return await asyncio.shield(loading)
        except asyncio.CancelledError:
            give_back = self._weights.give_back
            loading.add_done_callback(lambda done: None if done.exception() else give_back(done.result()[0]))
            raise
