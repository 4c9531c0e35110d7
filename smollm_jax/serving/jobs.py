"""A request on its way through the queue, from its reader to the model's thread."""

import asyncio
import threading
from dataclasses import dataclass, field
from typing import Any

from smollm_jax.generation.sampling import Sampling
from smollm_jax.serving.completion import Engine

END = object()  # of the items of a job


class ModelGone(RuntimeError):
    """The error after the model's thread has ended. The server must be started again."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a job asks of an engine: to continue a prompt, or to score it alone if there is no `sampling`.

    `scored` wants the scores of new tokens, and `reads_scores` scores of the prompt.
    """

    ids: tuple[int, ...]
    sampling: Sampling | None = None
    stop: tuple[str, ...] = ()
    scored: bool = False
    reads_scores: bool = False


@dataclass(eq=False)
class Asked:
    """A request of a client, whose jobs together have one place in the queue.

    With `weights`, key and engine, all its jobs have these. So a new checkpoint comes between two requests.
    """

    weights: tuple[Any, Engine] | None = None
    is_served: bool = False  # a job of it has begun


@dataclass(eq=False)
class Job:
    """A part of a request: what it does with an engine, and what its reader gets."""

    work: Work
    engine: Engine
    cancelled: Any  # its last item if it is cancelled before its turn
    loop: asyncio.AbstractEventLoop
    owner: str | None
    client: str
    asked: Asked
    items: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    left: threading.Event = field(default_factory=threading.Event)

    def put(self, item: Any) -> None:
        try:
            self.loop.call_soon_threadsafe(self.items.put_nowait, item)
        except RuntimeError:  # the event loop of the reader is closed
            self.left.set()
