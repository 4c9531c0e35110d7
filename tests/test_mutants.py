"""The list of mutants fits the code: each text to replace is there, once, and each test to run too."""

import pytest

from tests.mutants import MUTANTS
from tests.support.paths import ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_fits_the_code(mutant):
    assert (ROOT / "smollm_jax" / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.new != mutant.old
    assert all((ROOT / word).exists() for word in mutant.tests.split() if word.startswith("tests"))


def test_names_are_unique():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 30
