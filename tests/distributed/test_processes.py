"""Jobs of several processes on loopback: the same batches and losses as one, whoever goes on, whoever dies."""

import os
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from smollm_jax.checkpoint.listing import list_checkpoints
from smollm_jax.config.settings import ComputeConfig, Config, DataConfig, RunConfig
from smollm_jax.data.packing import Batch
from smollm_jax.distributed.launch import join
from smollm_jax.distributed.processes import Processes
from smollm_jax.distributed.watchdog import Watchdog, read
from smollm_jax.runs.lock import RunLock
from smollm_jax.training.loop import cast
from smollm_jax.training.run import Progress
from smollm_jax.training.step import VOID
from tests.support.paths import ROOT
from tests.support.runs import TINY, records, wait_for_step

SETTINGS = "--phases 10x8 --batch-size 8 --shards 4 --eval-every 5 --no-export --checkpoint-every 4".split()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def by_hand(i, count, port):
    return f"--coordinator 127.0.0.1:{port} --num-processes {count} --process-id {i}".split(), {}


def by_slurm(i, count, port):
    """What srun sets in the environment of a task."""
    return [], {
        "SLURM_JOB_ID": str(port), "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1",
        "SLURM_NTASKS": str(count), "SLURM_STEP_NUM_TASKS": str(count), "SLURM_PROCID": str(i),
        "SLURM_LOCALID": str(i), "JAX_LOCAL_DEVICE_IDS": "0",
    }  # fmt: skip


def by_open_mpi(i, count, port):
    """What mpirun sets."""
    return [], {
        "OMPI_MCA_orte_hnp_uri": f"{port * 2**12}.0;tcp://127.0.0.1:{port}", "OMPI_COMM_WORLD_SIZE": str(count),
        "OMPI_COMM_WORLD_RANK": str(i), "OMPI_COMM_WORLD_LOCAL_RANK": str(i), "JAX_LOCAL_DEVICE_IDS": "0",
    }  # fmt: skip


def by_kubernetes(i, count, port):
    """What an indexed job and our manifest set."""
    return [], {
        "JOB_COMPLETION_INDEX": str(i), "JAX_NUM_PROCESSES": str(count),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
    }  # fmt: skip


@pytest.fixture
def job(tmp_path, cache, corpus, tokenizer):
    """Starts a job of `processes` with `devices` each on a run folder."""
    started = []

    def start(processes, *flags, devices=2, run="run", settings=SETTINGS, launcher=by_hand, cwd=None, program=()):
        port = free_port()
        command = [
            sys.executable, *program, str(ROOT / "train_jax.py"), "--data", f"{corpus}/*.jsonl", *TINY, *settings,
            "--tokenizer", str(tokenizer), "--compilation-cache-dir", str(cache), "--run-dir", str(tmp_path / run),
        ]  # fmt: skip
        env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        for i in range(processes):
            place, more = launcher(i, processes, port) if processes > 1 else ([], {})
            words = (tmp_path / f"{run}-{i}.err").open("a")
            started.append(
                subprocess.Popen(
                    [*command, *place, *flags],
                    stdout=subprocess.PIPE,
                    stderr=words,
                    text=True,
                    env=env | more,
                    cwd=cwd,
                )
            )
        return started[-processes:]

    yield start
    for process in started:
        process.kill()


def wait_until(found, timeout=20):
    """What `found` gives, once it is something."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if value := found():
            return value
        time.sleep(0.05)
    raise AssertionError("it did not come")


def codes(processes, timeout=180):
    deadline = time.monotonic() + timeout
    return [process.wait(max(deadline - time.monotonic(), 0.1)) for process in processes]


def words_of(tmp_path, run="run", count=2):
    return "\n".join((tmp_path / f"{run}-{i}.err").read_text() for i in range(count))


def assert_same_losses(one, other, rel=2e-4):
    """The very same batches, and losses that differ by rounding."""
    lines, others = records(one), records(other)
    assert [line["step"] for line in lines] == [line["step"] for line in others]
    for line, theirs in zip(lines, others, strict=True):
        assert line.get("ledger") == theirs.get("ledger")
        assert line.get("tokens") == theirs.get("tokens")
        for name in {"loss", "grad_norm", "eval_loss"} & set(line):
            assert line[name] == pytest.approx(theirs[name], rel=rel), (line["step"], name)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--mesh", "data=2,fsdp=2"]])
def test_two_processes_train_like_one(job, tmp_path, flags):
    assert codes(job(1, devices=1, run="one")) == [0]
    processes = job(2, *flags)
    assert codes(processes) == [0, 0], words_of(tmp_path)
    out = [process.stdout.read() for process in processes]
    assert out[0].startswith("finished: step 10 of 10")
    assert out[0].count("\n") == 1
    assert out[1] == ""
    assert_same_losses(tmp_path / "one", tmp_path / "run")
    assert "2 processes; each reads its own part of the data" in words_of(tmp_path)
    assert [info.verdict for info in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["good"] * 3


@pytest.mark.slow
def test_a_process_may_have_nothing_but_padding(job, tmp_path):
    """Nine rows, then six, on eight devices: the last process has none of either, and the third only a few."""
    flags = ["--phases", "5x9,5x6", "--batch-size", "9", "--shards", "3"]
    assert codes(job(1, *flags, devices=1, run="one")) == [0]
    assert codes(job(4, *flags, devices=2)) == [0] * 4, words_of(tmp_path, count=4)
    assert_same_losses(tmp_path / "one", tmp_path / "run")


@pytest.mark.slow
def test_a_run_goes_on_with_any_number_of_processes_and_devices(job, tmp_path):
    """1 x 8, 2 x 1, 4 x 2, 1 x 1 and back: the same documents in the same order."""
    assert codes(job(1, devices=1, run="one")) == [0]
    plan = [(1, 8, 2), (2, 1, 4), (4, 2, 6), (1, 1, 7), (2, 4, 9), (4, 1, 10)]
    for processes, devices, step in plan:
        done = codes(job(processes, "--stop-after", str(step), devices=devices))
        assert done == [0] * processes, words_of(tmp_path, count=processes)
    assert_same_losses(tmp_path / "one", tmp_path / "run")


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step(job, tmp_path):
    endless = [*SETTINGS, "--phases", "2000x8", "--eval-every", "0", "--checkpoint-every", "0"]
    processes = job(2, settings=endless)
    wait_for_step(tmp_path / "run", 5, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    assert codes(processes, timeout=60) == [75, 75], words_of(tmp_path)
    stopped = records(tmp_path / "run")[-1]["step"]
    assert [info.step for info in list_checkpoints(tmp_path / "run" / "checkpoints")] == [stopped]
    assert f"stopped at step {stopped} of 2,000, saved" in words_of(tmp_path)
    assert codes(job(1, "--stop-after", str(stopped + 3), settings=endless)) == [0]
    assert codes(job(1, "--stop-after", str(stopped + 3), run="straight", settings=endless)) == [0]
    assert_same_losses(tmp_path / "straight", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_process_dies_the_others_leave_within_a_minute(job, tmp_path, victim):
    endless = [*SETTINGS, "--phases", "2000x8", "--eval-every", "0", "--checkpoint-every", "5"]
    processes = job(2, settings=endless)
    wait_for_step(tmp_path / "run", 12, processes[0])
    processes[victim].kill()
    assert codes([processes[1 - victim]], timeout=60) == [75], words_of(tmp_path)
    good = [info.step for info in list_checkpoints(tmp_path / "run" / "checkpoints") if info.verdict == "good"]
    assert good[0] >= 5
    last = max(records(tmp_path / "run")[-1]["step"], good[0]) + 5
    assert codes(job(2, "--stop-after", str(last), settings=endless)) == [0, 0], words_of(tmp_path)
    assert codes(job(1, "--stop-after", str(last), run="straight", settings=endless)) == [0]
    assert_same_losses(tmp_path / "straight", tmp_path / "run")


@pytest.mark.slow
def test_data_that_ends_ends_all_processes(job, tmp_path):
    settings = [*SETTINGS, "--phases", "500x8", "--epochs", "1", "--eval-every", "0"]
    assert codes(job(1, run="one", settings=settings)) == [0]
    processes = job(2, settings=settings)
    assert codes(processes) == [0, 0], words_of(tmp_path)
    assert processes[0].stdout.read().startswith("the data ended: step ")
    assert_same_losses(tmp_path / "one", tmp_path / "run")


@pytest.mark.slow
def test_what_one_process_cannot_read_ends_all_with_its_words(job, tmp_path, corpus):
    data = tmp_path / "data"
    data.mkdir()
    for path in sorted(corpus.iterdir()):
        (data / path.name).write_text(path.read_text())
    lines = (data / "part-1.jsonl").read_text().splitlines()
    lines[55] = "no json"
    (data / "part-1.jsonl").write_text("\n".join(lines) + "\n")
    processes = job(2, "--data", f"{data}/*.jsonl", "--shards", "2", "--phases", "60x8")
    assert codes(processes) == [2, 2], words_of(tmp_path)
    assert words_of(tmp_path).count("part-1.jsonl, row 55, cannot be read") == 2


@pytest.mark.slow
def test_processes_with_different_settings_are_refused(job, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [
        job(1, *by_hand(i, 2, port)[0], "--learning-rate", rate, run="run")[0]
        for i, rate in enumerate(("1e-3", "9e-3"))
    ]
    assert codes(both) == [2, 2]
    words = (
        "process 0 and process 1 were started with different settings: ['optimizer.learning_rate 0.001 and 0.009']"
    )
    assert words_of(tmp_path, count=1).count(words) == 2


@pytest.mark.slow
def test_a_folder_in_use_is_refused_in_all_processes(job, tmp_path):
    with RunLock(tmp_path / "run"):
        assert codes(job(2)) == [2, 2]
    assert words_of(tmp_path).count("is in use by") == 2
    assert "Traceback" not in words_of(tmp_path)


@pytest.mark.slow
def test_a_run_folder_that_is_not_shared_is_refused(job, tmp_path):
    """Each of two machines has a folder of that name."""
    port = free_port()
    both = []
    for i in range(2):
        machine = tmp_path / f"machine-{i}"
        machine.mkdir()
        both += job(1, *by_hand(i, 2, port)[0], "--run-dir", "here", cwd=machine)
    assert codes(both) == [2, 2]
    words = words_of(tmp_path, count=1)
    assert "is not seen by process 1 within 10 s; --run-dir has to be in a folder that all share" in words
    assert "Traceback" not in words


class Silent:
    """A stream that waits for a disk that does not answer."""

    def get(self, *, timeout):
        time.sleep(timeout)


def test_a_process_does_not_wait_for_its_data_without_end(monkeypatch):
    monkeypatch.setattr("smollm_jax.training.loop.STUCK_SECONDS", 0.2)
    config = Config(data=DataConfig(seq_len=32, data_timeout=0.3), run=RunConfig(phases="9x4"))
    stop = SimpleNamespace(requested=False)
    run = SimpleNamespace(
        config=config, progress=Progress(step=2), stream=Silent(), stop=stop, processes=Processes()
    )
    ballot = cast(run, None)
    assert ballot.vote == VOID
    assert "no data came for 0.5 s" in ballot.fault


WATCHED = """
import sys, threading, time
from pathlib import Path
from smollm_jax.distributed import watchdog as watch
from smollm_jax.distributed.processes import Processes
watch.SILENT_SECONDS, watch.STEP_SECONDS, watch.BEAT_SECONDS, watch.OWN_SECONDS = 3.0, 1.0, 0.1, 1.5
job, peer, folder = Processes(0, 2), watch.Watch(1, 2), Path(sys.argv[1])
alone, job.gather = job.watch, lambda value: [value]
peer._listen = lambda folder: None  # a heart only
peer._count = lambda: None
(folder / ".processes").mkdir()
peer.start(folder / ".processes")


def steps(*seconds, rows=8):
    for step, time_of_it in enumerate(seconds):
        with alone.step(rows, f"step {step}"):
            time.sleep(time_of_it)
        alone.step_took(rows, time_of_it)


def waits(seconds):
    with peer.long("data"):
        time.sleep(seconds)


with job.watched(folder), alone.moving(), peer.moving():
    time.sleep(0.5)
    CASE
print("done")
"""


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("steps(0.01, 0.01, 0.01, 60)", "step 3 was not done after 1 s"),
        ("steps(5, 0.01, 0.01)", None),  # the first has all the time it needs
        ("steps(0.01, 0.01, 0.01); steps(5, rows=16)", None),  # and so has the first of another size
        ("steps(0.5, 0.5, 0.5, 6)", None),  # each many times what others took
        ("steps(*[0.01] * 5, 0.9, 0.01, 60)", "step 7 was not done after 1 s"),  # one long one is no measure
        # a peer that waits for its data is waited for, and no longer
        ("threading.Thread(target=waits, args=(4,)).start(); steps(0.01, 0.01, 0.01, 5)", None),
        ("threading.Thread(target=waits, args=(4,)).start(); steps(0.01, 0.01, 0.01, 9)", "step 3 was not done"),
        ("time.sleep(60)", "what lies between steps was not done after 2 s"),
        ("for _ in range(9): time.sleep(0.4); steps(0.01)", None),
        ("with alone.long('a save', 1): time.sleep(60)", "a save was not done after 1 s"),
        ("with alone.long('a save', 1):\n        for _ in range(9): time.sleep(.3); alone.moved()", None),
        ("peer.over.set(); steps(60)", "process 1 of 2 has been silent for 3 s"),
    ],
)
def test_a_process_that_does_not_move_ends_itself(tmp_path, case, words):
    script = WATCHED.replace("CASE", case)
    command = [sys.executable, "-c", script, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=25, check=False)
    assert (found.returncode, found.stdout) == ((75, "") if words else (0, "done\n")), found.stderr
    assert (words or "") in found.stderr


STANDS_STILL = """
import sys, time
import smollm_jax.train as train
look_at = train.look_at

def still(run, pending, **found):
    if pending.step == 12:
        time.sleep(600)
    look_at(run, pending, **found)

train.look_at = still
sys.argv = sys.argv[1:]
exec(compile(open(sys.argv[0]).read(), sys.argv[0], "exec"))
"""


@pytest.mark.slow
def test_when_one_process_stands_still_all_leave_within_a_minute(job, tmp_path):
    """Its heart goes on beating: it is alive, and does not move."""
    endless = [*SETTINGS, "--phases", "2000x8", "--eval-every", "0", "--checkpoint-every", "5"]
    port = free_port()
    both = [
        job(1, *by_hand(i, 2, port)[0], settings=endless, program=["-c", STANDS_STILL] if i else [])[0]
        for i in range(2)
    ]
    wait_for_step(tmp_path / "run", 12, both[0])
    assert codes(both, timeout=60) == [75, 75], words_of(tmp_path, count=1)
    assert "process 1 of 2: what lies between steps was not done after 20 s" in words_of(tmp_path, count=1)
    good = [info.step for info in list_checkpoints(tmp_path / "run" / "checkpoints") if info.verdict == "good"]
    assert good == [5, 10]


def test_the_heart_goes_on_in_place(tmp_path):
    """On a full disk nothing can be written anew; a file that was emptied first would be a silence."""
    watch, sizes = Watchdog(0, 2), set()
    watch.start(tmp_path)
    first = wait_until(lambda: read(tmp_path / "0"))
    while read(tmp_path / "0") == first:
        sizes.add(len(read(tmp_path / "0")))
    watch.over.set()
    assert sizes == {len(first)}


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
    config = Config(data=DataConfig(seq_len=32), run=RunConfig(phases="9x4"))
    stop = SimpleNamespace(requested=True)
    run = SimpleNamespace(
        config=config, progress=Progress(step=2), stream=Late(), stop=stop, processes=Processes()
    )
    first = cast(run, None)
    assert first.vote == VOID
    run.progress.step = 3
    second = cast(run, first)
    assert second.vote == VOID
    assert not second.item[0].segment_ids.any()


def test_one_process_is_a_job_too():
    alone = Processes()
    assert alone.gather({"a": 1}) == [{"a": 1}]
    assert alone.in_turn(lambda: 5) == 5
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


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [by_slurm, by_open_mpi, by_kubernetes])
def test_processes_find_each_other_by_what_a_launcher_sets(job, tmp_path, launcher):
    processes = job(2, "--phases", "4x8", "--eval-every", "0", devices=1, launcher=launcher)
    assert codes(processes) == [0, 0], words_of(tmp_path)
    assert "2 x cpu (cpu) of 2: data=2, 2 processes" in words_of(tmp_path)


LAUNCHERS = {
    "slurm": {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "7"},
    "open mpi": {"OMPI_COMM_WORLD_SIZE": "2"},
    "cloud tpu": {"TPU_WORKER_HOSTNAMES": "a,b"},
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_is_recognised(monkeypatch, launcher):
    asked = {}
    monkeypatch.setattr("jax.distributed.initialize", lambda **given: asked.update(given))
    monkeypatch.setattr("smollm_jax.distributed.launch._keep_stdout", lambda: None)
    monkeypatch.setattr("smollm_jax.distributed.launch._explain_abort", lambda: None)
    monkeypatch.setattr("smollm_jax.distributed.launch._wait_for", lambda _: None)
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "WARNING: could not determine hosts, please set it")
    assert not join(ComputeConfig()).several
    assert not asked
    for name, value in LAUNCHERS[launcher].items():
        monkeypatch.setenv(name, value)
    join(ComputeConfig())
    assert "coordinator_address" not in asked  # it is the library that asks the launcher
    assert asked["initialization_timeout"] > 0


def test_an_indexed_kubernetes_job_is_recognised(monkeypatch):
    asked = {}
    monkeypatch.setattr("jax.distributed.initialize", lambda **given: asked.update(given))
    monkeypatch.setattr("smollm_jax.distributed.launch._keep_stdout", lambda: None)
    monkeypatch.setattr("smollm_jax.distributed.launch._explain_abort", lambda: None)
    monkeypatch.setattr("smollm_jax.distributed.launch._wait_for", lambda _: None)
    names = {"JOB_COMPLETION_INDEX": "1", "JAX_COORDINATOR_ADDRESS": "run-0.run:1234", "JAX_NUM_PROCESSES": "4"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    join(ComputeConfig())
    given = {name: asked[name] for name in ("coordinator_address", "process_id", "num_processes")}
    assert given == {"coordinator_address": "run-0.run:1234", "process_id": 1, "num_processes": 4}


def test_a_tpu_of_one_host_is_a_process_alone(monkeypatch):
    def nobody(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr("jax.distributed.initialize", nobody)
    monkeypatch.setattr("smollm_jax.distributed.launch._keep_stdout", lambda: None)
    monkeypatch.setattr("smollm_jax.distributed.launch._explain_abort", lambda: None)
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    assert not join(ComputeConfig()).several
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")  # there are others, and they were not found
    with pytest.raises(ValueError, match="did not come together"):
        join(ComputeConfig())
