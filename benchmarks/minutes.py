"""Train variants of a recipe for the same time and compare their held-out loss: `python -m benchmarks.minutes`.

The time is computed, not waited for: the steps of all variants are timed in turn in one process, and each variant
gets the steps that its median allows. So a busy hour costs all of them alike. Each run is the command a user runs,
with a schedule that ends at its last step.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.harness.tables import ROOT, Row, as_command, finish, spread
from smollm_jax.cli.arguments import parse
from smollm_jax.runs.records import evaluations, read_metrics
from smollm_jax.runtime.errors import require

VARIANTS = ("AdamW: --optimizer adamw", "Muon: --optimizer muon")


def minutes(
    *,
    recipe: str = "quickstart",
    variants: tuple[str, ...] = VARIANTS,
    of: tuple[float, ...] = (1, 2, 5),
    seeds: tuple[int, ...] = (0,),
    rounds: int = 10,
    out: str | None = None,
) -> int:
    """Train each variant for the same minutes and compare bits per byte on held-out documents.

    Args:
        recipe: Recipe that the variants change.
        variants: NAME: FLAGS of train_jax.py, each in quotes.
        of: Minutes of training.
        seeds: Seeds of each run.
        rounds: Steps of each variant to time.
        out: Folder to keep the run folders in; default: a temporary folder.
    """
    flags = {
        name.strip(): ["--recipe", recipe, *rest.split()] for name, _, rest in (v.partition(":") for v in variants)
    }
    require(
        len(flags) == len(variants), "--variants: each needs a name of its own, as in 'Muon: --optimizer muon'"
    )
    seconds = step_seconds(flags, rounds)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="minutes-benchmark-") as scratch:
        for long in of:
            for name, settings in flags.items():
                steps = max(int(60 * long / statistics.median(seconds[name])), 2)
                for seed in seeds:
                    run_dir = Path(out or scratch) / f"{name}-{long:g}-{seed}".replace(" ", "-")
                    found = trained([*settings, "--seed", str(seed)], steps, run_dir)
                    rows.append({"variant": name, "minutes": long, "steps": steps, "seed": seed} | found)
    summary = [
        {"variant": name} | {f"step, {k} s": x for k, x in spread(each).items()} for name, each in seconds.items()
    ]
    finish(f"equal time, {recipe}", rows, summary=summary, variants=variants, rounds=rounds)
    return 0


def trained(flags: list[str], steps: int, run_dir: Path) -> Row:
    """Train to the end, and return the seconds of training and the last evaluation."""
    command = [sys.executable, str(ROOT / "train_jax.py"), *flags, "--new-run", "--run-dir", str(run_dir)]
    command += ["--steps", str(steps), "--eval-every", str(steps), "--checkpoint-every", "0", "--no-export"]
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr, env=env)
    lines = read_metrics(run_dir)
    last, training = evaluations(lines)[-1], [line for line in lines if "step_seconds" in line]
    return {
        "bits per byte": last["eval_bits_per_byte"],
        "held-out loss": last["eval_loss"],
        "step, s": statistics.median(line["step_seconds"] for line in training),
        "tokens": training[-1]["tokens"],
    }


def step_seconds(flags: dict[str, list[str]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of `rounds` steps of each variant, taken in turn."""
    timers = {name: timer(settings) for name, settings in flags.items()}
    taken: dict[str, list[float]] = {name: [] for name in flags}
    for number in range(rounds + 1):  # the first of each warms up
        for name, run in timers.items():
            second = run()
            taken[name] += [second] if number else []
    return taken


def timer(flags: list[str]) -> Callable[[], float]:
    """Compile a variant's step. Returns a function that takes a step on random tokens, and its seconds."""
    import jax
    import numpy as np

    from smollm_jax.distributed.sharding import BATCH_AXES, make_mesh, padded_rows, sharded
    from smollm_jax.runtime.devices import training_dtype
    from smollm_jax.training.compile import compile_step
    from smollm_jax.training.restore import vocabulary_follows
    from smollm_jax.training.step import init_state

    config = parse(flags)
    if vocabulary_follows(config) and config.data.tokenizer.startswith("train:"):  # as a run takes it
        size = int(config.data.tokenizer.split(":")[1])
        config = replace(config, model=replace(config.model, vocab_size=size))
    mesh, rows, length = make_mesh(config), config.main_batch_size, config.data.seq_len + 1
    dtype = training_dtype(config.compute.dtype, mesh.devices.flat[0])
    step = compile_step(config, mesh, rows, dtype=dtype, remat="none")
    shape = (padded_rows(rows, mesh, config.compute.grad_accum), length)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape).astype(np.int32)
    batch = jax.device_put((tokens, np.ones_like(tokens)), sharded(mesh, BATCH_AXES))

    def steps() -> Iterator[float]:
        state = init_state(config, mesh)
        while True:
            began = time.perf_counter()
            state, _ = step(state, *batch)
            jax.block_until_ready(state)
            yield time.perf_counter() - began

    taken = steps()
    return lambda: next(taken)


if __name__ == "__main__":
    as_command(minutes, "minutes")
