"""What one process of a job knows and does: votes, time limits, shared faults, and how it finds the others."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import SimpleNamespace

import numpy as np
import pytest

from smollm_jax.config.settings import ComputeConfig, Config, DataConfig, RunConfig
from smollm_jax.data.packing import Batch
from smollm_jax.distributed.launch import connect
from smollm_jax.distributed.processes import Processes
from smollm_jax.runtime.errors import SourceTimeout, UserError
from smollm_jax.training.loop import next_ballot
from smollm_jax.training.run import Interval, Progress
from smollm_jax.training.step import Vote


def run_of_two(stream, *, requested=False, data_timeout=600.0):
    """The second process of two at step 2, as far as it concerns its data."""
    config = Config(data=DataConfig(seq_len=32, data_timeout=data_timeout), run=RunConfig(phases="9x4"))
    return SimpleNamespace(
        config=config, progress=Progress(step=2), stream=stream, stop=SimpleNamespace(requested=requested),
        job=Processes(1, 2), interval=Interval(), interrupted=False,
    )  # fmt: skip


class Silent:
    """A stream that waits for a disk that does not answer."""

    def get(self, *, timeout):
        time.sleep(timeout)


def test_a_process_does_not_wait_for_its_data_without_end(monkeypatch):
    monkeypatch.setattr("smollm_jax.training.loop.STUCK_SECONDS", 0.2)
    ballot = next_ballot(run_of_two(Silent(), data_timeout=0.3), None)
    assert ballot.vote == Vote.VOID
    assert isinstance(ballot.fault, SourceTimeout)
    assert "no data came for 0.5 s" in str(ballot.fault)


class Late:
    """A stream whose rows come after they were asked for once in vain."""

    def __init__(self):
        self.asked = 0

    def get(self, *, timeout):
        del timeout
        self.asked += 1
        return None if self.asked == 1 else (Batch(np.ones((4, 33), np.int32), np.ones((4, 33), np.int32)), {})


def test_a_process_without_rows_has_none_until_all_have_gone_back():
    """Rows that come late, after their step was voted void, must not make the next step count."""
    run = run_of_two(Late(), requested=True)
    first = next_ballot(run, None)
    assert (first.vote, first.item) == (Vote.VOID, None)
    run.progress.step = 3
    second = next_ballot(run, first)
    assert (second.vote, second.item) == (Vote.VOID, None)


WATCHED = """
import threading, time
from smollm_jax.distributed import watchdog
watchdog.STEP_SECONDS, watchdog.TICK_SECONDS, watchdog.OWN_SECONDS = 1.0, 0.1, 1.5
alone, peer = watchdog.Watchdog(0, 2), watchdog.Watchdog(1, 2)
peer._count = lambda: None


class Store(dict):  # the part of JAX's coordination service that is used
    def key_value_set(self, key, value, allow_overwrite):
        self[key] = value

    def key_value_dir_get(self, prefix):
        return list(self.items())


store = Store()
alone.start(store)
peer.start(store)


def steps(*seconds, rows=8):
    for step, time_of_it in enumerate(seconds):
        with alone.step(rows, f"step {step}"):
            time.sleep(time_of_it)
        alone.step_took(rows, time_of_it)


def waits(seconds):
    with peer.patient("data"):
        time.sleep(seconds)


with alone.limit(), peer.limit():
    time.sleep(0.5)
    CASE
print("done")
"""


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("steps(0.01, 0.01, 0.01, 60)", "step 3 was not done after 1 s"),
        ("steps(5, 0.01, 0.01)", None),  # the first has all the time it needs
        pytest.param(
            "steps(0.01, 0.01, 0.01); steps(5, rows=16)", None, marks=pytest.mark.slow
        ),  # and so has the first of another size
        pytest.param("steps(0.5, 0.5, 0.5, 6)", None, marks=pytest.mark.slow),  # each many times what others took
        ("steps(*[0.01] * 5, 0.9, 0.01, 60)", "step 7 was not done after 1 s"),  # one long one is no measure
        # a peer that waits for its data is waited for, and no longer
        pytest.param(
            "threading.Thread(target=waits, args=(4.7,)).start(); steps(0.01, 0.01, 0.01, 5)",
            None,
            marks=pytest.mark.slow,
        ),
        ("threading.Thread(target=waits, args=(4,)).start(); steps(0.01, 0.01, 0.01, 9)", "step 3 was not done"),
        ("time.sleep(60)", "the work between two steps was not done after 2 s"),
        pytest.param("for _ in range(9): time.sleep(0.4); steps(0.01)", None, marks=pytest.mark.slow),
        ("with alone.patient('a save', 1): time.sleep(60)", "a save was not done after 1 s"),
        ("with alone.patient('a save', 1):\n        for _ in range(9): time.sleep(.3); alone.reset()", None),
    ],
)
def test_a_process_without_progress_ends_itself(case, words):
    script = WATCHED.replace("CASE", case)
    command = [sys.executable, "-c", script]
    found = subprocess.run(command, capture_output=True, text=True, timeout=25, check=False)
    assert (found.returncode, found.stdout) == ((75, "") if words else (0, "done\n")), found.stderr
    assert (words or "") in found.stderr


def in_each_of_two(work):
    """What `work(job)` returns or raises in each of two processes, which are threads here."""
    values, barrier = [None, None], Barrier(2)

    def gather_as(index):
        def gather(value):
            values[index] = value
            barrier.wait(10)
            found = list(values)
            barrier.wait(10)
            return found

        return gather

    def one(index):
        job = Processes(index, 2)
        job.gather = gather_as(index)
        try:
            return work(job)
        except Exception as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, range(2)))


def failing_with(*faults):
    def work(job):
        with job.all_or_none():
            if faults[job.index] is not None:
                raise faults[job.index]
        return "done"

    return work


def test_what_fails_in_one_process_fails_in_all_in_the_same_way():
    assert in_each_of_two(failing_with(None, None)) == ["done", "done"]
    for kind in (UserError, SourceTimeout):
        other, own = in_each_of_two(failing_with(None, kind("no row 5")))
        assert (type(other), str(other)) == (kind, "process 1: no row 5")
        assert (type(own), str(own)) == (kind, "no row 5")
    both = in_each_of_two(failing_with(SourceTimeout("a"), UserError("b")))
    assert [type(error) for error in both] == [UserError, UserError]
    first, second = in_each_of_two(failing_with(UserError("a"), KeyError("b")))
    assert (type(first), type(second)) == (RuntimeError, KeyError)


def test_the_first_process_is_done_before_the_others_begin():
    order = []

    def work(job):
        with job.first_then_rest():
            if job.first:
                time.sleep(0.2)
            order.append(job.index)

    assert in_each_of_two(work) == [None, None]
    assert order == [0, 1]


def test_what_fails_in_the_first_process_is_not_begun_in_the_others():
    def work(job):
        with job.first_then_rest():
            assert job.first, "begun"
            raise UserError("no tokenizer")

    assert [str(error) for error in in_each_of_two(work)] == ["no tokenizer", "process 0: no tokenizer"]


def test_one_process_is_a_job_too():
    alone = Processes()
    assert alone.gather({"a": 1}) == [{"a": 1}]
    with alone.first_then_rest():
        pass
    with pytest.raises(KeyError), alone.all_or_none():
        raise KeyError("a")
    assert not alone.several
    assert alone.first


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"coordinator": "host:1"}, "belong together"),
        ({"num_processes": 2, "process_id": 0}, "belong together"),
        ({"coordinator": "host", "num_processes": 2, "process_id": 0}, "HOST:PORT"),
        ({"coordinator": "host:1", "num_processes": 2, "process_id": 2}, "must lie in 0 to 1"),
    ],
)
def test_half_a_job_is_refused(flags, words):
    with pytest.raises(ValueError, match=words):
        ComputeConfig(**flags)


@pytest.fixture
def untouched(monkeypatch):
    """Connecting leaves the signals and the standard output of this process as they are."""
    monkeypatch.setattr("smollm_jax.distributed.launch._keep_stdout", lambda: None)
    monkeypatch.setattr("smollm_jax.distributed.launch._on_abort", lambda _: None)
    monkeypatch.setattr("smollm_jax.distributed.launch._wait_for", lambda _: None)


LAUNCHERS = {
    "slurm": {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "7"},
    "open mpi": {"OMPI_COMM_WORLD_SIZE": "2"},
    "cloud tpu": {"TPU_WORKER_HOSTNAMES": "a,b"},
}


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_is_recognised(monkeypatch, launcher):
    asked = {}
    monkeypatch.setattr("jax.distributed.initialize", lambda *place, **given: asked.update(given, place=place))
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "WARNING: could not determine hosts, please set it")
    assert not connect(ComputeConfig()).several
    assert not asked
    for name, value in LAUNCHERS[launcher].items():
        monkeypatch.setenv(name, value)
    connect(ComputeConfig())
    assert asked["place"] == (None, None, None)  # it is the library that asks the launcher
    assert asked["initialization_timeout"] > 0


@pytest.mark.usefixtures("untouched")
def test_an_indexed_kubernetes_job_is_recognised(monkeypatch):
    asked = []
    monkeypatch.setattr("jax.distributed.initialize", lambda *place, **_: asked.append(place))
    names = {"JOB_COMPLETION_INDEX": "1", "JAX_COORDINATOR_ADDRESS": "run-0.run:1234", "JAX_NUM_PROCESSES": "4"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    connect(ComputeConfig())
    assert asked == [("run-0.run:1234", 4, 1)]


@pytest.mark.usefixtures("untouched")
def test_a_tpu_of_one_host_is_a_process_alone(monkeypatch):
    def nobody(*_, **__):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr("jax.distributed.initialize", nobody)
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    assert not connect(ComputeConfig()).several
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")  # there are others, and they were not found
    with pytest.raises(ValueError, match="did not come together"):
        connect(ComputeConfig())
