"""Manifests that are sound or refused."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smollm_jax.checkpoint.listing import list_checkpoints
from smollm_jax.checkpoint.manifest import MANIFEST, _manifest_digest, seal, verify
from smollm_jax.runtime.files import Damaged


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
