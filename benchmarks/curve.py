"""Real training runs, one for each dtype, and their losses side by side: `python -m benchmarks.curve`.

The command a user runs, on the documents inside every CPython, with the model's own checkpoint and held-out
loss at the end. No speed counts unless the curves agree, but for noise. How large that is shows one more run in
the reference's dtype with another seed: other weights to begin with, and the documents in another order.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import Row, as_command, finish
from benchmarks.work import Dtype, Preset
from smollm_jax.config import MODELS, require
from smollm_jax.report import read_metrics

ROOT = Path(__file__).parent.parent
ROWS = 10  # of the table: every step is in metrics.jsonl


def curve(
    *,
    preset: Preset = "135M",
    steps: int = 100,
    batch_size: int = 8,
    seq_len: int = 2_048,
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
        batch_size: Rows a step.
        seq_len: Tokens a row.
        learning_rate: Peak.
        seed: Of all runs but the last, which has the one after it.
        dtypes: Compute dtypes; the last is the reference, what the others are compared with.
        tokenizer: train:VOCAB or a folder; default: trained, of as many entries as the model has, 8,192 at most.
        out: Folder to keep the run folders in; default: a temporary one.
        flags: More flags for train_jax.py, each a word.
    """
    if tokenizer is None:
        tokenizer = f"train:{min(8_192, MODELS[preset].vocab_size)}"
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
                [*command, "--dtype", dtype, "--seed", str(its_seed), *settings],
                cwd=ROOT,
                check=False,
                stdout=sys.stderr,
                env=os.environ | {"HF_HUB_OFFLINE": "1"},
            ).returncode
            require(code == 0, f"the run {name} ended with exit code {code}; what it said stands above")
            metrics[name] = read_metrics(run_dir)
    finish(
        f"curve, {preset}, {steps} steps of {batch_size} x {seq_len}",
        _losses(metrics, steps),
        summary=[_run(name, lines, metrics[reference]) for name, lines in metrics.items()],
        learning_rate=learning_rate,
        reference=reference,
    )
    return 0


def _by_step(lines: list[Row]) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in lines if line.get("loss") is not None}


def _held_out(lines: list[Row]) -> float:
    """Nats a token at the end."""
    return next(line["eval_loss"] for line in lines if "eval_loss" in line)


def _losses(metrics: dict[str, list[Row]], steps: int) -> list[Row]:
    """The losses at every tenth of the way."""
    losses = {name: _by_step(lines) for name, lines in metrics.items()}
    shown = sorted({1, *(max(1, steps * i // ROWS) for i in range(1, ROWS + 1))})
    return [{"step": step} | {f"loss {name}": losses[name].get(step) for name in losses} for step in shown]


def _run(name: str, lines: list[Row], reference: list[Row]) -> Row:
    """Speed of a run, its waits for data, its held-out loss, and how far its losses are from the reference's."""
    train = [line for line in lines if "tokens_per_second" in line]
    later = train[len(train) // 2 :]  # a line a step; the first are those of a program warming up
    seconds = sum(line["step_seconds"] for line in later)
    ours, theirs = _by_step(lines), _by_step(reference)
    gaps = [abs(ours[step] - theirs[step]) for step in ours.keys() & theirs.keys()]
    held_out, reference_held_out = _held_out(lines), _held_out(reference)
    return {
        "run": name,
        "tokens/s": sum(line["tokens_per_second"] * line["step_seconds"] for line in later) / seconds,
        "MFU": sum(line["mfu"] * line["step_seconds"] for line in later) / seconds if "mfu" in later[0] else None,
        "data wait, share": sum(line["data_wait_seconds"] for line in later) / seconds,
        "held-out loss": held_out,
        "bits per byte": next((line["eval_bits_per_byte"] for line in lines if "eval_loss" in line), None),
        "held-out gap": held_out - reference_held_out,
        "mean gap a step": statistics.mean(gaps),
        "largest gap": max(gaps),
    }


if __name__ == "__main__":
    as_command(curve, "curve")
