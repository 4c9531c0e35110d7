"""Checkpoints: what was saved comes back bit for bit, or the damage is named and nothing is deleted."""

import errno
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from smollm_jax.checkpoint.arrays import store
from smollm_jax.checkpoint.listing import Retention, list_checkpoints, table, verified_checkpoints
from smollm_jax.checkpoint.manager import CheckpointManager, read_params
from smollm_jax.checkpoint.manifest import MANIFEST, read_manifest, seal
from smollm_jax.distributed.processes import Processes
from smollm_jax.runtime.errors import UserError


class Moments(NamedTuple):
    count: jax.Array
    mu: dict
    nu: dict


def make_state(value: float = 1.0) -> dict:
    params = {
        "embed": jnp.full((16, 8), float(value)),
        "blocks": {"q": jnp.arange(24.0).reshape(2, 3, 4) + value, "norm": jnp.ones((2, 8), jnp.bfloat16)},
    }
    moments = Moments(count=jnp.int32(value), mu=params, nu=jax.tree.map(jnp.square, params))
    return {"params": params, "opt_state": (moments, ()), "bad_steps": jnp.uint32(3)}


def shapes_of(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same_bits(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def saved(folder, *steps, keep_last=9, keep_every=0) -> CheckpointManager:
    checkpoints = CheckpointManager(folder, keep_last=keep_last, keep_every=keep_every)
    for step in steps:
        checkpoints.save(step, make_state(step), {"step": step, "cursor": {"row": step}})
    assert checkpoints.wait(), checkpoints.failed
    return checkpoints


def newest_good(folder, **options):
    return next(verified_checkpoints(Path(folder), **options), None)


def names(folder) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def largest_file(folder) -> Path:
    return max((p for p in Path(folder).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_bit(path, position=0.5):
    content = bytearray(path.read_bytes())
    content[int(len(content) * position)] ^= 4
    path.write_bytes(content)


def run_python(code, *args, **options):
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, **options)


def test_a_restored_state_has_the_saved_bits_structure_and_meta(tmp_path):
    state = make_state(7)
    state["params"]["embed"] = state["params"]["embed"].at[0, 0].set(jnp.nan).at[0, 1].set(-0.0)
    checkpoints = CheckpointManager(tmp_path, keep_last=2, keep_every=0)
    meta = {"step": 7, "config": {"é": [1, 2.5, None]}}
    checkpoints.save(7, state, meta)
    found = newest_good(tmp_path) if checkpoints.wait() else None
    assert (found.step, found.meta) == (7, meta)
    assert_same_bits(checkpoints.restore(7, shapes_of(state)), state)


def test_arrays_come_back_in_the_layout_of_the_target(tmp_path):
    checkpoints = saved(tmp_path, 1)
    mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.P("data"))
    target = shapes_of(make_state())
    target["params"]["embed"] = jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=split)
    target["params"]["blocks"]["q"] = np.zeros((2, 3, 4), np.float32)
    params = checkpoints.restore(1, target)["params"]
    assert params["embed"].sharding == split
    assert isinstance(params["blocks"]["q"], np.ndarray)
    np.testing.assert_array_equal(params["embed"], make_state(1)["params"]["embed"])


def test_buffers_donated_and_overwritten_right_after_save_do_not_reach_the_file(tmp_path):
    update = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 - 1, state), donate_argnums=0)
    checkpoints = CheckpointManager(tmp_path, keep_last=9, keep_every=0)
    for step in range(1, 6):
        state = {"params": {"w": jnp.full((512, 512), float(step)), "host": np.full(9, step)}}
        state["params"]["w"].block_until_ready()
        host = state["params"].pop("host")
        checkpoints.save(step, {"params": {"w": state["params"]["w"], "host": host}}, {})
        host[:] = -1
        jax.block_until_ready(update(state))
    assert checkpoints.wait()
    for step in range(1, 6):
        _, params = read_params(tmp_path, step)
        assert (params["w"] == step).all()
        assert (params["host"] == step).all()


class OneOfSeveral(Processes):
    """Who takes the way of several, and has nobody to wait for."""

    several = True

    def gather(self, value):
        return [value]


@pytest.mark.parametrize("room", [True, False])
def test_where_there_is_no_room_for_a_copy_the_state_itself_is_written_first(tmp_path, room, monkeypatch):
    monkeypatch.setattr("smollm_jax.checkpoint.manager.store", lambda *args: (time.sleep(0.3), store(*args)))
    checkpoints = CheckpointManager(tmp_path, keep_last=9, keep_every=0, processes=OneOfSeveral())
    checkpoints.beside_the_step = room
    state = {"params": {"w": jnp.arange(1e5), "b": jnp.arange(9)}}
    before = jax.tree.map(np.array, state)
    checkpoints.save(3, state, {})
    assert checkpoints._thread.is_alive() == room
    jax.jit(lambda tree: jax.tree.map(lambda x: x * 3, tree), donate_argnums=0)(state)
    assert checkpoints.wait()
    _, params = read_params(tmp_path, 3)
    for name, leaf in before["params"].items():
        np.testing.assert_array_equal(params[name], leaf)


def other_dtype(state):
    state["params"]["blocks"]["q"] = state["params"]["blocks"]["q"].astype(jnp.bfloat16)


def other_shape(state):
    state["params"]["blocks"]["q"] = jnp.zeros((2, 3, 5))


def leaf_not_in_checkpoint(state):
    state["params"]["blocks"]["k"] = jnp.zeros(3)


def leaf_only_in_checkpoint(state):
    del state["params"]["blocks"]["q"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            other_dtype,
            r"params/blocks/q: expected bfloat16 \(2,3,4\), the checkpoint holds float32 \(2,3,4\)",
        ),
        (other_shape, r"params/blocks/q: expected float32 \(2,3,5\), the checkpoint holds float32 \(2,3,4\)"),
        (leaf_not_in_checkpoint, r"params/blocks/k: expected float32 \(3\), the checkpoint holds nothing"),
        (
            leaf_only_in_checkpoint,
            r"params/blocks/q: expected nothing, the checkpoint holds float32 \(2,3,4\)",
        ),
    ],
)
def test_a_target_that_does_not_fit_is_refused_by_leaf_name(tmp_path, change, message):
    checkpoints, target = saved(tmp_path, 1), make_state()
    change(target)
    with pytest.raises(ValueError, match=message):
        checkpoints.restore(1, target)
    assert names(tmp_path) == ["1"]


def flipped_bit_in_an_array(folder):
    flip_bit(largest_file(folder / "params"))


def truncated_array(folder):
    path = largest_file(folder / "opt_state")
    path.write_bytes(path.read_bytes()[:-1])


def missing_file(folder):
    largest_file(folder / "params").unlink()


def missing_part(folder):
    shutil.rmtree(folder / "opt_state")


def empty_folder(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def file_for_a_folder(folder):
    shutil.rmtree(folder)
    folder.write_text("?")


def changed_meta(folder):
    text = (folder / "meta.json").read_text()
    (folder / "meta.json").write_text(text.replace('"row": 3', '"row": 4'))


def missing_manifest(folder):
    (folder / MANIFEST).unlink()


def half_written_manifest(folder):
    (folder / MANIFEST).write_bytes((folder / MANIFEST).read_bytes()[:100])


def flipped_bit_in_the_manifest(folder):
    flip_bit(folder / MANIFEST, 0.4)


def copy_of_another_step(folder):
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("2"), folder)


DAMAGE = {
    flipped_bit_in_an_array: "has changed",
    truncated_array: "bytes",
    missing_file: "is missing",
    missing_part: "is missing",
    empty_folder: "empty",
    file_for_a_folder: "folder",
    changed_meta: "meta.json has changed",
    missing_manifest: "manifest.json is missing",
    half_written_manifest: "manifest.json is not JSON",
    flipped_bit_in_the_manifest: "manifest.json",
    copy_of_another_step: "of step 2",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_is_named_passed_over_and_left_for_the_person(tmp_path, damage, caplog):
    checkpoints = saved(tmp_path, 1, 2, 3)
    damage(tmp_path / "3")
    before = sorted(p.relative_to(tmp_path / "3") for p in (tmp_path / "3").rglob("*"))
    assert [info.verdict == "good" for info in list_checkpoints(tmp_path)] == [True, True, False]
    assert DAMAGE[damage] in list_checkpoints(tmp_path)[2].verdict
    with pytest.raises(ValueError, match=f"checkpoint 3 .* is damaged: .*{DAMAGE[damage]}"):
        checkpoints.restore(3, make_state())

    with caplog.at_level(logging.WARNING):
        found = newest_good(tmp_path, rename=True)
    assert found.step == 2
    assert str(tmp_path / "3") in caplog.text
    assert DAMAGE[damage] in caplog.text
    assert names(tmp_path) == ["1", "2", "3.bad"]
    assert sorted(p.relative_to(tmp_path / "3.bad") for p in (tmp_path / "3.bad").rglob("*")) == before
    assert_same_bits(checkpoints.restore(2, make_state()), make_state(2))


def test_looking_without_set_aside_changes_no_name(tmp_path, caplog):
    saved(tmp_path, 1, 2)
    flipped_bit_in_an_array(tmp_path / "2")
    assert newest_good(tmp_path).step == 1
    assert "passed over" in caplog.text
    assert names(tmp_path) == ["1", "2"]


def test_where_nothing_is_good_nothing_is_found_and_nothing_is_gone(tmp_path):
    saved(tmp_path, 1, 2)
    missing_manifest(tmp_path / "1")
    missing_file(tmp_path / "2")
    assert newest_good(tmp_path, rename=True) is None
    assert names(tmp_path) == ["1.bad", "2.bad"]
    assert [info.verdict.split(":")[0] for info in list_checkpoints(tmp_path)] == ["set aside", "set aside"]
    with pytest.raises(ValueError, match="no good checkpoint"):
        read_params(tmp_path)
    assert newest_good(tmp_path / "new") is None


def test_a_checkpoint_of_a_clock_ahead_is_new(tmp_path):
    saved(tmp_path, 1).close()
    os.utime(tmp_path / "1", (time.time() + 9_000,) * 2)
    assert list_checkpoints(tmp_path)[0].age_seconds == 0


def test_only_leftovers_of_saves_and_removals_are_cleaned(tmp_path):
    saved(tmp_path, 1)
    for name in (".tmp-2-99", ".trash-1-99", "notes", ".git", "2.bad"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    checkpoints = CheckpointManager(tmp_path, keep_last=1, keep_every=0)
    assert newest_good(tmp_path).step == 1
    checkpoints.clean()
    assert names(tmp_path) == [".git", "1", "2.bad", "notes"]


def test_the_newest_and_every_nth_stay(tmp_path):
    saved(tmp_path, *range(1, 9), keep_last=2, keep_every=3)
    assert names(tmp_path) == ["3", "6", "7", "8"]


def test_the_last_one_before_a_decay_stays_and_the_list_says_why(tmp_path):
    checkpoints = CheckpointManager(tmp_path / "checkpoints", keep_last=1, keep_every=20)
    checkpoints.retention = replace(checkpoints.retention, before=35)
    for step in range(5, 65, 5):
        if step != 35:  # as after a bad step
            checkpoints.save(step, make_state(), {})
            assert checkpoints.wait()
    assert names(tmp_path / "checkpoints") == ["20", "30", "40", "60"]
    lines = table(tmp_path, checkpoints.retention).splitlines()[1:]
    assert [line.partition("good")[2] for line in lines] == [
        ", kept: every 20", ", kept: before the decay", ", kept: every 20", ", kept: every 20",
    ]  # fmt: skip
    early = Retention(keep_last=1, before=35)
    assert early.reasons([10, 20]) == {20: ""}  # the decay is still to come


def test_damaged_checkpoints_neither_count_as_kept_nor_are_removed(tmp_path):
    saved(tmp_path, 1, 2, 3)
    truncated_array(tmp_path / "3")
    missing_manifest(tmp_path / "2")
    saved(tmp_path, 4, keep_last=2)
    assert names(tmp_path) == ["1", "2", "3", "4"]
    saved(tmp_path, 5, keep_last=1)
    assert names(tmp_path) == ["2", "3", "5"]


def test_a_removal_that_is_cut_short_leaves_only_whole_checkpoints(tmp_path, monkeypatch, caplog):
    saved(tmp_path, 1)

    def remove_one_file_and_fail(folder, ignore_errors=False):
        if not ignore_errors:
            largest_file(folder).unlink()
            raise OSError("cut short")

    with monkeypatch.context() as patch:
        patch.setattr("smollm_jax.checkpoint.manager.shutil.rmtree", remove_one_file_and_fail)
        checkpoints = saved(tmp_path, 2, keep_last=1)
    assert "could not be removed: cut short" in caplog.text
    assert {info.verdict for info in list_checkpoints(tmp_path)} == {"good"}
    checkpoints.clean()
    assert names(tmp_path) == ["2"]


def test_a_save_older_than_what_is_there_is_not_removed_by_its_own_retention(tmp_path):
    saved(tmp_path, 8, 9)
    saved(tmp_path, 5, keep_last=1)
    assert names(tmp_path) == ["5", "9"]


def test_saving_a_good_step_again_writes_nothing_and_a_damaged_one_is_replaced(tmp_path):
    saved(tmp_path, 1)
    written = (tmp_path / "1" / MANIFEST).stat().st_mtime_ns
    checkpoints = saved(tmp_path, 1)
    assert (tmp_path / "1" / MANIFEST).stat().st_mtime_ns == written
    flipped_bit_in_an_array(tmp_path / "1")
    saved(tmp_path, 1)
    assert names(tmp_path) == ["1", "1.bad"]
    assert_same_bits(checkpoints.restore(1, make_state()), make_state(1))
    missing_file(tmp_path / "1")
    saved(tmp_path, 1)
    assert names(tmp_path) == ["1", "1.bad", "1.bad-2"]


def test_parameters_are_read_without_the_optimizer(tmp_path, caplog):
    saved(tmp_path, 1, 2)
    shutil.rmtree(tmp_path / "2" / "opt_state")
    found, params = read_params(tmp_path)
    assert (found.step, found.meta["cursor"]) == (2, {"row": 2})
    assert_same_bits(params, jax.tree.map(np.asarray, make_state(2)["params"]))
    flipped_bit_in_an_array(tmp_path / "2")
    assert read_params(tmp_path)[0].step == 1
    assert "passed over" in caplog.text
    with pytest.raises(ValueError, match=r"checkpoint 2 .* is damaged"):
        read_params(tmp_path, 2)
    with pytest.raises(ValueError, match="no checkpoint of step 5; there are: 1, 2"):
        read_params(tmp_path, 5)


def test_a_checkpoint_opens_with_orbax_alone(tmp_path):
    saved(tmp_path, 1, 2)
    state = make_state(2)
    single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for item in ("params", "opt_state"):
        with ocp.PyTreeCheckpointer() as checkpointer:
            shapes = checkpointer.metadata((tmp_path / "2" / item).absolute()).item_metadata.tree
            args = jax.tree.map(lambda _: ocp.ArrayRestoreArgs(sharding=single), shapes)
            read = checkpointer.restore((tmp_path / "2" / item).absolute(), restore_args=args)[item]
        assert_same_leaves(read, state[item])
    with ocp.CheckpointManager(tmp_path.absolute(), item_names=("params", "opt_state")) as manager:
        assert manager.latest_step() == 2
        read = manager.restore(2, args=ocp.args.Composite(params=ocp.args.PyTreeRestore()))["params"]["params"]
    assert_same_leaves(read, state["params"])


def assert_same_leaves(read, saved):
    for a, b in zip(jax.tree.leaves(read), jax.tree.leaves(saved), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


NAMES = ["lr[1]", "a\\b", "gs:", "a*?b", "{x}", "line\nend", os.fsdecode(b"x\xff"), "モデル", "~", "%41 #"]


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_is_read_back_below_a_folder_of_any_legal_name(tmp_path, name):
    checkpoints = saved(tmp_path / name / "checkpoints", 1)
    assert names(tmp_path) == [name]
    assert [info.verdict for info in list_checkpoints(checkpoints.folder)] == ["good"]
    assert_same_bits(checkpoints.restore(1, make_state()), make_state(1))


def test_names_with_patterns_are_written_where_the_temporary_folder_has_one_too(tmp_path, monkeypatch):
    (tmp_path / "t[1]").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "t[1]"))
    checkpoints = saved(tmp_path / "lr[1]", 1)
    assert_same_bits(checkpoints.restore(1, make_state()), make_state(1))


def without_the_index(group):
    (group / "manifest.ocdbt").unlink()


def without_a_file(group):
    largest_file(group / "ocdbt.process_0").unlink()


def with_a_file_cut_short(group):
    path = largest_file(group / "ocdbt.process_0" / "d")
    path.write_bytes(path.read_bytes()[:-300])


@pytest.mark.parametrize("harm", [without_the_index, without_a_file, with_a_file_cut_short])
def test_a_checkpoint_whose_arrays_cannot_be_read_is_not_saved(tmp_path, harm, monkeypatch):
    plain = ocp.Checkpointer.save

    def save(self, directory, *args, **options):
        plain(self, directory, *args, **options)
        if directory.name == "opt_state":
            harm(Path(directory))

    checkpoints = saved(tmp_path, 1)
    monkeypatch.setattr(ocp.Checkpointer, "save", save)
    big = {"params": {"w": jnp.ones(9)}, "opt_state": {"mu": jnp.ones((90, 90)), "nu": jnp.ones(4)}}
    checkpoints.save(2, big, {})
    assert not checkpoints.wait()
    assert names(tmp_path) == ["1"]


def test_a_leaf_that_was_not_written_is_missed(tmp_path, monkeypatch):
    plain = ocp.args.PyTreeSave
    monkeypatch.setattr(ocp.args, "PyTreeSave", lambda tree: plain({g: {"w": p["w"]} for g, p in tree.items()}))
    checkpoints = CheckpointManager(tmp_path, keep_last=1, keep_every=0)
    checkpoints.save(1, {"params": {"w": jnp.ones(9), "b": jnp.ones(2)}}, {})
    assert not checkpoints.wait()
    assert "params/b is missing" in checkpoints.failed


def resealed(folder):
    about = read_manifest(folder)["about"]
    (folder / MANIFEST).unlink()
    seal(folder, about)


def test_a_seal_does_not_vouch_for_arrays_without_their_index(tmp_path):
    """As older releases sealed below a folder with brackets."""
    checkpoints = saved(tmp_path, 1, 2, 3, keep_last=2)
    (tmp_path / "3" / "params" / "manifest.ocdbt").unlink()
    resealed(tmp_path / "3")
    assert "never written" in list_checkpoints(tmp_path)[-1].verdict
    assert newest_good(tmp_path).step == 2
    checkpoints.save(3, make_state(3), {})
    assert checkpoints.wait()
    assert_same_bits(checkpoints.restore(3, make_state()), make_state(3))


@pytest.mark.parametrize("content", ["", "[]", '{"tree_metadata": {}}'])
def test_what_orbax_cannot_read_is_damage_in_one_line(tmp_path, content):
    checkpoints = saved(tmp_path, 1)
    (tmp_path / "1" / "params" / "_METADATA").write_text(content)
    resealed(tmp_path / "1")
    with pytest.raises(UserError, match="is damaged"):
        read_params(tmp_path, 1)
    with pytest.raises(UserError, match="is damaged"):
        checkpoints.restore(1, make_state())


def test_orbax_is_not_asked_for_arrays_that_cannot_be_read(tmp_path, monkeypatch):
    """It leaves other reads behind, whose threads print tracebacks once its event loop is closed."""
    saved(tmp_path, 1)
    index = tmp_path / "1" / "params" / "manifest.ocdbt"
    index.write_bytes(index.read_bytes()[:-1] + b"x")
    resealed(tmp_path / "1")
    monkeypatch.setattr(ocp.Checkpointer, "restore", lambda *_, **__: pytest.fail("orbax was asked"))
    with pytest.raises(UserError, match="params is damaged"):
        read_params(tmp_path)


def test_meta_that_is_not_json_is_the_callers_error(tmp_path):
    checkpoints = CheckpointManager(tmp_path, keep_last=1, keep_every=0)
    with pytest.raises(TypeError, match="JSON"):
        checkpoints.save(1, make_state(), {"array": np.ones(1)})


FULL_DISK = """
    import os, resource, signal, sys, time
    import numpy as np
    from smollm_jax.checkpoint.manager import CheckpointManager
    checkpoints = CheckpointManager(sys.argv[1], keep_last=3, keep_every=0)
    # of several arrays that fail, each is reported to an event loop that has ended with the first
    state = {"params": {f"w{i}": np.random.default_rng(i).random(5_000) for i in range(20)}}
    def save(step):
        checkpoints.save(step, state, {})
        print(step, checkpoints.wait(), checkpoints.failed and checkpoints.failed.split(":")[0])
    save(1)
    if sys.argv[2] == "limit":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
        save(2)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    else:
        save(2)
        checkpoints.keep_last = 1
        import shutil; shutil.rmtree(sys.argv[1] + "/../other")
    save(3)
    deadline = time.monotonic() + 10  # what the failed save left goes once its last writer has ended
    while any(name.startswith(".") for name in os.listdir(sys.argv[1])) and time.monotonic() < deadline:
        time.sleep(0.05)
"""


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2200k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def check_full_disk(folder, kind, reason):
    process = run_python(FULL_DISK, folder, kind, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=60)
    assert out.split("\n")[:3] == ["1 True None", "2 False step 2", "3 True None"], (out, err)
    assert f"checkpoint 2 could not be saved ({reason}); the newest is 1" in err
    assert "Traceback" not in err
    assert [info.verdict for info in list_checkpoints(folder)] == ["good"] * len(list_checkpoints(folder))
    assert not [name for name in names(folder) if name.startswith(".")]


def test_a_full_disk_keeps_the_last_good_one_and_the_next_save_tries_again(small_disk):
    (small_disk / "other").mkdir()
    (small_disk / "other" / "file").write_bytes(bytes(1_000_000))
    (small_disk / "checkpoints").mkdir()
    check_full_disk(small_disk / "checkpoints", "tmpfs", os.strerror(errno.ENOSPC))


def test_a_file_that_cannot_grow_keeps_the_last_good_one_and_the_next_save_tries_again(tmp_path):
    check_full_disk(tmp_path / "checkpoints", "limit", os.strerror(errno.EFBIG))
    assert names(tmp_path / "checkpoints") == ["1", "3"]


ENDLESS_SAVES = """
    import sys
    import numpy as np
    from smollm_jax.checkpoint.manager import CheckpointManager
    checkpoints = CheckpointManager(sys.argv[1], keep_last=2, keep_every=0)
    checkpoints.clean()
    step = int(sys.argv[2])
    while True:
        params = {f"w{i}": np.full(300_000, step, np.float32) for i in range(4)}
        checkpoints.save(step, {"params": params, "step": np.int64(step)}, {"step": step})
        assert checkpoints.wait(), checkpoints.failed
        print(step, flush=True)
        step += 1
"""


@pytest.mark.slow
def test_kill_9_at_any_moment_of_a_save_leaves_the_newest_loadable(tmp_path):
    moments, newest, interrupted = random.Random(0), 0, 0
    for _ in range(6):
        process = run_python(ENDLESS_SAVES, tmp_path, newest + 1)
        reported = int(process.stdout.readline())
        time.sleep(moments.uniform(0, 0.25))
        process.send_signal(signal.SIGKILL)
        reported = max([reported, *map(int, process.communicate()[0].split())])
        interrupted += any(name.startswith(".") for name in names(tmp_path))
        found = newest_good(tmp_path)
        assert found.step in (reported, reported + 1)
        assert {info.verdict for info in list_checkpoints(tmp_path)} == {"good"}
        _, params = read_params(tmp_path)
        assert all((leaf == found.step).all() for leaf in params.values())
        newest = found.step
    assert interrupted, "no kill fell into a save; the test proves nothing"


def test_listing_imports_neither_jax_nor_orbax(tmp_path):
    saved(tmp_path, 1)
    code = """
        import json, sys
        from smollm_jax.checkpoint.listing import list_checkpoints
        info, = list_checkpoints(sys.argv[1])
        heavy = [name for name in ("jax", "orbax", "numpy", "flax") if name in sys.modules]
        print(json.dumps([info.name, info.step, info.verdict, info.bytes, info.age_seconds < 60, heavy]))
    """
    out, _ = run_python(code, tmp_path).communicate(timeout=60)
    size = sum(p.stat().st_size for p in (tmp_path / "1").rglob("*") if p.is_file())
    assert json.loads(out) == ["1", 1, "good", size, True, []]
