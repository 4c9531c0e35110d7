"""The run folder: JSON that is old or new, one process at a time, manifests that are sound or refused."""

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

from smollm_jax.checkpoint.listing import list_checkpoints
from smollm_jax.checkpoint.manifest import MANIFEST, _manifest_digest, seal, verify
from smollm_jax.runs.lock import LOCK, RunLock
from smollm_jax.runtime.files import Damaged, write_json_atomic

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


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "config.json"
    write_json_atomic(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json_atomic(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["config.json"]
    write_json_atomic(str(path), {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    assert os.listdir(tmp_path) == ["config.json"]


def sealed(folder):
    (folder / "part").mkdir(parents=True)
    (folder / "part" / "file").write_bytes(b"content")
    (folder / "meta.json").write_text("{}")
    seal(folder, {"step": 5, "leaves": {}})
    return folder


def test_every_single_flipped_bit_is_found(tmp_path):
    folder = sealed(tmp_path / "5")
    verify(folder)
    for path in (folder / "part" / "file", folder / MANIFEST):
        content = path.read_bytes()
        for bit in range(8 * len(content)):
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            with pytest.raises(Damaged):
                verify(folder)
        path.write_bytes(content)
    verify(folder)


def test_a_part_is_checked_alone(tmp_path):
    folder = sealed(tmp_path / "5")
    (folder / "meta.json").unlink()
    verify(folder, parts={"part"})
    with pytest.raises(Damaged, match=r"meta\.json is missing"):
        verify(folder, parts={"meta.json"})


def test_a_manifest_cannot_reach_outside_its_folder(tmp_path):
    folder = sealed(tmp_path / "5")
    (tmp_path / "secret").write_text("x")
    for name in ("../secret", str(tmp_path / "secret"), "part/../../secret", "", "a\0b"):
        sign(folder, {"format": 1, "about": {}, "files": {name: {"bytes": 1, "xxh3_128": ""}}})
        with pytest.raises(Damaged, match="not a file below the folder"):
            verify(folder)


def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(tmp_path):
    folder = sealed(tmp_path / "5")
    (folder / "part" / "file").unlink()
    os.mkfifo(folder / "part" / "file")
    with pytest.raises(Damaged, match="not a file"):
        verify(folder)


def sign(folder, manifest):
    (folder / MANIFEST).write_text(json.dumps(manifest | {"digest": _manifest_digest(manifest)}))


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries({"bytes": ANY_JSON, "xxh3_128": ANY_JSON}) | ANY_JSON
ABOUT = st.fixed_dictionaries({"step": st.just(5) | ANY_JSON, "leaves": ANY_JSON}) | ANY_JSON
FILES = st.dictionaries(st.sampled_from(["part/file", "part", "meta.json", "x" * 300]) | st.text(), ENTRY)


@pytest.fixture(scope="module")
def folder_to_fuzz(tmp_path_factory):
    return sealed(tmp_path_factory.mktemp("run") / "5")


@given(content=st.binary() | ANY_JSON.map(lambda v: json.dumps(v).encode()) | st.just(b"[" * 100_000))
@settings(max_examples=100, deadline=None)
def test_any_bytes_for_a_manifest_give_a_verdict(folder_to_fuzz, content):
    (folder_to_fuzz / MANIFEST).write_bytes(content)
    (info,) = list_checkpoints(folder_to_fuzz.parent)
    assert info.verdict != "good"
    assert "\n" not in info.verdict


@given(about=ABOUT, files=FILES | ANY_JSON, form=st.just(1) | ANY_JSON)
@settings(max_examples=200, deadline=None)
def test_any_signed_manifest_gives_a_verdict(folder_to_fuzz, about, files, form):
    sign(folder_to_fuzz, {"format": form, "about": about, "files": files})
    (info,) = list_checkpoints(folder_to_fuzz.parent)
    assert info.verdict
    assert "\n" not in info.verdict
