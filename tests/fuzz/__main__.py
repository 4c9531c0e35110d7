"""Feed our readers and our server with files and requests that are damaged or hostile: `python -m tests.fuzz`.

A case changes a sound folder, run, data file or request at random, and must be accepted or refused in one line: no
other exception, no traceback, nothing that takes ten seconds, nothing written outside. Target, seed and number
decide a case, so that `--only NUMBER` repeats it; what a request does may show in a later one.
"""

import argparse
import sys
import time

from tests.fuzz.driver import Result, fuzz, table
from tests.fuzz.worker import TARGETS

SHARES = {"requests": 0.25, "folders": 0.35, "runs": 0.075, "data": 0.322, "commands": 0.003}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", type=int, default=2_000, help="of all targets, each by its share")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", default=",".join(TARGETS), help="names, separated by commas")
    parser.add_argument("--only", type=int, help="run this case alone")
    parser.add_argument("--first", type=int, default=1, help="number of the first case")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="most seconds for a target")
    settings = parser.parse_args()
    results: dict[str, list[Result]] = {}
    took: dict[str, float] = {}
    names = settings.targets.split(",")
    whole = sum(SHARES[name] for name in names)
    for name in names:
        count = max(round(settings.cases * SHARES[name] / whole), 1)
        numbers = [settings.only] if settings.only else range(settings.first, settings.first + count)
        began, results[name] = time.monotonic(), []
        for result in fuzz(name, numbers, settings.seed, settings.seconds):
            results[name].append(result)
            if result.kind == "failed":
                print(result, file=sys.stderr, flush=True)
            elif settings.only:
                print(f"{result.kind} in {result.seconds:.2f} s: {result.what}", file=sys.stderr)
        took[name] = time.monotonic() - began
    print(table(results, took))
    return int(any(result.kind == "failed" for found in results.values() for result in found))


if __name__ == "__main__":
    sys.exit(main())
