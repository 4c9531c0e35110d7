"""Time the start: `python -m benchmarks.startup`.

The real commands run as processes: `--help`, the imports, and `train_jax.py` on a small local file up to the
first line of its metrics, once with an empty compilation cache and once with the cache of that run. The
tokenizer is made beforehand, because a published one is on disk too.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness.tables import ROOT, Row, as_command, finish, spread
from benchmarks.harness.workload import Preset

TARGET_SECONDS = {"--help": 0.5, "first step, cold": 60.0, "first step, warm": 15.0}  # first steps: for 135M
POLL_SECONDS = 0.02
TIMEOUT_SECONDS = 600
WORDS = "the cat sat on a mat and saw one bird fly over tall grey hills near our old red house".split()


def startup(
    *,
    preset: Preset = "135M",
    batch_size: int = 2,
    seq_len: int = 256,
    rounds: int = 3,
    first_steps: int = 1,
) -> int:
    """Time --help, the imports, and the first step with a cold and a warm compilation cache.

    Args:
        preset: Architecture.
        batch_size: Rows per step.
        seq_len: Tokens per row.
        rounds: Starts of --help and of the imports.
        first_steps: Starts of a run, each cold and then warm.
    """
    commands = {
        "python itself": ["-c", "pass"],
        "--help": [str(ROOT / "train_jax.py"), "--help"],
        "import smollm_jax": ["-c", "import smollm_jax"],
        "import jax": ["-c", "import jax"],
        "import smollm_jax.training.fit": ["-c", "import smollm_jax.training.fit"],
    }
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, arguments in commands.items():
            seconds.setdefault(name, []).append(seconds_of(arguments))
    for _ in range(first_steps):
        with tempfile.TemporaryDirectory(prefix="startup-benchmark-") as folder:
            flags = prepare(Path(folder))
            flags += ["--recipe", "quickstart"] if preset == "quickstart" else ["--preset", preset]
            flags += ["--batch-size", str(batch_size), "--seq-len", str(seq_len)]
            for name in ("first step, cold", "first step, warm"):
                run_dir = Path(folder) / name.replace(", ", "-").replace(" ", "-")
                seconds.setdefault(name, []).append(first_step_seconds(run_dir, flags))
    finish(
        f"startup, {preset}, {batch_size} x {seq_len}", [_row(*item) for item in seconds.items()], rounds=rounds
    )
    return 0


def _row(name: str, values: list[float]) -> Row:
    found, target = spread(values), TARGET_SECONDS.get(name)
    met = None if target is None else "yes" if found["median"] <= target else "no"
    return {"what": name, "seconds": found, "target": target, "met": met}


def seconds_of(arguments: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def prepare(folder: Path) -> list[str]:
    """Write documents and a tokenizer into `folder`; return the flags of a run that reads them."""
    from smollm_jax.tokenizer.load import train_tokenizer

    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(20, 400))) for _ in range(500)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer(texts, 300).save(folder / "tokenizer")
    return [
        "--data", str(folder / "texts.jsonl"), "--tokenizer", str(folder / "tokenizer"),
        "--eval-documents", "5", "--compilation-cache-dir", str(folder / "compiled"), "--log-every", "1",
    ]  # fmt: skip


def first_step_seconds(run_dir: Path, flags: list[str]) -> float:
    """Return the seconds from the start of the command to the first line of its metrics; then end it."""
    command = [sys.executable, str(ROOT / "train_jax.py"), "--run-dir", str(run_dir), *flags]
    began = time.perf_counter()
    with (run_dir.parent / "talk.txt").open("w+") as talk:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=talk, stderr=talk, env=os.environ | {"HF_HUB_OFFLINE": "1"}
        )
        try:
            metrics = run_dir / "metrics.jsonl"
            while not (metrics.exists() and metrics.stat().st_size):
                time.sleep(POLL_SECONDS)
                if process.poll() is not None or time.perf_counter() - began > TIMEOUT_SECONDS:
                    talk.seek(0)
                    raise RuntimeError(f"the run reached no first step: {talk.read()[-2_000:]}")
            return time.perf_counter() - began
        finally:
            process.kill()
            process.wait()


if __name__ == "__main__":
    as_command(startup, "startup")
