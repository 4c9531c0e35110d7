"""Run the benchmarks that concern a GPU, in one command: `python -m benchmarks.gpu`.

Ten minutes, the default, hold the most telling parts; `--minutes 30` holds all of them. Each part is a command; if
one fails or takes too long, it is named and the others go on. The folder then has results.jsonl (a line of JSON
per part), tables.txt (tables to read), talk.txt (all output) and runs/ (the training runs). `--small` runs
everything in tiny shapes, to see that it works.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from benchmarks.harness.tables import ROOT, as_command

SMALLEST_LIMIT_SECONDS = 20  # with less, a part is not started


@dataclass(frozen=True)
class Part:
    """A command and its time limit."""

    name: str
    words: str
    seconds: int
    compiles_anew: bool = False
    """Do not use the compilation cache of the parts before it. (Runs of train_jax.py have their own.)"""

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", *self.words.split()]


TRAIN = (
    "benchmarks.train --batch-sizes {size} --seq-len 2048 --documents 4 --dtypes bfloat16 --peers compile "
    "--steps 5 --rounds 5"
)
# The most useful first: the first six should fit in ten minutes, and a short lease goes without the rest. The
# limits leave room for a fresh machine, which reads PyTorch and XLA for the first time
PARTS = (
    Part("train, 32 rows", TRAIN.format(size=32), 240),
    Part("race", "benchmarks.race --seconds 60 --out {out}/race", 330),
    Part("curve", "benchmarks.curve --steps 200 --batch-size 2 --out {out}/runs", 300),
    Part(
        "decode",
        "benchmarks.decode --batch-sizes 1 8 64 --dtypes bfloat16 --peers dynamic --new-tokens 64 --rounds 3",
        180,
    ),
    Part("profile", "benchmarks.profile --batch-size 32 --seq-len 2048 --documents 4 --dtype bfloat16", 90),
    Part("data", "benchmarks.data --tokenizer train:8192 --device-tokens-per-second 400000", 60),
    Part(
        "verify-resume",
        "smollm_jax verify-resume --recipe quickstart --dtype bfloat16 --verify-steps 100 --eval-documents 20",
        150,
    ),
    Part("startup", "benchmarks.startup --batch-size 32 --seq-len 2048", 150),
    Part(
        "attention",
        "benchmarks.attention --batch-size 32 --seq-len 2048 --documents 4 --dtype bfloat16",
        120,
        compiles_anew=True,
    ),
    Part("train, 64 rows", TRAIN.format(size=64), 240, compiles_anew=True),
    Part("limits", "benchmarks.limits --tokens 65536 --dtypes bfloat16 --rounds 3", 60),
    Part("breakdown", "benchmarks.breakdown --batch-size 16 --seq-len 2048 --documents 4 --dtype bfloat16", 120),
    Part(
        "decode, the peer's static cache",
        "benchmarks.decode --batch-sizes 1 8 --dtypes bfloat16 --peers static --new-tokens 64 --rounds 3",
        180,
    ),
    Part("checkpoint", "benchmarks.checkpoint --rounds 3", 90),
)
SMALL_PARTS = (
    Part(
        "train",
        "benchmarks.train --preset quickstart --batch-sizes 2 4 --seq-len 64 --documents 2 --dtypes float32 "
        "--peers eager --rounds 2",
        200,
    ),
    Part("limits", "benchmarks.limits --preset quickstart --tokens 64 --rounds 1 --dtypes float32", 100),
    Part("breakdown", "benchmarks.breakdown --preset quickstart --seq-len 64 --documents 2 --rounds 2", 100),
    Part("profile", "benchmarks.profile --preset quickstart --seq-len 64 --documents 2", 100),
    Part("attention", "benchmarks.attention --preset quickstart --seq-len 64 --documents 2 --rounds 2", 100),
    Part(
        "decode",
        "benchmarks.decode --preset quickstart --batch-sizes 1 2 --dtypes float32 --new-tokens 8 --rounds 1",
        200,
    ),
    Part(
        "curve",
        "benchmarks.curve --preset quickstart --steps 4 --batch-size 2 --seq-len 64 --tokenizer train:512 "
        "--out {out}/runs",
        200,
    ),
    Part(
        "race",
        "benchmarks.race --preset quickstart --seconds 5 --batch-size 2 --seq-len 64 --dtype float32 --form eager "
        "--tokenizer train:512 --evaluations 2 --out {out}/race",
        300,
    ),
    Part("startup", "benchmarks.startup --preset quickstart --seq-len 64 --rounds 1", 200),
    Part(
        "verify-resume",
        "smollm_jax verify-resume --recipe quickstart --seq-len 64 --batch-size 2 --verify-steps 30 "
        "--tokenizer train:512 --eval-documents 5",
        200,
    ),
    Part("data", "benchmarks.data --documents 1000 --tokenizer train:512 --seq-len 64 --rounds 1", 100),
    Part("checkpoint", "benchmarks.checkpoint --preset quickstart --rounds 1", 100),
)


def gpu(
    *, out: str = "runs/benchmarks", minutes: float = 10.0, parts: tuple[str, ...] = (), small: bool = False
) -> int:
    """Run every benchmark and keep the results in a folder.

    Args:
        out: Folder for the results; existing files are appended to.
        minutes: Time for all parts; parts without time left are named.
        parts: Names of the parts to run; default: all.
        small: Tiny shapes, for a CPU.
    """
    folder, ends = Path(out).resolve(), time.monotonic() + minutes * 60
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [part for part in (SMALL_PARTS if small else PARTS) if not parts or part.name in parts]
    outcomes = {}
    with tempfile.TemporaryDirectory(prefix="gpu-benchmark-") as compiled, (folder / "talk.txt").open("a") as talk:
        for part in chosen:
            limit = min(part.seconds, ends - time.monotonic())
            outcomes[part.name] = "no time left"
            if limit >= SMALLEST_LIMIT_SECONDS:
                began = time.monotonic()
                outcomes[part.name] = outcome = run(part, folder, limit, talk, compiled)
                print(f"{part.name}: {outcome}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    print(json.dumps({"benchmark": "gpu", "folder": str(folder), "parts": outcomes}))
    return 0 if all(outcome == "done" for outcome in outcomes.values()) else 1


def run(part: Part, folder: Path, limit: float, talk: TextIO, compiled: str) -> str:
    """Run a part and file its output; return "done" or the failure. `compiled` is the compilation cache."""
    cache = {} if part.compiles_anew else {"JAX_COMPILATION_CACHE_DIR": compiled}
    command = [word.replace("{out}", str(folder)) for word in part.command]
    print(f"\n$ {' '.join(command)}", file=talk, flush=True)
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | cache,
    )  # fmt: skip
    late = False
    try:
        results, said = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its own children too: they hold the device
        results, said = process.communicate()
        late = True
    talk.write(said + results)
    talk.flush()
    if late:
        return f"took longer than {limit:.0f} s; its output until then is in talk.txt"
    if process.returncode:
        return f"failed with exit code {process.returncode}: {(said.strip().splitlines() or [''])[-1][:200]}"
    _file(part, folder, results, said)
    return "done"


def _file(part: Part, folder: Path, results: str, said: str) -> None:
    """Append the JSON to results.jsonl and the tables to tables.txt; output without JSON goes there whole."""
    line = (results.strip().splitlines() or [""])[-1]
    try:
        found = json.loads(line)
    except ValueError:
        found, table = {"benchmark": part.name, "said": results}, results
    else:
        # the tables start at the title and end the output
        table = said[said.rfind(f"{found['benchmark']}\n") :]
    with (folder / "results.jsonl").open("a") as file:
        file.write(json.dumps({"part": part.name} | found) + "\n")
    with (folder / "tables.txt").open("a") as file:
        file.write(f"== {part.name}\n{table}\n")
    print(table, file=sys.stderr)


if __name__ == "__main__":
    as_command(gpu, "gpu")
