"""A run begins again with huge pages where the system has them for who asks."""

import os
import subprocess
import sys

import pytest

from smollm_jax import huge_pages

TELL = """
import os, sys
from pathlib import Path
from smollm_jax import huge_pages
huge_pages.OFFER = Path(sys.argv[1])
print(os.getpid(), sys.argv[1:], os.environ.get("GLIBC_TUNABLES"), flush=True)
huge_pages.restart_with_huge_pages()
print("goes on")
"""


def lines_of(offer, tmp_path, **environment):
    (tmp_path / "enabled").write_text(offer)
    inherited = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-c", TELL, str(tmp_path / "enabled"), "a word"],
        capture_output=True, text=True, check=True, env=inherited | environment,
    )  # fmt: skip
    return done.stdout.splitlines()


def test_a_process_begins_again_once_and_keeps_its_number_and_words(tmp_path):
    first, second, last = lines_of("always [madvise] never\n", tmp_path)
    assert first.endswith("'a word'] None")
    assert second == first.replace("None", "glibc.malloc.hugetlb=1")
    assert last == "goes on"


def test_other_tunables_are_kept(tmp_path):
    second = lines_of("always [madvise] never\n", tmp_path, GLIBC_TUNABLES="glibc.malloc.check=0")[1]
    assert second.endswith(" glibc.malloc.check=0:glibc.malloc.hugetlb=1")


@pytest.mark.parametrize(
    ("offer", "environment"),
    [
        ("[always] madvise never\n", {}),
        ("always madvise [never]\n", {}),
        ("always [madvise] never\n", {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}),
    ],
)
def test_nothing_happens_where_it_would_not_help_or_the_user_has_decided(offer, environment, tmp_path):
    assert len(lines_of(offer, tmp_path, **environment)) == 2


def test_nothing_happens_where_the_kernel_has_no_such_pages(tmp_path, monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(huge_pages, "OFFER", tmp_path / "not there")
    assert huge_pages.environment() == {}
