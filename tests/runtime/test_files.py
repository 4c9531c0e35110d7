"""Files that are old or new, never a part."""

import errno
import json
import os
from pathlib import Path

import pytest

from smollm_jax.runtime.files import (
    Damaged,
    clean_left_overs,
    held_in,
    leads_out,
    read_json,
    read_whole,
    write_json_atomic,
    written_aside,
)


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "config.json"
    write_json_atomic(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json_atomic(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["config.json"]
    write_json_atomic(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    assert os.listdir(tmp_path) == ["config.json"]


def test_a_folder_appears_whole_and_replaces_an_older_one(tmp_path):
    for content in ("old", "new"):
        with written_aside(tmp_path / "folder") as part:
            part.mkdir()
            (part / "file").write_text(content)
            assert part.name.startswith(".")
        assert (tmp_path / "folder" / "file").read_text() == content
    with pytest.raises(FileNotFoundError), written_aside(tmp_path / "folder") as part:
        (part / "file").write_text("no folder was made")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert (tmp_path / "folder" / "file").read_text() == "new"


def test_what_a_dead_process_left_is_cleaned_up_by_the_next_writer(tmp_path):
    (tmp_path / ".e[1].part-1").mkdir()
    (tmp_path / ".e[1].old-1").mkdir()
    (tmp_path / ".e[1].old-1" / "last").write_text("good")
    (tmp_path / ".notes.old-1999").write_text("mine")
    with pytest.raises(FileNotFoundError), written_aside(tmp_path / "e[1]"):
        assert (tmp_path / "e[1]" / "last").read_text() == "good"  # killed between two renames
    assert sorted(os.listdir(tmp_path)) == [".notes.old-1999", "e[1]"]


@pytest.mark.parametrize("left", ["a file", "a folder", "a link"])
def test_a_left_over_of_our_own_number_is_replaced_and_no_link_followed(tmp_path, left):
    """Also while another process writes in the folder: containers use a number again."""
    part, precious = tmp_path / f".a.part-{os.getpid()}", tmp_path / "precious"
    precious.write_text("mine")
    {"a file": part.touch, "a folder": part.mkdir, "a link": lambda: part.symlink_to(precious)}[left]()
    with (tmp_path / ".b.part-1").open("w"), written_aside(tmp_path / "b") as other:
        other.write_text("b")
        with written_aside(tmp_path / "a") as new:
            new.write_text("a")
    assert (precious.read_text(), (tmp_path / "a").read_text()) == ("mine", "a")
    assert not (tmp_path / "a").is_symlink()


def test_who_holds_another_lock_cleans_up_without_one(tmp_path, monkeypatch):
    (tmp_path / ".a.part-1").touch()

    def no_locks(*_):
        raise OSError(errno.ENOTSUP, "no locks here")

    monkeypatch.setattr("fcntl.flock", no_locks)
    clean_left_overs(tmp_path, ["a"])
    assert list(tmp_path.iterdir())
    clean_left_overs(tmp_path, ["a"], is_locked=True)
    assert not list(tmp_path.iterdir())


def test_what_a_living_process_writes_is_left_alone(tmp_path):
    with written_aside(tmp_path / "a") as part:
        part.mkdir()
        (tmp_path / ".a.part-1").mkdir()
        clean_left_overs(tmp_path, ["a"])
        assert (tmp_path / ".a.part-1").exists()
    clean_left_overs(tmp_path, ["a"])
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("how", ["mount point", "mount point that shows late"])
def test_a_folder_that_cannot_be_renamed_is_filled_in_place(tmp_path, monkeypatch, how):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    plain = Path.rename

    def busy(self, target):
        if self == tmp_path / "out":
            raise OSError(errno.EBUSY, "busy")
        return plain(self, target)

    monkeypatch.setattr(Path, "rename", busy)
    monkeypatch.setattr("os.path.ismount", lambda path: how == "mount point" and path == tmp_path / "out")
    inode = (tmp_path / "out").stat().st_ino
    with written_aside(tmp_path / "out") as part:
        (part / "sub").mkdir(parents=True)
        (part / "sub" / "file").write_text("new")
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == [
        "out",
        "out/sub",
        "out/sub/file",
    ]
    assert (tmp_path / "out").stat().st_ino == inode


def test_the_lost_and_found_of_a_disk_is_nobodys(tmp_path, monkeypatch):
    (tmp_path / "out" / "lost+found").mkdir(parents=True)
    (tmp_path / "out" / "old").touch()
    assert [path.name for path in held_in(tmp_path / "out")] == ["lost+found", "old"]
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path / "out")
    assert [path.name for path in held_in(tmp_path / "out")] == ["old"]
    with written_aside(tmp_path / "out") as part:
        part.mkdir()
        (part / "new").touch()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["lost+found", "new"]


def test_a_full_disk_is_said_with_the_name_of_the_file(tmp_path):
    with pytest.raises(OSError, match="No space") as caught, written_aside(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.filename == str(tmp_path / "out")


def test_only_links_out_of_a_folder_lead_out(tmp_path):
    for name in ("hub/blobs/1", "hub/snapshots/x/a", "f/inside", "secret"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "hub/snapshots/x/f").symlink_to("../../blobs/1")
    (tmp_path / "hub/snapshots/x/g").symlink_to("../../../secret")
    (tmp_path / "f/a").symlink_to("inside")
    (tmp_path / "f/b").symlink_to("../secret")
    (tmp_path / "f/c").symlink_to("../missing")
    (tmp_path / "link").symlink_to("f")
    out = [path for path in sorted(tmp_path.rglob("*")) if leads_out(path)]
    assert [str(path.relative_to(tmp_path)) for path in out] == ["f/b", "f/c", "hub/snapshots/x/g"]
    assert not leads_out(tmp_path / "link" / "inside")


def test_a_file_of_a_size_that_only_fills_the_memory_is_not_read(tmp_path):
    """A sparse file takes no room on the disk of whoever sends it."""
    path = tmp_path / "config.json"
    path.touch()
    os.truncate(path, 10**12)
    with pytest.raises(Damaged, match="has 1,000,000,000,000 bytes; at most"):
        read_json(path)
    with pytest.raises(Damaged, match="at most"):
        read_whole(path)
