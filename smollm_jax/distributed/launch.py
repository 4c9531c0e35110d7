"""How the processes of a job find each other, and what becomes of them where they do not.

By flags, or by what SLURM, Open MPI, Cloud TPU or Kubernetes leave in the environment of those they start.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import time
from glob import glob
from typing import Any

from smollm_jax.config.settings import ComputeConfig
from smollm_jax.distributed.processes import LEAVING, Processes
from smollm_jax.distributed.watchdog import AGAIN
from smollm_jax.runtime.errors import EXIT_FAILED, EXIT_STOPPED, UserError, one_line, require
from smollm_jax.runtime.signals import end_with

# the library's own watch ends a process by a crash; ours comes first, in words and with an exit code
LIBRARY_SECONDS = 600
CONNECT_SECONDS = 300
_KEPT: list[Any] = []  # what C code has a pointer to


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
            LEAVING.clear()  # a TPU of one host, such as a notebook's: nobody to be found
            ctypes.CDLL(None).signal(signal.SIGABRT, None)
            return Processes()
        where = compute.coordinator or "found by the launcher"
        raise UserError(
            f"the job's processes did not come together (coordinator {where}): {one_line(error)}"
        ) from None
    LEAVING.clear()
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
        if LEAVING == [None]:
            end_with(f"the job's processes did not come together within {CONNECT_SECONDS} s", EXIT_FAILED)
        if LEAVING:
            os._exit(LEAVING[0] or 0)
        if _first_is_gone():
            end_with(f"the first process of the job is gone; {AGAIN}", EXIT_STOPPED)
        os._exit(128 + number)

    LEAVING[:] = [None]
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
