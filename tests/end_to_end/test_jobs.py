"""Jobs of several processes on loopback: the same batches and losses as one process, whatever stops or dies."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from smollm_jax.checkpoint.listing import list_checkpoints
from smollm_jax.runs.lock import RunLock
from smollm_jax.training.reference import Reference
from tests.support.paths import ROOT
from tests.support.runs import TINY, records, wait_for_step
from tests.support.texts import chat_tokenizer, make_pairs, write_rows

pytestmark = pytest.mark.slow

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

    data_of_all = f"{corpus}/*.jsonl"

    def start(
        processes, *flags, devices=2, run="run", settings=SETTINGS, launcher=by_hand, cwd=None, program=(),
        data=data_of_all,
    ):  # fmt: skip
        port = free_port()
        command = [
            sys.executable, *program, str(ROOT / "train_jax.py"), *TINY, *settings, "--data", data,
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


@pytest.mark.parametrize("flags", [pytest.param([], marks=pytest.mark.release), ["--mesh", "data=2,fsdp=2"]])
def test_two_processes_train_like_one(job, tmp_path, flags):
    flags = [*flags, "--sample-tokens", "4"]
    assert codes(job(1, *flags[-2:], devices=1, run="one")) == [0]
    processes = job(2, *flags)
    assert codes(processes) == [0, 0], words_of(tmp_path)
    assert (tmp_path / "run" / "samples.txt").read_text() == (tmp_path / "one" / "samples.txt").read_text() != ""
    out = [process.stdout.read() for process in processes]
    assert out[0].startswith("finished: step 10 of 10")
    assert out[0].count("\n") == 1
    assert out[1] == ""
    assert_same_losses(tmp_path / "one", tmp_path / "run")
    assert "2 processes; each reads its own part of the data" in words_of(tmp_path)
    assert [info.verdict for info in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["good"] * 3


def test_two_processes_train_on_pairs_like_one(job, tmp_path):
    """Each has its own pairs, whose reference log-probs all share."""
    write_rows(tmp_path / "pairs.jsonl", make_pairs(80))
    chat_tokenizer().save(tmp_path / "chat")
    flags = ["--data-kind", "pairs", "--seq-len", "192", "--tokenizer", str(tmp_path / "chat")]
    flags += ["--beta", "0.1", "--learning-rate", "1e-3"]
    data = str(tmp_path / "pairs.jsonl")
    assert codes(job(1, *flags, devices=1, run="one", data=data)) == [0], words_of(tmp_path, "one", 1)
    assert codes(job(2, *flags, "--mesh", "data=2,fsdp=2", data=data)) == [0, 0], words_of(tmp_path)
    assert_same_losses(tmp_path / "one", tmp_path / "run")
    one, both = (Reference.load(tmp_path / name / "reference.npz").sums for name in ("one", "run"))
    assert one.keys() == both.keys()
    for key, sums in one.items():
        assert both[key] == pytest.approx(sums, rel=2e-4)


@pytest.mark.release
def test_a_process_may_have_nothing_but_padding(job, tmp_path):
    """Nine rows, then six, on eight devices: the last process has none of either, and the third only a few."""
    flags = ["--phases", "5x9,5x6", "--batch-size", "9", "--shards", "3"]
    assert codes(job(1, *flags, devices=1, run="one")) == [0]
    assert codes(job(4, *flags, devices=2)) == [0] * 4, words_of(tmp_path, count=4)
    assert_same_losses(tmp_path / "one", tmp_path / "run")


@pytest.mark.parametrize(
    "plan",
    [
        [(1, 8, 3), (2, 1, 7), (1, 1, 10)],
        pytest.param([(4, 2, 2), (1, 1, 4), (2, 4, 7), (4, 1, 10)], marks=pytest.mark.release),
    ],
)
def test_a_run_goes_on_with_any_number_of_processes_and_devices(job, tmp_path, plan):
    """The same documents in the same order. Of the plan: processes, devices of each, last step."""
    assert codes(job(1, devices=1, run="one")) == [0]
    for processes, devices, step in plan:
        done = codes(job(processes, "--stop-after", str(step), devices=devices))
        assert done == [0] * processes, words_of(tmp_path, count=processes)
    assert_same_losses(tmp_path / "one", tmp_path / "run")


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


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.release)])
def test_when_one_process_dies_the_others_leave_within_two_minutes(job, tmp_path, victim):
    endless = [*SETTINGS, "--phases", "2000x8", "--eval-every", "0", "--checkpoint-every", "5"]
    processes = job(3, settings=endless, devices=1)
    wait_for_step(tmp_path / "run", 12, processes[0])
    processes[victim].kill()
    others = [process for process in processes if process is not processes[victim]]
    assert codes(others, timeout=120) == [75, 75], words_of(tmp_path, count=3)
    good = [info.step for info in list_checkpoints(tmp_path / "run" / "checkpoints") if info.verdict == "good"]
    assert good[0] >= 5
    last = max(records(tmp_path / "run")[-1]["step"], good[0]) + 5
    assert codes(job(2, "--stop-after", str(last), settings=endless)) == [0, 0], words_of(tmp_path)
    assert codes(job(1, "--stop-after", str(last), run="straight", settings=endless)) == [0]
    assert_same_losses(tmp_path / "straight", tmp_path / "run")


def test_data_that_ends_ends_all_processes(job, tmp_path):
    settings = [*SETTINGS, "--phases", "500x8", "--epochs", "1", "--eval-every", "0"]
    assert codes(job(1, run="one", settings=settings)) == [0]
    processes = job(2, settings=settings)
    assert codes(processes) == [0, 0], words_of(tmp_path)
    assert processes[0].stdout.read().startswith("the data ended: step ")
    assert_same_losses(tmp_path / "one", tmp_path / "run")


def test_what_one_process_cannot_read_ends_all_with_its_words(job, tmp_path, corpus):
    data = tmp_path / "data"
    data.mkdir()
    for path in sorted(corpus.iterdir()):
        (data / path.name).write_text(path.read_text())
    lines = (data / "part-1.jsonl").read_text().splitlines()
    lines[55] = "no json"
    (data / "part-1.jsonl").write_text("\n".join(lines) + "\n")
    processes = job(2, "--shards", "2", "--phases", "60x8", data=f"{data}/*.jsonl")
    assert codes(processes) == [2, 2], words_of(tmp_path)
    assert words_of(tmp_path).count("part-1.jsonl, row 55, cannot be read") == 2


def test_processes_with_different_settings_are_refused(job, tmp_path):
    port = free_port()
    both = [
        job(1, *by_hand(i, 2, port)[0], "--learning-rate", rate, run="run")[0]
        for i, rate in enumerate(("1e-3", "9e-3"))
    ]
    assert codes(both) == [2, 2]
    words = (
        "process 0 and process 1 were started with different settings: ['optimizer.learning_rate 0.001 and 0.009']"
    )
    assert words_of(tmp_path, count=1).count(words) == 2


def test_a_folder_in_use_is_refused_in_all_processes(job, tmp_path):
    with RunLock(tmp_path / "run"):
        assert codes(job(2)) == [2, 2]
    assert words_of(tmp_path).count("is in use by") == 2
    assert "Traceback" not in words_of(tmp_path)


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
    assert "here/tokenizer is missing; " in words
    assert "all processes have to see the same --run-dir" in words
    assert "Traceback" not in words


STANDS_STILL = """
import sys, time
from smollm_jax.training import loop
report_step = loop.report_step

def still(run, pending):
    if pending.step == 12:
        time.sleep(600)
    report_step(run, pending)

loop.report_step = still
sys.argv = sys.argv[1:]
exec(compile(open(sys.argv[0]).read(), sys.argv[0], "exec"))
"""


def test_when_one_process_stands_still_all_leave_within_two_minutes(job, tmp_path):
    """It is alive, and its heartbeats go on."""
    endless = [*SETTINGS, "--phases", "2000x8", "--eval-every", "0", "--checkpoint-every", "5"]
    port = free_port()
    both = [
        job(1, *by_hand(i, 2, port)[0], settings=endless, program=["-c", STANDS_STILL] if i else [])[0]
        for i in range(2)
    ]
    wait_for_step(tmp_path / "run", 12, both[0])
    assert codes(both, timeout=120) == [75, 75], words_of(tmp_path, count=1)
    assert "process 1 of 2: the work between two steps was not done after 20 s" in words_of(tmp_path, count=1)
    good = [info.step for info in list_checkpoints(tmp_path / "run" / "checkpoints") if info.verdict == "good"]
    assert good == [5, 10]


@pytest.mark.parametrize("launcher", [by_slurm, by_open_mpi, by_kubernetes])
def test_processes_find_each_other_by_what_a_launcher_sets(job, tmp_path, launcher):
    processes = job(2, "--phases", "4x8", "--eval-every", "0", devices=1, launcher=launcher)
    assert codes(processes) == [0, 0], words_of(tmp_path)
    assert "2 x cpu (cpu) of 2: data=2, 2 processes" in words_of(tmp_path)


@pytest.mark.release  # a minute of waiting; the test of a process that stands still is like it
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_process_is_suspended_the_others_leave_within_two_minutes(job, tmp_path, victim):
    """No connection breaks: JAX's heartbeats alone tell."""
    endless = [*SETTINGS, "--phases", "2000x8", "--eval-every", "0", "--checkpoint-every", "5"]
    processes = job(3, settings=endless, devices=1)
    wait_for_step(tmp_path / "run", 12, processes[0])
    processes[victim].send_signal(signal.SIGSTOP)
    others = [process for process in processes if process is not processes[victim]]
    assert codes(others, timeout=120) == [75, 75], words_of(tmp_path, count=3)
    assert "; what was saved stands; run the same command" in words_of(tmp_path, count=3)
