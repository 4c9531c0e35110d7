"""The slower half of the fuzz job, in a file of its own for a second worker of pytest."""

import pytest

from tests.fuzz.driver import check


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "count"),
    [
        ("runs", 60),
        ("commands", 6),
        pytest.param("runs", 150, marks=pytest.mark.release),
        pytest.param("commands", 12, marks=pytest.mark.release),
    ],
)
def test_whatever_is_changed_in_a_run_is_accepted_or_refused_in_one_line(target, count):
    check(target, count, 0)
