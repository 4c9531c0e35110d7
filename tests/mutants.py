"""Plant faults in the code, one at a time, and report which test finds each: `python -m tests.mutants [NAME ...]`.

A mutant replaces one piece of source text by a faulty one, in a copy of the checkout, and runs the fast tests that
should mind it. A mutant that survives is a hole in the tests. `tests/test_mutants.py` holds that the text of every
mutant is still there.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.support.paths import ROOT

COPIED = ("smollm_jax", "tests", "benchmarks", "serve.py", "train_jax.py", "pyproject.toml", "README.md")
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Mutant:
    """One fault: `old` stands exactly once in `file`, and the tests in `tests` should fail with `new`."""

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTANTS: tuple[Mutant, ...] = ()


def killer(mutant: Mutant, checkout: Path) -> str | None:
    """The first test that fails with the mutant in `checkout`; None if it survives."""
    path = checkout / mutant.file
    source = path.read_text()
    if source.count(mutant.old) != 1:
        raise ValueError(
            f"{mutant.name}: its text stands {source.count(mutant.old)} times in {mutant.file}, not once"
        )
    path.write_text(source.replace(mutant.old, mutant.new))
    try:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutant.tests.split()]
        env = os.environ | {"PYTHONPATH": str(checkout)}
        done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True, check=False)
    finally:
        path.write_text(source)
    if done.returncode == 0:
        return None
    found = FAILED.search(done.stdout)
    if done.returncode != 1 or found is None:
        raise RuntimeError(f"{mutant.name}: pytest itself failed\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return found[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="only these mutants")
    names = parser.parse_args().names
    survivors = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        checkout = Path(folder)
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, checkout / name)
        for mutant in MUTANTS:
            if names and mutant.name not in names:
                continue
            began = time.monotonic()
            test = killer(mutant, checkout)
            survivors += test is None
            seconds = time.monotonic() - began
            print(
                f"{mutant.name:<44} {'SURVIVES' if test is None else 'killed by ' + test}  ({seconds:.0f} s)",
                flush=True,
            )
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
