"""Read a run's records despite a kill or full disk. Cuts them when the run resumes."""

import json
import math
import time
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path
from typing import Any

from smollm_jax.runtime.files import read_whole, written_aside

SAMPLES_OF = "=== step "
OF_TASKS = "tasks/"  # begins the name of a score on a task
OF_EMA = ("eval_ema_loss", "eval_ema_bits_per_byte")  # of the moving average of the weights
BETWEEN = "⟶"  # a prompt and its continuation


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl, without damaged ones. A kill may cut a line short."""
    return [values for line in _lines(run_dir / "metrics.jsonl") if (values := _whole(line)) is not None]


def evaluations(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines of evaluations whose results are finite."""
    return [x for x in lines if None not in (x.get("eval_loss"), x.get("eval_bits_per_byte"))]


def record_scores(
    run_dir: Path, step: int, scores: dict[str, float], limit: int | None, shots: int | None
) -> None:
    """Append the scores of a checkpoint on tasks to metrics.jsonl."""
    line = json.dumps({"step": step, "time": time.time()} | as_fields(scores, limit, shots))
    with open(run_dir / "metrics.jsonl", "ab") as file:  # one write, because the run may be writing too
        file.write(f"{line}\n".encode())


def as_fields(scores: dict[str, float], limit: int | None = None, shots: int | None = None) -> dict[str, Any]:
    """Return scores on tasks, by names such as hellaswag/acc_norm, as fields of a line of metrics.jsonl.

    `limit` is the number of documents per task, None for all. `shots` is --num-fewshot, if it was given.
    """
    about = {"task_limit": limit, "task_shots": shots} if scores else {}
    return {f"{OF_TASKS}{name}": score for name, score in scores.items()} | about


def scores_in(line: dict[str, Any]) -> dict[str, float]:
    """Return the scores on tasks in a line of metrics.jsonl, by names such as hellaswag/acc_norm."""
    found = {name: x for name, x in line.items() if name.startswith(OF_TASKS) and _is_number(x, int | float)}
    return {name.removeprefix(OF_TASKS): x for name, x in found.items()}


def _lines(path: Path) -> list[str]:
    """Return the lines of a text file, whatever bytes are in it. None if it is no file."""
    text = read_whole(path).decode("utf-8", "replace") if path.is_file() else ""
    return text.removesuffix("\n").split("\n") if text else []


def _whole(line: str) -> dict[str, Any] | None:
    """Return a line of metrics.jsonl, None if it is not as a run writes it."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or not _is_number(values.get("step"), int) or values["step"] < 0:
        return None
    # null if not finite
    others = [values.get(name) for name in ("loss", "eval_loss", "eval_bits_per_byte", "bad_steps", *OF_EMA)]
    return values if all(other is None or _is_number(other, int | float) for other in others) else None


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and abs(value) < math.inf


def keep_records(run_dir: Path, step: int) -> tuple[int, dict[int, str]]:
    """Cut metrics.jsonl and samples.txt back to `step`, because the run repeats later steps.

    Returns the last step whose evaluation is kept, else -1, and the batch hash of every step on record. Hashes of
    later steps are among them: a repeated step must agree.
    """
    metrics, samples = run_dir / "metrics.jsonl", run_dir / "samples.txt"
    lines = read_metrics(run_dir)
    kept = [values for values in lines if values["step"] <= step]
    evaluated = max(
        (values["step"] for values in kept if {"eval_seconds", "eval_loss"} & values.keys()), default=-1
    )

    def is_kept(line: str) -> bool:
        number = line.removeprefix(SAMPLES_OF)
        return number == line or (len(number) < 20 and number.isdecimal() and int(number) <= evaluated)

    if metrics.is_file():
        _rewrite(metrics, map(json.dumps, kept))
    if samples.is_file():
        _rewrite(samples, takewhile(is_kept, _lines(samples)))
    return evaluated, {values["step"]: values["ledger"] for values in lines if "ledger" in values}


def last_sample(run_dir: Path, step: int) -> tuple[str, str]:
    """Return the last prompt and continuation of an evaluation up to `step`, empty if none."""
    block: list[str] = []
    for line in _lines(run_dir / "samples.txt"):
        number = line.removeprefix(SAMPLES_OF)
        if number == line:
            block.append(line.removeprefix("  "))
        elif len(number) < 20 and number.isdecimal() and int(number) <= step:
            block = []
        else:
            break
    starts = [i for i, line in enumerate(block) if BETWEEN in line]
    prompt, _, text = "\n".join(block[: starts[1] if len(starts) > 1 else None]).partition(BETWEEN)
    return (prompt, text.rstrip()) if starts else ("", "")


def _rewrite(path: Path, lines: Iterable[str]) -> None:
    with written_aside(path) as part:
        part.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
