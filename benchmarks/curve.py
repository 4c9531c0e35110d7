"""Train one run per dtype and compare their losses: `python -m benchmarks.curve`.

Each run is the command a user runs, on the documents inside every CPython, with a held-out loss at the end. No
speed counts unless the curves agree up to noise. One more run in the reference's dtype with another seed, so with
other initial weights and another order of documents, shows the size of the noise; only held-out losses compare it,
because its steps see other documents.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.harness.tables import ROOT, Row, as_command, finish
from benchmarks.harness.workload import Dtype, Preset
from smollm_jax.config.architecture import MODELS
from smollm_jax.runs.records import read_metrics

ROWS = 10  # rows of the table; metrics.jsonl has every step


def curve(
    *,
    preset: Preset = "135M",
    steps: int = 100,
    batch_size: int = 8,
    seq_len: int | None = None,
    learning_rate: float = 6e-4,
    seed: int = 0,
    dtypes: tuple[Dtype, ...] = ("bfloat16", "float32"),
    tokenizer: str | None = None,
    out: str | None = None,
    flags: tuple[str, ...] = (),
) -> int:
    """Train on builtin:python-docs in each dtype and compare the losses.

    Args:
        preset: Architecture.
        steps: Updates.
        batch_size: Rows per step.
        seq_len: Tokens per row; default: 2,048, or the model's maximum if smaller.
        learning_rate: Peak learning rate.
        seed: Seed of all runs but the last, which has the next seed.
        dtypes: Compute dtypes; the last is the reference for the others.
        tokenizer: train:VOCAB or a folder; default: train as many entries as the model has, at most 8,192.
        out: Folder to keep the run folders in; default: a temporary folder.
        flags: More flags for train_jax.py, one word each.
    """
    seq_len = seq_len or min(2_048, MODELS[preset].max_seq_len)
    tokenizer = tokenizer or f"train:{min(8_192, MODELS[preset].vocab_size)}"
    settings = ["--recipe", "quickstart"] if preset == "quickstart" else ["--preset", preset]
    settings += ["--data", "builtin:python-docs", "--tokenizer", tokenizer, "--phases", f"{steps}x{batch_size}"]
    settings += ["--seq-len", str(seq_len), "--learning-rate", str(learning_rate), "--log-every", "1"]
    settings += ["--eval-every", str(steps), "--checkpoint-every", "0", "--no-export", *flags]
    reference = dtypes[-1]
    runs = {dtype: (dtype, seed) for dtype in dtypes} | {f"{reference} seed {seed + 1}": (reference, seed + 1)}
    metrics: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory(prefix="curve-benchmark-") as scratch:
        for name, (dtype, its_seed) in runs.items():
            run_dir = Path(out or scratch) / name.replace(" ", "-")
            command = [sys.executable, str(ROOT / "train_jax.py"), "--new-run", "--run-dir", str(run_dir)]
            code = subprocess.run(
                [*command, "--dtype", dtype, *settings, "--seed", str(its_seed)],
                cwd=ROOT,
                check=False,
                stdout=sys.stderr,
                env=os.environ | {"HF_HUB_OFFLINE": "1"},
            ).returncode
            if code != 0:
                print(f"the run {name} ended with exit code {code}; its output is above", file=sys.stderr)
                return 1
            metrics[name] = read_metrics(run_dir)
    finish(
        f"curve, {preset}, {steps} steps of {batch_size} x {seq_len}",
        _losses(metrics, steps),
        summary=[_run(name, lines, metrics[reference]) for name, lines in metrics.items()],
        learning_rate=learning_rate,
        seed=seed,
        reference=reference,
    )
    return 0


def _by_step(lines: list[Row]) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in lines if line.get("loss") is not None}


def _at_the_end(lines: list[Row], name: str) -> float | None:
    """Return `name` of the last evaluation; None if there was no evaluation, or the value is no number."""
    return next((line[name] for line in reversed(lines) if name in line), None)


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _losses(metrics: dict[str, list[Row]], steps: int) -> list[Row]:
    """Return the losses at every tenth of the run."""
    losses = {name: _by_step(lines) for name, lines in metrics.items()}
    shown = sorted({1, *(max(1, steps * i // ROWS) for i in range(1, ROWS + 1))})
    return [{"step": step} | {f"loss {name}": losses[name].get(step) for name in losses} for step in shown]


def _run(name: str, lines: list[Row], reference: list[Row]) -> Row:
    """Return a run's speed, waits for data, held-out loss, and the gaps of its losses to the reference."""
    train = [line for line in lines if "tokens_per_second" in line]
    later = train[len(train) // 2 :]  # a line per step; the first half warms up
    seconds = sum(line["step_seconds"] for line in later)
    ours, theirs = _by_step(lines), _by_step(reference)
    gaps = [abs(ours[step] - theirs[step]) for step in ours.keys() & theirs.keys()]
    held_out = _at_the_end(lines, "eval_loss")
    return {
        "run": name,
        "tokens/s": sum(line["tokens_per_second"] * line["step_seconds"] for line in later) / seconds,
        "MFU": sum(line["mfu"] * line["step_seconds"] for line in later) / seconds if "mfu" in later[0] else None,
        "data wait, share": sum(line["data_wait_seconds"] for line in later) / seconds,
        "held-out loss": held_out,
        "bits per byte": _at_the_end(lines, "eval_bits_per_byte"),
        "held-out gap": _difference(held_out, _at_the_end(reference, "eval_loss")),
        "mean gap a step": statistics.mean(gaps),
        "largest gap": max(gaps),
    }


if __name__ == "__main__":
    as_command(curve, "curve")
