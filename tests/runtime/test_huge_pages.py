"""A run advises huge pages where the system has them on request and nobody has decided yet."""

import platform

import pytest

from smollm_jax.runtime import huge_pages

ON_REQUEST = "always [madvise] never\n"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A Linux without an accelerator whose kernel offers huge pages as `offer` says; None: not at all."""

    def make(offer=ON_REQUEST, *, libc=("glibc", "2.36"), accelerator=False, tunables=None):
        if offer is not None:
            (tmp_path / "enabled").write_text(offer)
        monkeypatch.setattr(huge_pages, "OFFER", tmp_path / "enabled")
        monkeypatch.setattr(huge_pages, "has_accelerator", lambda: accelerator)
        monkeypatch.setattr(platform, "libc_ver", lambda: libc)
        monkeypatch.delenv(huge_pages.VARIABLE, raising=False)
        if tunables is not None:
            monkeypatch.setenv(huge_pages.VARIABLE, tunables)

    return make


def test_they_are_advised_where_they_help(machine):
    machine()
    assert huge_pages.environment() == {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    assert huge_pages.hint().startswith("huge pages: set GLIBC_TUNABLES=glibc.malloc.hugetlb=1 before starting")


def test_other_tunables_are_kept(machine):
    machine(tunables="glibc.malloc.check=0")
    assert huge_pages.environment() == {"GLIBC_TUNABLES": "glibc.malloc.check=0:glibc.malloc.hugetlb=1"}


@pytest.mark.parametrize(
    "how",
    [
        {"offer": "[always] madvise never\n"},
        {"offer": "always madvise [never]\n"},
        {"offer": None},
        {"libc": ("glibc", "2.34")},
        {"libc": ("", "")},
        {"accelerator": True},
        {"tunables": "glibc.malloc.hugetlb=0"},
        {"tunables": "glibc.malloc.hugetlb=1"},
    ],
)
def test_nothing_is_advised_where_it_would_not_help_or_the_user_has_decided(machine, how):
    machine(**how)
    assert huge_pages.environment() == {}
    assert huge_pages.hint() == ""
