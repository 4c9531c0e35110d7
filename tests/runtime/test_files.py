"""Files that are old or new, never a part."""

import json
import os

import pytest

from smollm_jax.runtime.files import write_json_atomic, written_aside


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
