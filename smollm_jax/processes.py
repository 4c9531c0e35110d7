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

from smollm_jax.config import ComputeConfig
from smollm_jax.stop import EXIT_STOPPED, end_with

T = TypeVar("T")
_KEPT: list[Any] = []  # what C code has a pointer to

BEAT_SECONDS = 1.0
SILENT_SECONDS = 30.0  # after which a process is taken for dead
# the library's own watch ends a process by a crash; ours comes first, in words and with an exit code
LIBRARY_SECONDS = 600
CONNECT_SECONDS = 300
AGAIN = "what was saved stands; run the same command in all processes to go on"


class Processes:
    """All processes of the job; `index` is this one. One alone is a job too."""

    def __init__(self, index: int = 0, count: int = 1):
        self.index, self.count = index, count

    @property
    def several(self) -> bool:
        return self.count > 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes records."""
        return self.index == 0

    def gather(self, value: Any) -> list[Any]:
        """The JSON values of all processes, in their order; waits until each has given its own."""
        if not self.several:
            return [value]
        import numpy as np
        from jax.experimental.multihost_utils import process_allgather

        data = np.frombuffer(json.dumps(value).encode(), np.uint8)
        sizes = np.asarray(process_allgather(np.array([data.size]))).ravel()
        padded = np.zeros(int(sizes.max()), np.uint8)
        padded[: data.size] = data
        rows = np.asarray(process_allgather(padded)).reshape(self.count, -1)
        return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]

    def together(self, work: Callable[[], T]) -> T:
        """The outcome of `work`, done in each process; where one fails with a `ValueError`, all do."""
        if not self.several:
            return work()
        result, fault = None, None
        try:
            result = work()
        except ValueError as error:
            fault = str(error)
        faults = self.gather(fault)
        index = next((i for i, words in enumerate(faults) if words is not None), None)
        if index is not None:
            raise ValueError(faults[index] if faults[index] == fault else f"process {index}: {faults[index]}")
        return result  # type: ignore[return-value]

    def in_turn(self, work: Callable[[], T]) -> T:
        """The outcome of `work`, which leaves something in the run folder that the others then find there: the
        first process does it before them.
        """
        result = self.together(lambda: work() if self.first else None)
        others = self.together(lambda: None if self.first else work())
        return result if self.first else others  # type: ignore[return-value]

    @contextmanager
    def watched(self, run_dir: Path) -> Iterator[None]:
        """Inside, leave with exit code 75 when another process falls silent; all see the folder `run_dir`.

        An error of the devices is often what the death of another looks like: it waits until that is known.
        """
        if not self.several:
            yield
            return
        folder = run_dir / ".processes"
        folder.mkdir(parents=True, exist_ok=True)
        over = threading.Event()
        threading.Thread(target=self._beat, args=(folder, over), name="heartbeat", daemon=True).start()
        threading.Thread(target=self._listen, args=(folder, over), name="watch", daemon=True).start()
        try:
            yield
        except RuntimeError as error:
            if type(error).__module__.startswith("jax"):
                time.sleep(SILENT_SECONDS + 2 * BEAT_SECONDS)
            raise
        finally:
            over.set()

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
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from us
    try:
        jax.distributed.initialize(
            **given,  # type: ignore[arg-type]
            heartbeat_timeout_seconds=LIBRARY_SECONDS,
            initialization_timeout=CONNECT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        where = compute.coordinator or "found by the launcher"
        words = " ".join(str(error).split())
        raise ValueError(
            f"the processes of the job did not come together (coordinator {where}): {words:.300}"
        ) from None
    processes = Processes(jax.process_index(), jax.process_count())
    if not processes.first:
        _explain_abort()
    return processes


def _keep_stdout() -> None:
    """Keep standard output for results: Gloo, the transport between CPUs, writes its greetings there."""
    sys.stdout.flush()
    results = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(results, "w", buffering=1)


def _explain_abort() -> None:
    """Where the first process is gone, JAX's client aborts this one at once, and has no callback that works.

    So the abort itself is caught: it becomes exit code 75 where the first process does not answer any more.
    """
    from jax._src import distributed

    host, _, port = str(getattr(distributed.global_state, "coordinator_address", "")).rpartition(":")

    def aborted(number: int) -> None:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError:
            end_with(f"the first process of the job is gone; {AGAIN}", EXIT_STOPPED)
        os._exit(128 + number)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)
    _KEPT.append(handler)
    ctypes.CDLL(None).signal(signal.SIGABRT, handler)


def _launched() -> bool:
    """Whether a launcher has started this process as one of several."""
    env = os.environ
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1 or int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return True
    if _of_an_indexed_job():
        return True
    hosts = [host for host in env.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    if len(hosts) > 1 or int(env.get("MEGASCALE_NUM_SLICES", 1)) > 1:
        return True
    on_tpu_machine = bool(glob("/dev/accel*")) or "TPU_ACCELERATOR_TYPE" in env
    return on_tpu_machine and env.get("JAX_PLATFORMS", "tpu").startswith("tpu")


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
