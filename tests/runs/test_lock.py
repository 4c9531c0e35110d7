"""The lock of a run folder: one process at a time."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smollm_jax.runs.lock import BEGINNING, LOCK, METRICS, WRITTEN, RunLock
from smollm_jax.runtime.errors import UserError

HOLD_LOCK = """
import sys, time
from smollm_jax.runs.lock import RunLock
with RunLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def python(code, folder):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(folder)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def holder(tmp_path):
    with python(HOLD_LOCK, tmp_path) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_and_told_who_holds_the_run(tmp_path, holder):
    year = time.strftime("%Y")
    with pytest.raises(ValueError, match=f"in use by process {holder.pid} on .+ since {year}.*--run-dir"):
        RunLock(tmp_path).__enter__()


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == holder.pid
    with RunLock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_the_lock_is_free_after_leaving_also_by_an_error(tmp_path):
    descriptors = len(os.listdir("/dev/fd"))
    with pytest.raises(KeyError), RunLock(tmp_path / "new"):
        raise KeyError
    with RunLock(tmp_path / "new"), pytest.raises(ValueError, match=f"process {os.getpid()}"):
        RunLock(tmp_path / "new").__enter__()
    assert len(os.listdir("/dev/fd")) == descriptors


FORK_AND_BE_KILLED = """
import os, sys, time
from smollm_jax.runs.lock import RunLock
RunLock(sys.argv[1]).__enter__()
child = os.fork()
if child == 0:
    print(os.getpid(), flush=True)
    time.sleep(60)
time.sleep(60)
"""


def test_a_forked_child_that_outlives_its_killed_parent_does_not_hold_the_lock(tmp_path):
    with python(FORK_AND_BE_KILLED, tmp_path) as parent:
        child = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
        try:
            with RunLock(tmp_path):
                os.kill(child, 0)
        finally:
            os.kill(child, signal.SIGKILL)


@given(content=st.binary(max_size=60) | st.sampled_from([b"{}", b"[]", b'{"pid": {}}', b"[" * 4096]))
@settings(max_examples=50, deadline=None)
def test_whatever_stands_in_a_held_lock_file_the_refusal_is_one_line(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("lock")
    with RunLock(folder):
        (folder / LOCK).write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(f"{folder} is in use by")) as refusal:
            RunLock(folder).__enter__()
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_run_whose_files_are_links_out_of_it_is_not_written_to(tmp_path, name):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to("../victim")
    with pytest.raises(UserError, match=f"{re.escape(name)} is a link out of the run folder"):
        RunLock(tmp_path / "run").__enter__()
    assert (tmp_path / "victim").read_text() == "mine"


def test_a_run_folder_that_is_a_link_is_locked_and_a_pipe_for_a_lock_is_named(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to("disk")
    with RunLock(tmp_path / "run"):
        pass
    (tmp_path / "run" / LOCK).unlink()
    os.mkfifo(tmp_path / "run" / LOCK)
    with pytest.raises(UserError, match="is not a file"):
        RunLock(tmp_path / "run").__enter__()


def everything_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def write_a_beginning(folder):
    for name in BEGINNING[1:]:
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "part").write_text("")
    (folder / BEGINNING[0]).write_text("{}")


def start(run, fault, *more):
    """Begin a run that ends with `fault`, after it has written files, `more` among them."""
    with RunLock(run):
        write_a_beginning(run)
        for name in more:
            (run / name).write_text("mine")
        raise fault


def test_a_refused_start_leaves_nothing_not_even_the_folders_made_for_it(tmp_path):
    with pytest.raises(UserError, match="no data"):
        start(tmp_path / "runs" / "new", UserError("no data"))
    assert everything_in(tmp_path) == []


def test_a_refused_start_keeps_what_was_there_and_what_a_person_put_there(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / LOCK).write_text("")
    before = everything_in(tmp_path)
    with pytest.raises(UserError):
        start(tmp_path, UserError("no"), "notes.md")
    assert everything_in(tmp_path) == sorted([*before, "notes.md", "tokenizer/part"])


@pytest.mark.parametrize("fault", [UserError, KeyboardInterrupt, RuntimeError])
def test_a_run_that_has_begun_keeps_its_folder(tmp_path, fault):
    with pytest.raises(fault):
        start(tmp_path / "run", fault("late"), METRICS)
    assert "run/checkpoints/part" in everything_in(tmp_path)


def test_a_lock_that_a_refused_start_removed_is_made_anew_and_holds(tmp_path):
    """Between opening the file and locking it, the start that held it may have removed it."""
    run = tmp_path / "run"
    late, first = RunLock(run), RunLock(run).__enter__()
    opened, once = type(run).open, []

    def open_then_lose(path, *args, **kwargs):
        file = opened(path, *args, **kwargs)
        if path.name == LOCK and not once:
            once.append(first.__exit__(UserError, None, None))
        return file

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(run), "open", open_then_lose)
        late.__enter__()
    with pytest.raises(UserError, match="in use"):
        RunLock(run).__enter__()
    late.__exit__(None)
