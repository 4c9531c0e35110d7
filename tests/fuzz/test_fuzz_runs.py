"""The slower half of the fuzz job, in a file of its own for a second worker of pytest."""

import pytest

from tests.fuzz.driver import check


@pytest.mark.slow
@pytest.mark.parametrize(("target", "count"), [("runs", 150), ("commands", 12)])
def test_whatever_is_changed_in_a_run_is_accepted_or_refused_in_one_line(target, count):
    check(target, count, 0)
