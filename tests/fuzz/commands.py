"""The real commands, each in a process of its own, over changed folders, runs and data files."""

import random
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

from smollm_jax.runtime.errors import EXIT_FAILED, EXIT_MISTAKE, UserError
from tests.fuzz.data import write_odd, write_sound
from tests.fuzz.folders import change, sound_folders
from tests.fuzz.mutations import change_file, fresh_copy
from tests.fuzz.runs import TOTAL, change_run, sound_run
from tests.fuzz.worker import Attempts
from tests.support.paths import ROOT
from tests.support.runs import TINY

LIMIT_SECONDS = 60.0  # the libraries alone take several to import


def command(*arguments: str) -> None:
    """Run a command; raises `UserError` if it refuses in one line, `AssertionError` for anything else."""
    program = [sys.executable, *arguments]
    process = subprocess.Popen(
        program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    try:
        _, err = process.communicate(timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # faulthandler shows where it is
        process.communicate(timeout=LIMIT_SECONDS)
        raise AssertionError(f"hangs for {LIMIT_SECONDS:g} s") from None
    told = err.decode("utf-8", "replace").strip()
    assert "Traceback" not in told, told[-600:]
    refused = [line for line in told.splitlines() if line.startswith("error: ")]
    if process.returncode == EXIT_MISTAKE and len(refused) == 1:
        raise UserError(refused[0])
    assert process.returncode == 0 or (process.returncode == EXIT_FAILED and refused), (
        f"{process.returncode}: {told[-500:]}"
    )


class Commands:
    """Sound folders, a run and data; a case changes one of them, and runs one command over it."""

    def __init__(self, base: Path) -> None:
        self.run, self.folders, self.cache = sound_run(base), sound_folders(base), base / "cache"

    def case(self, rng: random.Random | None, folder: Path, outside: Path) -> tuple[str, Attempts]:
        if rng is None:
            return "nothing", [("checkpoints", partial(command, "-m", "smollm_jax", "checkpoints", str(self.run)))]
        ours, out, what = (
            ["-m", "smollm_jax"],
            str(folder / "out"),
            rng.choice(["folder", "folder", "run", "run", "data"]),
        )
        if what == "folder":
            model = fresh_copy(rng.choice(self.folders), folder / "model")
            told, path = change(rng, model, outside), str(model)
            backend = rng.choice(["jax", "torch"])
            words = rng.choice([
                [*ours, "import", path, "--out", out], [*ours, "push", path, "a/b", "--dry-run"],
                [*ours, "generate", path, "--prompt", "the cat", "--max-new-tokens", "2", "--backend", backend],
            ])  # fmt: skip
        elif what == "run":
            run = fresh_copy(self.run, folder / "run")
            told, path = change_run(rng, run, outside), str(run)
            words = rng.choice([
                [*ours, "export", path, "--out", out, "--no-verify"], [*ours, "batch", path, "--step", "2"],
                [*ours, "checkpoints", path], [*ours, "generate", path, "--prompt", "a", "--max-new-tokens", "2"],
                self.train(path, self.run.parent / "data.jsonl"), self.train(path, self.run.parent / "data.jsonl"),
            ])  # fmt: skip
        else:
            data = folder / f"data{rng.choice(['.jsonl', '.jsonl.gz', '.parquet', '.txt'])}"
            write_sound(data)
            told = write_odd(rng, data) if rng.random() < 0.3 else change_file(rng, data, outside)
            shutil.copytree(self.run / "tokenizer", folder / "tokenizer")
            words = rng.choice([
                [*ours, "evaluate", str(self.run), "--data", str(data), "--max-batches", "1"],
                self.train(str(folder / "run"), data),
            ])  # fmt: skip
        return f"{told}; {' '.join(words[:4])}", [(words[2], partial(command, *words))]

    def train(self, run: str, data: Path) -> list[str]:
        """The command that made the run, or a new one."""
        tokenizer = self.run.parent / "tokenizer"
        return [
            str(ROOT / "train_jax.py"), "--run-dir", run, "--data", str(data), *TINY, "--tokenizer",
            str(tokenizer), "--steps", str(TOTAL), "--checkpoint-every", "3", "--eval-every", "3", "--no-export",
            "--compilation-cache-dir", str(self.cache),
        ]  # fmt: skip

    def close(self) -> None:
        pass


TARGET = Commands
