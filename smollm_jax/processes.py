"""The processes of one job: how they find each other, agree, and notice that one of them is gone.

Each of them runs the same program. What only one may do (lock, records, exports) the first does; what they
have to know of each other goes through `gather`, which all of them call at the same place.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import glob
from pathlib import Path
from typing import Any, TypeVar

from smollm_jax.arguments import explained, is_ours
from smollm_jax.config import ComputeConfig, require
from smollm_jax.stop import EXIT_FAILED, EXIT_STOPPED, end_with

T = TypeVar("T")
_KEPT: list[Any] = []  # what C code has a pointer to
_LEAVING: list[int | None] = []  # the exit code once it is settled; None while the processes come together

BEAT_SECONDS = 1.0
SILENT_SECONDS = 30.0  # after which a process is taken for dead
TIMES_THE_SLOWEST = 20
SHOWN_SECONDS = 10.0  # within which a change of the run folder has to be seen by all
# the library's own watch ends a process by a crash; ours comes first, in words and with an exit code
LIBRARY_SECONDS = 600
CONNECT_SECONDS = 300
FIRST_LEAVES_SECONDS = 2.0  # after the others
AGAIN = "what was saved stands; run the same command in all processes to go on"


class PeerLost(RuntimeError):
    """Another process did not take part in what all had to."""


class Processes:
    """All processes of the job; `index` is this one. One alone is a job too."""

    def __init__(self, index: int = 0, count: int = 1):
        self.index, self.count = index, count
        self._left = False
        self._due: tuple[float, str] | None = None
        self._slowest = 0.0

    @property
    def several(self) -> bool:
        return self.count > 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes records."""
        return self.index == 0

    def gather(self, value: Any) -> list[Any]:
        """The JSON values of all processes, in their order; waits until each has given its own.

        Raises `PeerLost` where one is gone.
        """
        if not self.several:
            return [value]
        import numpy as np
        from jax.experimental.multihost_utils import process_allgather

        data = np.frombuffer(json.dumps(value).encode(), np.uint8)
        try:
            sizes = np.asarray(process_allgather(np.array([data.size]))).ravel()
            padded = np.zeros(int(sizes.max()), np.uint8)
            padded[: data.size] = data
            rows = np.asarray(process_allgather(padded)).reshape(self.count, -1)
        except (ValueError, RuntimeError) as error:  # Gloo's comes as the one, others' as the other
            raise PeerLost(" ".join(str(error).split())[:300]) from error
        return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]

    def require_same(self, value: Any, what: str) -> None:
        """Raise `ValueError` in all processes where they do not agree on a JSON value."""
        values = self.gather(value)
        other = next((i for i, theirs in enumerate(values) if theirs != values[0]), None)
        require(other is None, f"{what} are not the same in process 0 and process {other}")

    def agree_on(self, settings: dict[str, Any]) -> None:
        """Raise `ValueError` naming the settings, flat, in which one process differs from the first."""
        everyone = self.gather(settings)
        for index, theirs in enumerate(everyone):
            differ = [f"{n} {everyone[0].get(n)} and {v}" for n, v in theirs.items() if everyone[0].get(n) != v]
            require(not differ, f"process 0 and process {index} were started with different settings: {differ}")

    def together(self, work: Callable[[], T]) -> T:
        """The outcome of `work`, done in each process; where it fails in one, it fails in all."""
        if not self.several:
            return work()
        from smollm_jax.remote import SourceTimeout

        result, own, fault = None, None, None
        try:
            result = work()
        except PeerLost:
            raise
        except Exception as error:
            own = error
            kind = (
                "wait" if isinstance(error, SourceTimeout) else "mistake" if isinstance(error, ValueError) else ""
            )
            fault = [kind, f"{error}"]
        faults = self.gather(fault)
        if own is not None:
            raise own
        for index, theirs in enumerate(faults):
            if theirs is not None:
                failure = {"wait": SourceTimeout, "mistake": ValueError}.get(theirs[0], RuntimeError)
                raise failure(f"process {index}: {theirs[1]}")
        return result  # type: ignore[return-value]

    def in_turn(self, work: Callable[[], T]) -> T:
        """The outcome of `work`, which leaves something in the run folder that the others then find there: the
        first process does it before them.
        """
        result = self.together(lambda: work() if self.first else None)
        others = self.together(lambda: None if self.first else work())
        return result if self.first else others  # type: ignore[return-value]

    def ending(self, work: Callable[[], int]) -> int:
        """The exit code of `work`. Several processes meet before they leave: the library takes the first to go
        for dead, and aborts the others. A mistake that all have met becomes its exit code here.
        """
        if not self.several:
            return work()
        try:
            code = work()
        except ValueError as error:
            if not is_ours(error):
                raise
            code = explained(error)
        if not self._left:
            self._left = True
            _LEAVING.append(code)
            self.gather(code)
            if self.first:
                time.sleep(FIRST_LEAVES_SECONDS)
        return code

    @contextmanager
    def watched(self, run_dir: Path) -> Iterator[None]:
        """Inside, leave with exit code 75 when another process falls silent; all see the folder `run_dir`.

        An error of the devices is often what the death of another looks like: it waits until that is known.
        """
        if not self.several:
            yield
            return
        folder = run_dir / ".processes"
        self.together(lambda: folder.mkdir(parents=True, exist_ok=True))
        self._share(folder)
        over = threading.Event()
        threading.Thread(target=self._beat, args=(folder, over), name="heartbeat", daemon=True).start()
        threading.Thread(target=self._listen, args=(folder, over), name="watch", daemon=True).start()
        try:
            yield
        except Exception as error:
            lost = isinstance(error, PeerLost) or "Gloo" in str(error)
            if lost or type(error).__module__.startswith("jax"):
                time.sleep(SILENT_SECONDS + 2 * BEAT_SECONDS)
            if lost:
                end_with(f"the connection to another process broke: {str(error)[:200]}; {AGAIN}", EXIT_STOPPED)
            raise
        finally:
            over.set()

    @contextmanager
    def within(self, seconds: float, what: str) -> Iterator[None]:
        """Inside, and while `watched`, leave with exit code 75 when `what` is not done after `seconds`, or many
        times what the slowest took before: devices that hang, or a process that is alive and does not move. The
        first has all the time it needs.
        """
        began = time.monotonic()
        if self._slowest:
            limit = max(seconds, TIMES_THE_SLOWEST * self._slowest)
            self._due = began + limit, f"{what} was not done after {limit:g} s"
        try:
            yield
        finally:
            self._due, self._slowest = None, max(self._slowest, time.monotonic() - began)

    def _share(self, folder: Path) -> None:
        """Raise `ValueError` in all processes unless each sees at once what the first writes into `folder`."""
        token = self.gather(f"{os.getpid()} {time.time()}")[0]
        for word in (token, f"{token} again"):
            blind = self._blind(folder / "shared", word)
            require(
                not blind,
                f"what process 0 writes into {folder.parent} is not seen by process {', '.join(map(str, blind))} "
                f"within {SHOWN_SECONDS:.0f} s; --run-dir has to be a folder that all share, and that shows what "
                "changes at once",
            )

    def _blind(self, path: Path, word: str) -> list[int]:
        """The processes that do not see the `word` that the first writes."""
        self.together(lambda: path.write_text(word) if self.first else None)
        deadline = time.monotonic() + SHOWN_SECONDS
        while _read(path) != word and time.monotonic() < deadline:
            time.sleep(0.1)
        return [i for i, sees in enumerate(self.gather(_read(path) == word)) if not sees]

    def _beat(self, folder: Path, over: threading.Event) -> None:
        beats = 0
        while not over.wait(BEAT_SECONDS):
            beats += 1
            try:
                (folder / str(self.index)).write_text(f"{os.getpid()} {beats}")
            except OSError:
                continue  # a full disk is no death

    def _listen(self, folder: Path, over: threading.Event) -> None:
        last = {i: ("", time.monotonic()) for i in range(self.count) if i != self.index}
        while not over.wait(BEAT_SECONDS):
            due = self._due
            if due is not None and time.monotonic() > due[0]:
                end_with(f"{due[1]}; {AGAIN}", EXIT_STOPPED)
            for i, (words, since) in last.items():
                heard, now = _read(folder / str(i)), time.monotonic()
                if heard != words:
                    last[i] = heard, now
                elif now - since > SILENT_SECONDS:
                    end_with(
                        f"process {i} of {self.count} has been silent for {SILENT_SECONDS:.0f} s; {AGAIN}",
                        EXIT_STOPPED,
                    )


def join(compute: ComputeConfig) -> Processes:
    """Connect with the other processes of the job, before anything else is asked of JAX.

    They are those of `--coordinator`, or what SLURM, Open MPI, Cloud TPU or Kubernetes have started.
    """
    given = {
        "coordinator_address": compute.coordinator,
        "num_processes": compute.num_processes,
        "process_id": compute.process_id,
    }
    if compute.coordinator is None:
        if not _launched():
            return Processes()
        given = _of_an_indexed_job()
    import jax

    _keep_stdout()
    _explain_abort()
    if compute.coordinator is not None and compute.process_id:
        _wait_for(compute.coordinator)
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from us
    try:
        jax.distributed.initialize(
            **given,  # type: ignore[arg-type]
            heartbeat_timeout_seconds=LIBRARY_SECONDS,
            initialization_timeout=CONNECT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        if compute.coordinator is None and "coordinator_address" in str(error) and not _of_several():
            _LEAVING.clear()  # a TPU of one host, such as a notebook's: nobody to be found
            return Processes()
        where = compute.coordinator or "found by the launcher"
        words = " ".join(str(error).split())
        raise ValueError(
            f"the job's processes did not come together (coordinator {where}): {words:.300}"
        ) from None
    _LEAVING.clear()
    return Processes(jax.process_index(), jax.process_count())


def _wait_for(coordinator: str) -> None:
    """Wait until the first process listens; raises `ValueError` where it does not in time."""
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + CONNECT_SECONDS
    while not _answers(host, port):
        require(
            time.monotonic() < deadline,
            f"--coordinator {coordinator} does not answer; is the process with --process-id 0 running there?",
        )
        time.sleep(0.2)


def _answers(host: str, port: str) -> bool:
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError:
        return False
    return True


def _keep_stdout() -> None:
    """Keep standard output for results: Gloo, the transport between CPUs, writes its greetings there."""
    sys.stdout.flush()
    results = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(results, "w", buffering=1)


def _explain_abort() -> None:
    """JAX's client has no callback that works for what it cannot bear: a process that does not come, or the first
    one gone. It aborts; so the abort is caught, and becomes words and an exit code.
    """

    def aborted(number: int) -> None:
        if _LEAVING == [None]:
            end_with(f"the job's processes did not come together within {CONNECT_SECONDS} s", EXIT_FAILED)
        if _LEAVING:
            os._exit(_LEAVING[0] or 0)
        if _first_is_gone():
            end_with(f"the first process of the job is gone; {AGAIN}", EXIT_STOPPED)
        os._exit(128 + number)

    _LEAVING[:] = [None]
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)
    _KEPT.append(handler)
    ctypes.CDLL(None).signal(signal.SIGABRT, handler)


def _first_is_gone() -> bool:
    from jax._src import distributed

    state = distributed.global_state
    host, _, port = str(getattr(state, "coordinator_address", "")).rpartition(":")
    return getattr(state, "process_id", 0) > 0 and port.isdecimal() and not _answers(host, port)


def _launched() -> bool:
    """Whether a launcher has started this process as one of several."""
    env = os.environ
    on_tpu_machine = bool(glob("/dev/accel*")) or "TPU_ACCELERATOR_TYPE" in env
    return _of_several() or (on_tpu_machine and env.get("JAX_PLATFORMS", "tpu").startswith("tpu"))


def _of_several() -> bool:
    """Whether the environment itself says that there are others."""
    env = os.environ
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1 or int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return True
    if _of_an_indexed_job():
        return True
    named = env.get("TPU_WORKER_HOSTNAMES", "")
    # where there is no TPU, libtpu leaves a sentence there for child processes
    hosts = [] if " " in named else [host for host in named.split(",") if host]
    return len(hosts) > 1 or int(env.get("MEGASCALE_NUM_SLICES", 1)) > 1


def _of_an_indexed_job() -> dict[str, Any]:
    """An indexed Job or JobSet of Kubernetes gives each pod its number; its manifest gives the rest."""
    env = os.environ
    if not {"JOB_COMPLETION_INDEX", "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES"} <= env.keys():
        return {}
    return {
        "coordinator_address": env["JAX_COORDINATOR_ADDRESS"],
        "num_processes": int(env["JAX_NUM_PROCESSES"]),
        "process_id": int(env["JOB_COMPLETION_INDEX"]),
    }


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
