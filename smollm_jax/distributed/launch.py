"""Connect the processes of a job, and end them together.

The processes are named by --coordinator. Otherwise JAX finds them in what a launcher sets in the environment. If a
process is dead or stopped, JAX aborts all others. A handler turns the abort into a message and exit code 75.
"""

import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from glob import glob
from typing import Any

from smollm_jax.config.settings import ComputeConfig
from smollm_jax.distributed.processes import PeerLost, Processes
from smollm_jax.distributed.watchdog import AGAIN
from smollm_jax.runtime.background import BackgroundTask
from smollm_jax.runtime.errors import EXIT_FAILED, EXIT_MISTAKE, EXIT_STOPPED, UserError, one_line, require, say
from smollm_jax.runtime.signals import end_with

# Measured with three processes, 2026-11-27: kill -9 of the first ends all others at once; SIGSTOP of the first,
# and kill -9 or SIGSTOP of another, after 58 to 62 s.
HEARTBEAT_SECONDS = 60
VERDICT_SECONDS = HEARTBEAT_SECONDS + 10.0  # after which JAX would have aborted if a process were dead
CONNECT_SECONDS = 300
ANSWER_SECONDS = 2.0  # for the coordination service of a whole job
FIRST_LEAVES_SECONDS = 2.0  # after the others: JAX's clients abort when the first process is gone
TASK_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")
# an indexed Job or JobSet of Kubernetes sets the last, the job's manifest the others
KUBERNETES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JOB_COMPLETION_INDEX")
_KEPT: list[Any] = []  # C code holds pointers to them


@contextmanager
def join_job(compute: ComputeConfig) -> Iterator[Processes]:
    """Connect with the other processes of the job. At the end, leaves together with them.

    Enter the context before any other call of JAX. Raises `UserError` if the processes do not connect in time.
    Each of several processes prints its own `UserError` and exits with its code. A process alone raises the error.
    """
    job = connect(compute)
    if not job.several:
        yield job
        return
    from jax._src import distributed

    job.watchdog.start(distributed.global_state.client)
    try:
        with job.watchdog.patient("the work before or after training"):
            try:
                yield job
            except UserError as error:  # printed before the wait for the others, because one may be gone
                say(f"error: {one_line(error)}")
                job.exit_code = EXIT_MISTAKE
            job.leaving = True
            job.gather(None)  # JAX takes a process that leaves early for dead and aborts the others
            if job.first:
                time.sleep(FIRST_LEAVES_SECONDS)
    except Exception as error:
        if isinstance(error, PeerLost) or "Gloo" in str(error):
            end_with(f"the connection to another process broke: {one_line(error)}; {AGAIN}", EXIT_STOPPED)
        if type(error).__module__.startswith("jax"):  # an error of the devices may be the death of another process
            time.sleep(VERDICT_SECONDS)
        raise
    finally:
        job.watchdog.over.set()


def connect(compute: ComputeConfig) -> Processes:
    """Connect with the other processes, if there are any."""
    place: Sequence[Any] = (compute.coordinator, compute.num_processes, compute.process_id)
    found = [os.environ.get(name, "") for name in KUBERNETES]
    if compute.coordinator is None and all(found):
        place = [int(value) if value.isdecimal() else value for value in found]
    host, count, index = place
    several = _are_several(compute)
    if not (several or _may_be_a_pod()):
        return Processes()
    import jax

    _keep_stdout()
    late = f"the job's processes did not come together within {CONNECT_SECONDS} s"
    _on_abort(lambda _: end_with(late, EXIT_FAILED))
    if compute.coordinator is not None and compute.process_id:
        _wait_for(compute.coordinator)
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from us
    try:
        jax.distributed.initialize(
            host, count, index, heartbeat_timeout_seconds=HEARTBEAT_SECONDS, initialization_timeout=CONNECT_SECONDS
        )
    except (RuntimeError, ValueError) as error:
        if not several and "coordinator_address" in str(error):
            ctypes.CDLL(None).signal(signal.SIGABRT, None)
            return Processes()  # a TPU of one host, such as a notebook's
        where = f"coordinator {compute.coordinator or 'found by the launcher'}"
        raise UserError(f"the job's processes did not come together ({where}): {one_line(error)}") from None
    joined = Processes(jax.process_index(), jax.process_count())
    _on_abort(partial(_explain_abort, joined))
    return joined


def may_be_several(compute: ComputeConfig) -> bool:
    """Return whether this process may be one of a job. Does not ask JAX."""
    return _are_several(compute) or _may_be_a_pod()


def _may_be_a_pod() -> bool:
    on_tpu_machine = bool(glob("/dev/accel*")) or "TPU_ACCELERATOR_TYPE" in os.environ
    return on_tpu_machine and os.environ.get("JAX_PLATFORMS", "tpu").startswith("tpu")


def _are_several(compute: ComputeConfig) -> bool:
    """Return whether the settings or a launcher have started this process as one of several."""
    # without a TPU, libtpu leaves a sentence in this variable for child processes
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    counted = any(int(os.environ.get(name, "1")) > 1 for name in TASK_COUNTS)
    launched = counted or set(KUBERNETES) <= os.environ.keys() or ("," in hosts and " " not in hosts)
    return compute.coordinator is not None or launched


def _wait_for(coordinator: str) -> None:
    """Wait until the first process listens. Raises `UserError` if it does not in time."""
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError:
            hint = "is the process with --process-id 0 running there?"
            require(time.monotonic() < deadline, f"--coordinator {coordinator} does not answer; {hint}")
            time.sleep(0.2)


def _keep_stdout() -> None:
    """Keep standard output for results: Gloo, the transport between CPUs, writes its greetings there."""
    sys.stdout.flush()
    results = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(results, "w", buffering=1)


def _on_abort(act: Callable[[int], None]) -> None:
    """Call `act` with the signal's number when JAX's client aborts: it has no working callback."""
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(act)
    _KEPT.append(handler)
    ctypes.CDLL(None).signal(signal.SIGABRT, handler)


def _explain_abort(job: Processes, number: int) -> None:
    """End with a message if another process is gone: the coordination service does not answer."""
    from jax._src import distributed

    if job.leaving:
        os._exit(job.exit_code)
    client = distributed.global_state.client
    assert client is not None
    asked = BackgroundTask(lambda: client.key_value_dir_get("smollm_jax"))  # an aborting client holds a lock
    if not asked.wait(ANSWER_SECONDS) or asked.error is not None:
        end_with(f"another process of the job is gone; {AGAIN}", EXIT_STOPPED)
    os._exit(128 + number)
