"""A request on its way through the queue, from its reader to the model's thread."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from smollm_jax.serving.completion import Engine

END = object()  # of the items of a job


class ModelGone(RuntimeError):
    """The error after the model's thread has ended. The server must be started again."""


@dataclass(eq=False)
class Job:
    """A request: what it does with an engine, and what its reader gets."""

    work: Callable[[Callable[[], bool]], Iterator[Any]]  # the argument says whether its reader has left
    engine: Engine
    cancelled: Any  # its last item if it is cancelled before its turn
    loop: asyncio.AbstractEventLoop
    owner: str | None
    client: str
    items: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    left: threading.Event = field(default_factory=threading.Event)

    def put(self, item: Any) -> None:
        try:
            self.loop.call_soon_threadsafe(self.items.put_nowait, item)
        except RuntimeError:  # the event loop of the reader is closed
            self.left.set()
