"""A register of compiled programs: which exist, and whether a caller waits for one.

Two threads never compile the same program: the second one waits for the first.
"""

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any


class Programs:
    """The programs of a `Generator` by name and shapes. `waiting` callers compile one now, or wait for it."""

    def __init__(self) -> None:
        self.waiting = 0
        self._known: set[Hashable] = set()
        self._pending: dict[Hashable, threading.Event] = {}
        self._lock = threading.Lock()

    def knows(self, *key: Hashable) -> bool:
        """Return whether a program was compiled."""
        return key in self._known

    @contextlib.contextmanager
    def calling(self, *key: Hashable) -> Iterator[None]:
        """Enclose the call of a program, which compiles it unless it is known."""
        if key in self._known:
            yield
            return
        with self._lock:
            self.waiting += 1
        try:
            with self.compiling(*key):
                yield
        finally:
            with self._lock:
                self.waiting -= 1

    @contextlib.contextmanager
    def compiling(self, *key: Hashable) -> Iterator[bool]:
        """Enclose the compilation of a program. Gives whether it is still unknown, after any other thread's."""
        with self._lock:
            other = self._pending.get(key)
            mine = None if other else self._pending.setdefault(key, threading.Event())
        if other is not None:
            other.wait()
        try:
            yield key not in self._known
            self._known.add(key)
        finally:
            if mine is not None:
                with self._lock:
                    del self._pending[key]
                mine.set()

    def ahead(self, key: tuple[Hashable, ...], program: Any, *arguments: Any, **static: Any) -> Callable[[], None]:
        """Return a function that compiles a program for such arguments, and does not run it, in any thread."""

        def compile_it() -> None:
            with self.compiling(*key) as is_new:
                if is_new:
                    program.lower(*arguments, **static).compile()

        return compile_it
