"""Run the cases of one target in a process that may hang or die; `tests.fuzz.driver` starts it.

Each line of stdin is the number of a case. The answers on stdout are lines of JSON: what the case has changed,
then its result. Everything else that is printed goes to the log of the driver.
"""

import faulthandler
import hashlib
import importlib
import json
import os
import random
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from smollm_jax.runtime.errors import SourceTimeout, UserError

LIMIT_SECONDS = 10.0
LIMITS = {"commands": 100.0, "faulty": 2.0}  # a process imports all libraries, and may compile
MEMORY_BYTES = 6 * 2**30  # beyond what the libraries map at the start; a case has a few kB
SECRET = b"TOP-SECRET-5f2c"
SOUND = 0  # the number of the case that changes nothing
TARGETS = ("requests", "folders", "runs", "data", "commands")

Attempts = list[tuple[str, Callable[[], Any]]]


class Target(Protocol):
    """What is fuzzed: sound files below `base`, and cases that change a copy of them.

    `case` gets an empty folder, and None instead of a generator for the sound case. It returns what it has
    changed, and what to attempt: each attempt must succeed or raise `UserError`.
    """

    def __init__(self, base: Path) -> None: ...
    def case(self, rng: random.Random | None, folder: Path, outside: Path) -> tuple[str, Attempts]: ...
    def close(self) -> None: ...


def case_rng(target: str, seed: int, number: int) -> random.Random | None:
    """Return the generator of a case, which depends on nothing else; None for the sound one."""
    return None if number == SOUND else random.Random(f"{target}:{seed}:{number}")


def fingerprint(folder: Path) -> dict[str, Any]:
    """Return all files below a folder, with content and time of change; links are not followed."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        about = path.lstat()
        held = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() and about.st_size < 2**24 else ""
        found[str(path)] = (about.st_mode, about.st_size, about.st_mtime_ns if path.is_file() else 0, held)
    return found


def copies_of_secret(folder: Path) -> list[str]:
    """Return files below `folder`, other than links, that hold the secret of the sentinel."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return [str(path) for path in files if path.stat().st_size < 2**24 and SECRET in path.read_bytes()]


def new_outside(outside: Path) -> None:
    """Make the sentinel folder, which no case may change."""
    shutil.rmtree(outside, ignore_errors=True)
    (outside / "inner").mkdir(parents=True)
    (outside / "secret.txt").write_bytes(SECRET)
    (outside / "inner" / "config.json").write_bytes(b'{"secret": "' + SECRET + b'"}')


def attempt(attempts: Attempts) -> tuple[str, str]:
    """Return "accepted", "refused" or "failed", and for a failure what was raised, and where."""
    refused = False
    for label, call in attempts:
        try:
            call()
        except (UserError, SourceTimeout):
            refused = True
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)
            ours = [f"{Path(f.filename).name}:{f.lineno}" for f in last if "smollm_jax" in f.filename][-3:]
            where = f"{Path(last[-1].filename).name}:{last[-1].lineno}"
            text = " ".join(str(error).split())[:3_000]
            return "failed", f"{label}: {type(error).__name__}: {text} ({' '.join(ours)}, at {where})"
    return "refused" if refused else "accepted", ""


def run_case(
    target: Target, rng: random.Random | None, base: Path, tell: Callable[[dict[str, Any]], None], limit: float
) -> None:
    """Run one case and tell what came of it."""
    folder, outside, temporary = base / "case", base / "outside", base / "tmp"
    for path in (folder, temporary):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
    new_outside(outside)
    try:
        what, attempts = target.case(rng, folder, outside)
    except Exception as error:  # of the change, not of what is tested
        traceback.print_exception(error)
        what, attempts = "a fault of the fuzz job itself", []
    tell({"what": what})
    before = fingerprint(outside)
    around = {path.name for path in (*base.iterdir(), *Path.cwd().iterdir())}
    began = time.perf_counter()
    faulthandler.dump_traceback_later(limit - 1, exit=False)  # the log shows where it hangs
    kind, problem = attempt(attempts)
    faulthandler.cancel_dump_traceback_later()
    seconds = time.perf_counter() - began
    changed = [path for path, about in (fingerprint(outside) | before).items() if before.get(path) != about]
    gone = before.items() - fingerprint(outside).items()
    new = {path.name for path in (*base.iterdir(), *Path.cwd().iterdir())} - around
    left = sorted(path.name for path in temporary.iterdir() if not path.name.startswith("torchinductor_"))
    wrong = {
        "writes outside": [*changed, *(path for path, _ in gone)], "writes beside": sorted(new),
        "copies a secret": copies_of_secret(folder), "leaves temporary files": left,
    }  # fmt: skip
    for words, names in wrong.items():
        if names:
            kind, problem = "failed", f"{words}: {', '.join(names)[:300]}; {problem}"
    tell({"kind": kind, "seconds": seconds, "problem": problem})


def main() -> None:
    """Answer the numbers of stdin."""
    name, base, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    faulthandler.enable()

    def tell(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    target: Target = importlib.import_module(f"tests.fuzz.{name}").TARGET(base)
    limit = LIMITS.get(name, LIMIT_SECONDS)
    run_case(target, None, base, tell, limit)  # imports what is imported late, and must be accepted
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY_BYTES,) * 2)
    for line in sys.stdin:
        run_case(target, case_rng(name, seed, int(line)), base, tell, limit)
    target.close()


if __name__ == "__main__":
    main()
