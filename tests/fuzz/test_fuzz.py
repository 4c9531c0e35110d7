"""The fuzz job, bounded and with a fixed seed; `python -m tests.fuzz --cases 20000` is the long one."""

import pytest

from tests.fuzz.driver import check, fuzz, table
from tests.fuzz.faulty import KINDS
from tests.fuzz.worker import case_rng

SEED = 0
CASES = [("requests", 600), ("folders", 500), ("data", 900)]  # runs and commands: test_fuzz_runs.py
MORE = [("requests", 1_000), ("folders", 700), ("data", 700)]

SAID = {  # of a fault, where it is not its name
    "raises": "KeyError", "ends": "ends the process (3)", "hangs natively": "hangs",
    "removes outside": "writes outside", "writes into a link": "writes outside",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "count", "seed"),
    [*((*one, SEED) for one in CASES), *(pytest.param(*one, SEED + 1, marks=pytest.mark.release) for one in MORE)],
)
def test_whatever_is_changed_is_accepted_or_refused_in_one_line(target, count, seed):
    check(target, count, seed)


def test_the_driver_notices_every_kind_of_fault():
    results = list(fuzz("faulty", range(1, len(KINDS) + 1), SEED))
    assert [result.what for result in results] == list(KINDS)
    for result in results:
        if result.what in ("accepted", "refused"):
            assert (result.kind, result.problem) == (result.what, "")
        else:
            assert result.kind == "failed"
            assert SAID.get(result.what, result.what) in result.problem, str(result)
    assert f"| faulty | {len(KINDS)} | 2 | 1 |" in table({"faulty": results}, {"faulty": 1.0})


def test_a_case_is_decided_by_target_seed_and_number():
    draws = [case_rng("data", 1, 2).random() for _ in range(2)]
    assert draws[0] == draws[1]
    assert (
        len({case_rng(*one).random() for one in [("data", 1, 3), ("data", 2, 2), ("runs", 1, 2)]} - {draws[0]})
        == 3
    )
