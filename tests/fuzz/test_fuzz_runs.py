"""The slower half of the fuzz job, in a file of its own for a second worker of pytest."""

import pytest

from tests.fuzz.driver import check


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "count", "seed"),
    [
        ("runs", 60, 0),
        ("commands", 6, 0),
        pytest.param("runs", 150, 1, marks=pytest.mark.release),
        pytest.param("commands", 12, 1, marks=pytest.mark.release),
    ],
)
def test_whatever_is_changed_in_a_run_is_accepted_or_refused_in_one_line(target, count, seed):
    check(target, count, seed)
