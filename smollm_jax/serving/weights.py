"""Weights of a served run: its checkpoints and export, each in an engine of its own.

A request names its weights and gets an engine, so weights never change inside a request. A thread looks for new
checkpoints and loads the newest one before any request asks for it. A thread of the visitor loads older weights.
The model's thread thus never waits for a disk. Nothing is written to the run.
"""

import atexit
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smollm_jax.runs.load import checkpoint_times, is_good, load_model
from smollm_jax.runtime.errors import one_line, require, say
from smollm_jax.serving.limits import QueueFull

NEWEST, EXPORT = "newest", "export"
MOST_ENGINES = 3  # at a time: the newest checkpoint and two to compare
LOOK_SECONDS = 2.0  # between looks for a new checkpoint
CLOSE_SECONDS = 10.0  # how long an exit waits for a checkpoint that is being loaded
Key = int | str | None  # a step, `EXPORT`, or None for a model that is no run
Rebuild = Callable[[Any, Any], Any]  # from architecture and parameters to an engine


class Weights:
    """The engines of a model. `newest` is the key of the weights that a request gets by default.

    Without a `run` and a function to `rebuild` an engine there is one engine, and `choices` is empty.
    """

    def __init__(
        self, engine: Any, *, run: Path | None = None, step: int | None = None, rebuild: Rebuild | None = None
    ):
        self.newest: Key = step
        self._run = run.absolute() if run is not None and rebuild is not None else None
        self._rebuild = rebuild
        self._engines: dict[Key, Any] = {step: engine}  # the latest used is last
        self._stamps: dict[Key, int | None] = {}  # when the files of an engine's weights were written
        self._users: Counter[Key] = Counter()
        self._failed: tuple[int, int] | None = None  # a newest step that could not be loaded, and its time
        self._good: dict[int, tuple[int, bool]] = {}  # per step: time of its folder, and whether it verified
        self._lock, self._loading = threading.Lock(), threading.Lock()
        self._closed = threading.Event()
        self._stamps[step] = self._stamp(step)
        if self._run is not None:
            thread = threading.Thread(target=self._watch, daemon=True, name="checkpoints")
            thread.start()
            atexit.register(thread.join, CLOSE_SECONDS)
            atexit.register(self.close)  # called first

    @property
    def has_run(self) -> bool:
        return self._run is not None

    def choices(self) -> list[tuple[str, str]]:
        """Return label and name of the weights of a run, newest first. Empty for a single model."""
        if self._run is None:
            return []
        steps = sorted((step for step, (_, good) in self._good.items() if good), reverse=True)
        found = [(f"Newest (step {self.newest:,})", NEWEST)]
        found += [(f"Step {step:,}", str(step)) for step in steps]
        return found + [("Export", EXPORT)] * (self._run / EXPORT / "config.json").is_file()

    def take_loaded(self, choice: str) -> tuple[Key, Any] | None:
        """Return key and engine of loaded weights until `give_back`, None if they are not loaded.

        Raises `UserError` for a wrong name.
        """
        key = self._key(choice)
        engine = self._kept(key, is_used=True)
        return None if engine is None else (key, engine)

    def take(self, choice: str) -> tuple[Key, Any]:
        """Return key and engine of some weights until `give_back`. Loads them if needed, which takes seconds.

        Raises `UserError` for weights that are missing or damaged, and `QueueFull` if too many are in use.
        """
        with self._loading:
            if (taken := self.take_loaded(choice)) is not None:
                return taken
            key = self._key(choice)
            return key, self._load(key, is_used=True)

    def give_back(self, key: Key) -> None:
        with self._lock:
            self._users[key] -= 1

    def close(self) -> None:
        self._closed.set()

    def _key(self, choice: str) -> Key:
        if choice == NEWEST:
            return self.newest
        require(self._run is not None, f"the model has no checkpoint {choice!r:.40}; it is no run")
        if choice == EXPORT:
            there = self._run is not None and (self._run / EXPORT / "config.json").is_file()
            require(there, "the run has no export yet")
            return EXPORT
        good = isinstance(choice, str) and choice.isdecimal() and len(choice) < 19
        require(good, f"checkpoint {choice!r:.40} must be newest, export or a step")
        step = int(choice)
        steps = ", ".join(map(str, sorted(self._good))) or "none yet"
        known = step == self.newest or self._good.get(step, (0, False))[1]
        require(known, f"the run holds no good checkpoint of step {step}; there are: {steps}")
        return step

    def _kept(self, key: Key, *, is_used: bool) -> Any:
        with self._lock:
            engine, stamp = self._engines.pop(key, None), self._stamp(key)
            if stamp not in (None, self._stamps.get(key)) and not self._users[key]:
                return None  # written anew meanwhile
            if engine is not None:
                self._engines[key] = engine
                self._users[key] += is_used
            return engine

    def _load(self, key: Key, *, is_used: bool) -> Any:
        assert self._run is not None
        assert self._rebuild is not None
        stamp = self._stamp(key)
        if key == EXPORT:
            config, params, _ = load_model(self._run / EXPORT)
        else:
            config, params, _ = load_model(self._run, int(key or 0))
        self._make_room(more=not is_used)
        engine = self._rebuild(config, params)
        with self._lock:
            self._engines[key], self._stamps[key] = engine, stamp
            self._users[key] += is_used
        return engine

    def _stamp(self, key: Key) -> int | None:
        """Return when the files of some weights were written. None if they are gone: what is loaded stays."""
        if self._run is None:
            return None
        try:
            return (self._run / (EXPORT if key == EXPORT else f"checkpoints/{key}")).stat().st_mtime_ns
        except OSError:
            return None

    def _make_room(self, *, more: bool = False) -> None:
        """Forget the weights that were used longest ago. Raises `QueueFull` if requests use all.

        The newest checkpoint gets `more` room, so that requests for old ones cannot keep it away.
        """
        with self._lock:
            if len(self._engines) < MOST_ENGINES:
                return
            idle = [key for key in self._engines if not self._users[key] and key != self.newest]
            if not idle and more:
                return
            if not idle:
                raise QueueFull("the other checkpoints are in use; try again soon")
            engine = self._engines.pop(idle[0])
        unload = getattr(engine, "unload", None)  # compiled programs may refer to the first engine
        if unload is not None:
            unload()

    def _watch(self) -> None:
        """Verify new checkpoints, and load the newest one. Errors are logged once."""
        told = ""
        while True:
            try:
                self._look()
            except QueueFull:  # the next look may find room
                self._failed = None
            except Exception as error:  # such as a checkpoint that the run has just removed
                if (line := one_line(error)) != told:
                    say(f"a new checkpoint could not be loaded: {line}")
                told = line
            if self._closed.wait(LOOK_SECONDS):
                return

    def _look(self) -> None:
        assert self._run is not None
        times, known = checkpoint_times(self._run), self._good
        self._good = {
            step: known[step] if known.get(step, (0, False))[0] == changed else (changed, is_good(self._run, step))
            for step, changed in times.items()
        }
        newest = max((step for step, (_, good) in self._good.items() if good), default=None)
        if newest is None or newest == self.newest or not isinstance(self.newest, int | None):
            return
        if self._failed == (newest, times[newest]):
            return
        self._failed = newest, times[newest]  # not tried again every two seconds
        with self._loading:
            if self._kept(newest, is_used=False) is None:
                self._load(newest, is_used=False)
        self._failed, self.newest = None, newest
        say(f"serving     the checkpoint of step {newest:,}")
