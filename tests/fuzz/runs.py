"""Run folders from elsewhere, each file changed at random or replaced, opened by all that reads a run."""

import random
import re
import subprocess
import sys
from collections.abc import Iterable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from smollm_jax.checkpoint.listing import list_checkpoints, table
from smollm_jax.checkpoint.manifest import MANIFEST, seal
from smollm_jax.config.serialization import from_dict
from smollm_jax.distributed.processes import Processes
from smollm_jax.runs.convert import export_run, import_run
from smollm_jax.runs.load import load_model, read_run
from smollm_jax.runs.plot import draw
from smollm_jax.runs.records import evaluations, read_metrics
from smollm_jax.runs.replay import replay_step
from smollm_jax.runtime.files import read_json
from smollm_jax.runtime.signals import StopRequest
from smollm_jax.training import setup as training_setup
from smollm_jax.training.fit import acquire_run_dir
from tests.fuzz.mutations import change_file, fresh_copy
from tests.fuzz.worker import Attempts
from tests.support.paths import ROOT
from tests.support.runs import TINY
from tests.support.texts import make_texts, small_tokenizer, write_jsonl

STEPS, TOTAL = 6, 9  # trained, and asked for: a run under way
IN_STEPS = ("seal", "seal", "leave")
NOT_FUZZED = ("select_agreed_ops", "compile_within", "make_scorer", "log_summary")  # compile, and read no file


def sound_run(base: Path) -> Path:
    """Train a tiny run, with two checkpoints, evaluations and an export, by the real command."""
    run = base / "sound" / "run"
    if not run.exists():
        (base / "sound").mkdir()
        write_jsonl(base / "sound" / "data.jsonl", make_texts(120))
        small_tokenizer().save(base / "sound" / "tokenizer")
        command = [
            sys.executable, str(ROOT / "train_jax.py"), "--data", str(base / "sound" / "data.jsonl"), *TINY,
            "--tokenizer", str(base / "sound" / "tokenizer"), "--run-dir", str(run), "--steps", str(TOTAL),
            "--stop-after", str(STEPS), "--checkpoint-every", "3", "--eval-every", "3",
            "--compilation-cache-dir", str(base / "cache"),
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=240)
        export_run(run, run / "export", verify=False)
    return run


def is_small(path: Path) -> bool:
    return path.is_file() and path.stat().st_size < 2**24


def in_order(paths: Iterable[Path]) -> list[Path]:
    """Sort files by what every sound run has: their names, without hashes and times, and their content."""

    def key(path: Path) -> tuple[str, bytes]:
        return re.sub("[0-9a-f]{6,}", "", str(path)), path.read_bytes() if is_small(path) else b""

    return sorted(paths, key=key)


def files_of(run: Path) -> list[Path]:
    """Return the files of a run; each part of it, such as a checkpoint, has the same chance."""
    parts = [path for path in (*run.iterdir(), *(run / "checkpoints").iterdir()) if path.name != "checkpoints"]
    return [path for path in parts if path.is_file() or any(one.is_file() for one in path.rglob("*"))]


def chosen_file(rng: random.Random, run: Path) -> Path:
    part = rng.choice(in_order(files_of(run)))
    if part.is_file():
        return part
    files = in_order(path for path in part.rglob("*") if path.is_file())
    about = [path for path in files if path.suffix == ".json"]
    return rng.choice(about if about and rng.random() < 0.5 else files)


def reseal(step: Path) -> None:
    """Make the manifest vouch for what a checkpoint holds now, as an attacker can."""
    about = read_json(step / MANIFEST)["about"]
    (step / MANIFEST).unlink()
    seal(step, about)


def change_run(rng: random.Random, run: Path, outside: Path) -> str:
    """Change a file of a run, and perhaps its seal; or replace a whole folder by a link."""
    if rng.random() < 0.05:
        return change_folder(rng, run, outside)
    path = chosen_file(rng, run)
    told = change_file(rng, path, outside)
    step = run / "checkpoints" / path.relative_to(run).parts[1] if "checkpoints" in path.parts else None
    is_plain = is_small(path) and path.name != MANIFEST
    if step is not None and is_plain and rng.choice(IN_STEPS) == "seal":
        reseal(step)
        told += ", resealed"
    return f"{path.relative_to(run).parent}/{told}"


def change_folder(rng: random.Random, run: Path, outside: Path) -> str:
    """Replace a folder by a link out, a file or nothing, or give it another name."""
    folders = [run / name for name in ("checkpoints", "tokenizer", "tensorboard", "export")]
    path = rng.choice([*folders, run / "checkpoints" / "6", run / "checkpoints" / "6" / "params"])
    kind, away = (
        rng.choice(["link out", "link to a copy out", "file", "missing", "other name"]),
        outside / path.name,
    )
    path.rename(away)
    if kind == "link to a copy out":
        path.symlink_to(away)
    elif kind == "other name":
        away.rename(
            path.with_name(rng.choice(["7", "0", "6.bad", "6.bad-2", "-1", "x", "999999999999999999", "[6]"]))
        )
    if away.exists() and kind != "link to a copy out":
        away.rename(run.parent / "away")
    if kind == "file":
        path.write_bytes(b"x")
    if kind == "link out":
        path.symlink_to(outside)
    return f"{path.relative_to(run)} is a {kind}"


class Runs:
    """A trained run, and cases that change a copy of it."""

    def __init__(self, base: Path) -> None:
        self.run = sound_run(base)
        self.config = read_json(self.run / "config.json")

    def case(self, rng: random.Random | None, folder: Path, outside: Path) -> tuple[str, Attempts]:
        run = fresh_copy(self.run, folder / "run")
        told, out = [], folder / "out"
        if rng is not None:
            for _ in range(rng.choice([1, 1, 1, 2])):
                try:
                    told.append(change_run(rng, run, outside))
                except (OSError, ValueError, RecursionError, IndexError):  # changed already
                    told.append("nothing")
        step = None if rng is None else rng.choice([None, None, 3, 6, 4])
        quick: Attempts = [
            ("list_checkpoints", partial(list_checkpoints, run / "checkpoints")),
            ("checkpoints", partial(table, run)),
            ("read_run", partial(read_run, run)),
            ("read_metrics", lambda: evaluations(read_metrics(run))),
        ]
        slow: Attempts = [
            ("load_model", partial(load_model, run, step)),
            ("export_run", partial(export_run, run, out, step=step, verify=False)),
            ("replay_step", partial(replay_step, run, 5 if rng is None else rng.randint(1, STEPS))),
            ("import_run", partial(import_run, run, out)),
            ("resume", partial(self.resume, run)),
        ]
        if rng is not None:
            slow = [rng.choice([*slow, slow[-1], slow[1]]) for _ in range(1)]
        return "; ".join(told) or "nothing", quick + (
            slow if rng is not None else [slow[0], slow[1], slow[2], slow[4]]
        )

    def resume(self, run: Path) -> None:
        """Do what a start of training does before its first step, but for compiling."""
        values = self.config | {"run": self.config["run"] | {"run_dir": str(run)}}
        job, stub = Processes(), mock.Mock(return_value=(mock.Mock(kernels="plain"), []))
        stubs: dict[str, Any] = dict.fromkeys(NOT_FUZZED, stub)
        stubs["compile_within"] = mock.Mock(return_value=({}, "none", []))
        with (
            mock.patch.multiple(training_setup, **stubs),
            acquire_run_dir(from_dict(values), job) as held,
            closing(training_setup.setup(from_dict(values), held, StopRequest(), job)) as made,
        ):
            if made.stream.get(timeout=5) is None:
                raise AssertionError("no batch within 5 s")
            made.report._record({"step": STEPS, "loss": 1.0})
            draw(run, run / "loss.png")

    def close(self) -> None:
        pass


TARGET = Runs
