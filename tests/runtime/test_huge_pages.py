"""A run begins again with huge pages where the system has them for who asks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from smollm_jax.runtime import huge_pages

TELL = """
import os, sys
from pathlib import Path
from smollm_jax.runtime import huge_pages
huge_pages.OFFER, huge_pages._glibc = Path(sys.argv[1]), lambda: (2, 36)
print(os.getpid(), sys.argv[1:], os.environ.get("GLIBC_TUNABLES"), flush=True)
huge_pages.restart_with_huge_pages()
print("goes on")
"""


def lines_of(offer, tmp_path, *, program=TELL, by_pipe=False, **environment):
    (tmp_path / "enabled").write_text(offer)
    ours = (huge_pages.VARIABLE, huge_pages.RESTARTED)
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(
        [sys.executable, *(["-"] if by_pipe else ["-c", program]), str(tmp_path / "enabled"), "a word"],
        input=program if by_pipe else "", capture_output=True, text=True, check=True,
        env=inherited | {"JAX_PLATFORMS": "cpu"} | environment,
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


def test_a_program_that_is_run_inside_of_another_does_not_take_its_process(tmp_path):
    (tmp_path / "script.py").write_text(TELL)
    host = f"""
import runpy, sys
sys.argv = ["script.py", *sys.argv[1:]]
runpy.run_path({str(tmp_path / "script.py")!r}, run_name="__main__")
"""
    assert len(lines_of("always [madvise] never\n", tmp_path, program=host)) == 2


def test_a_program_that_came_by_a_pipe_is_not_asked_for_again(tmp_path):
    assert lines_of("always [madvise] never\n", tmp_path, by_pipe=True)[1:] == ["goes on"]


def test_a_process_that_loses_the_variable_does_not_begin_again_for_ever(tmp_path):
    assert len(lines_of("always [madvise] never\n", tmp_path, **{huge_pages.RESTARTED: "1"})) == 2


@pytest.mark.parametrize(("name", "value"), [("_glibc", "lambda: (2, 34)"), ("has_accelerator", "lambda: True")])
def test_an_old_glibc_or_an_accelerator_has_nothing_of_it(name, value, tmp_path):
    program = TELL.replace("print(os.getpid()", f"huge_pages.{name} = {value}\nprint(os.getpid()")
    assert len(lines_of("always [madvise] never\n", tmp_path, program=program)) == 2


def test_train_jax_begins_again():
    program = """
import runpy, sys
from smollm_jax.runtime import huge_pages
huge_pages.restart_with_huge_pages = lambda: print("begins again", flush=True)
script, sys.argv = sys.argv[1], ["train_jax.py", "--help"]
runpy.run_path(script, run_name="__main__")
"""
    script = Path(__file__).parent.parent / "train_jax.py"
    command = [sys.executable, "-c", program, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("begins again\n"), done


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
    monkeypatch.setattr(huge_pages, "has_accelerator", lambda: False)
    monkeypatch.setattr(huge_pages, "_glibc", lambda: (2, 36))
    monkeypatch.setattr(huge_pages, "OFFER", tmp_path / "enabled")
    assert huge_pages.environment() == {}
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    assert huge_pages.environment() == {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
