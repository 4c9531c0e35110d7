"""Train ours and Hugging Face + PyTorch for a fixed time, by held-out loss: `python -m benchmarks.race`.

All sides see the same documents, tokenizer, rows, initial weights, optimizer settings and clip. Each side first
measures its step, and plans as many steps as fit the time. The schedule spans these. So a faster side trains on
more tokens. Compilation and evaluations do not count as time. Held-out documents are apart for both sides. The
peer trains on packed rows with a causal mask alone, as its users do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.harness.peers import Form, torch_device, torch_wait, train_step
from benchmarks.harness.sides import in_child
from benchmarks.harness.tables import ROOT, Row, as_command, finish
from benchmarks.harness.workload import Dtype, Preset, StepWork, write_model
from smollm_jax.cli.arguments import parse
from smollm_jax.config.settings import Config
from smollm_jax.data.packing import are_targets, num_targets
from smollm_jax.runs.records import evaluations, read_metrics
from smollm_jax.runtime.errors import require
from smollm_jax.runtime.files import written_aside

Side = Literal["ours", "peer", "ours, Muon"]
TIMED, WARM = 20, 5  # steps that are timed first, and the first of them that do not count
MORE: dict[str, list[str]] = {"ours": [], "peer": [], "ours, Muon": ["--optimizer", "muon"]}


@dataclass(frozen=True)
class Plan:
    """What all sides share: flags of train_jax.py, training time, and the number of held-out losses."""

    flags: list[str]
    dtype: Dtype
    form: Form
    seconds: float
    evaluations: int


COLOURS = {"ours": "#1f4e8c", "ours, Muon": "#2f8f5b", "peer": "#c8502d"}


def race(
    *,
    data: str = "builtin:python-docs",
    tokenizer: str = "train:8192",
    sides: tuple[Side, ...] = ("ours", "peer"),
    seconds: float = 150.0,
    preset: Preset = "135M",
    batch_size: int = 32,
    seq_len: int = 2_048,
    dtype: Dtype = "bfloat16",
    form: Form = "compile",
    learning_rate: float = 1e-3,
    evaluations: int = 6,
    seed: int = 0,
    out: Path = Path("runs/race"),
) -> int:
    """Train each side for the same time and compare held-out losses.

    Args:
        data: Training text, as `--data` of train_jax.py.
        tokenizer: train:VOCAB or a folder.
        sides: Sides to run, in this order.
        seconds: Training time per side, without compilation and evaluations.
        preset: Architecture.
        batch_size: Rows per step, of all sides.
        seq_len: Tokens per row.
        dtype: Compute dtype over float32 parameters.
        form: How PyTorch runs the peer.
        learning_rate: Peak learning rate, with linear warm-up and decay.
        evaluations: Held-out losses per side, at equal distances.
        seed: Seed of weights and data.
        out: Folder for the runs, curves.json and race.png.
    """
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    base = ["--recipe", "quickstart"] if preset == "quickstart" else ["--preset", preset]
    base += ["--data", data, "--tokenizer", tokenizer, "--seq-len", str(seq_len), "--dtype", dtype]
    base += ["--batch-size", str(batch_size), "--learning-rate", str(learning_rate), "--schedule", "linear"]
    base += ["--log-every", "1", "--checkpoint-every", "0", "--sample-tokens", "0", "--no-export"]
    base += ["--seed", str(seed), "--eval-batches", "16"]
    curves: dict[str, list[Row]] = {}
    for side in sides:
        folder = out / side.replace(", ", "-")
        plan = Plan([*base, *MORE[side]], dtype, form, seconds, evaluations)
        curves[side] = (_peer if side == "peer" else _ours)(plan, folder)
        with written_aside(out / "curves.json") as part:  # each side as soon as it is there
            part.write_text(json.dumps(curves, indent=1))
    draw(curves, out / "race.png", f"{preset}, {batch_size} x {seq_len}, {dtype}")
    rows = [{"side": side} | line for side, lines in curves.items() for line in lines]
    last = [{"side": side} | lines[-1] for side, lines in curves.items()]
    finish(f"race, {preset}, {seconds:g} s", rows, summary=last, data=data, form=form, learning_rate=learning_rate)
    return 0


def _ours(plan: Plan, folder: Path) -> list[Row]:
    """Return held-out losses of a run of train_jax.py by its training time."""
    timed = ["--steps", "1000", "--stop-after", str(TIMED), "--eval-every", "0"]
    with tempfile.TemporaryDirectory(prefix="race-") as scratch:
        step_seconds = median_step(_run([*plan.flags, *timed], Path(scratch) / "timed"))
    steps = max(int(plan.seconds / step_seconds), plan.evaluations)
    every = -(-steps // plan.evaluations)
    lines = _run([*plan.flags, "--steps", str(steps), "--eval-every", str(every)], folder)
    spent, found, tokens, good = 0.0, [], 0, evaluations(lines)
    for line in lines:
        if "step_seconds" in line:
            spent, tokens = spent + line["step_seconds"], line["tokens"]
        if line in good:
            found.append(_point(line["step"], spent, tokens, line["eval_loss"], line["eval_bits_per_byte"]))
    return found


def median_step(lines: list[Row]) -> float:
    """Return the median seconds of a step in the lines of metrics.jsonl, after the first few."""
    return float(np.median([line["step_seconds"] for line in lines if "step_seconds" in line][WARM:]))


def _run(flags: list[str], folder: Path) -> list[Row]:
    command = [sys.executable, str(ROOT / "train_jax.py"), "--new-run", "--run-dir", str(folder), *flags]
    code = subprocess.run(command, cwd=ROOT, check=False, stdout=sys.stderr).returncode
    require(code == 0, f"the run in {folder} ended with exit code {code}; its output is above")
    return read_metrics(folder)


def _peer(plan: Plan, folder: Path) -> list[Row]:
    """Return held-out losses of the peer by its training time, from a process of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="race-") as scratch:
        in_child(_prepare, plan.flags, Path(scratch))
        in_child(_train_peer, plan, Path(scratch), folder / "curve.json")
    return json.loads((folder / "curve.json").read_text())


def _settings(flags: list[str], steps: int) -> Config:
    return parse([*flags, "--steps", str(steps)])


def _with_vocabulary(config: Config, folder: Path) -> tuple[Config, Any]:
    from smollm_jax.tokenizer.load import load_tokenizer

    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    return replace(config, model=replace(config.model, vocab_size=tokenizer.vocab_size)), tokenizer


def _prepare(flags: list[str], folder: Path) -> None:
    """Write the tokenizer of a run, and its initial weights as a Hugging Face folder."""
    from smollm_jax.data.heldout import head_texts
    from smollm_jax.tokenizer.load import load_tokenizer
    from smollm_jax.training.setup import TOKENIZER_DOCUMENTS

    os.environ["JAX_PLATFORMS"] = "cpu"  # the device is the peer's
    config = _settings(flags, 1_000)
    texts = islice(head_texts(config.data), TOKENIZER_DOCUMENTS)
    load_tokenizer(config.data.tokenizer, documents=texts).save(folder / "tokenizer")
    config, _ = _with_vocabulary(config, folder)
    write_model(config.model, config.run.seed, folder / "hf")


def _train_peer(plan: Plan, scratch: Path, result: Path) -> None:
    import torch

    from smollm_jax.data.heldout import held_out, pack_to_score
    from smollm_jax.data.loader import Loader, PrefetchLoader

    os.environ["JAX_PLATFORMS"] = "cpu"
    device = torch_device()
    wait = torch_wait(device)
    config, tokenizer = _with_vocabulary(_settings(plan.flags, 1_000), scratch)
    held = held_out(config.data, tokenizer)
    rows = config.main_batch_size
    scored = list(islice(pack_to_score(held, tokenizer, config.data.seq_len, rows), config.data.eval_batches))
    work = StepWork(config, plan.dtype)

    def batches(steps: int) -> Iterator[tuple[Any, int]]:
        settings, _ = _with_vocabulary(_settings(plan.flags, steps), scratch)
        with closing(PrefetchLoader(Loader(settings, tokenizer, held), None)) as stream:
            for _ in range(steps):
                while (item := stream.get(timeout=1.0)) is None:
                    pass
                tokens = torch.from_numpy(item[0].tokens.astype(np.int64)).to(device, non_blocking=True)
                yield tokens, num_targets(item[0])

    took = []
    step, optimizer, model = train_step(work, plan.form, device, scratch / "hf")
    start = {name: value.clone() for name, value in model.state_dict().items()}
    for tokens, _ in batches(TIMED):
        began = time.perf_counter()
        step(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).item()
        took.append(time.perf_counter() - began)
    steps = max(int(plan.seconds / float(np.median(took[WARM:]))), plan.evaluations)
    model.load_state_dict(start)  # from the start again, compiled
    optimizer.state.clear()
    rates = _rates(_settings(plan.flags, steps))
    spent, trained, found, every = 0.0, 0, [], -(-steps // plan.evaluations)
    began = time.perf_counter()
    for number, (tokens, targets) in enumerate(batches(steps), 1):
        for group in optimizer.param_groups:
            group["lr"] = rates[number - 1]
        step(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        trained += targets
        if number % every == 0 or number == steps:
            wait()
            spent += time.perf_counter() - began
            loss, bits = _score_peer(model, scored, device, plan.dtype)
            found.append(_point(number, spent, trained, loss, bits))
            print(f"peer: step {number}/{steps}, {spent:.0f} s, held-out loss {loss:.4f}", file=sys.stderr)
            began = time.perf_counter()
    result.write_text(json.dumps(found))


def _rates(config: Config) -> list[float]:
    import jax

    from smollm_jax.training.optimizer import learning_rate_schedule

    return np.asarray(jax.vmap(learning_rate_schedule(config))(np.arange(config.total_steps))).tolist()


def _score_peer(model: Any, batches: list[Any], device: str, dtype: Dtype) -> tuple[float, float]:
    """Return nats per target and bits per byte of held-out rows, whose documents do not see each other."""
    import torch

    nats = targets = text_bytes = 0.0
    model.set_attn_implementation("sdpa")
    model.eval()
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
        for batch in batches:
            is_target = are_targets(batch.segment_ids)
            for row in range(len(batch.tokens)):
                if not is_target[row].any():
                    continue
                segments = torch.tensor(batch.segment_ids[row, :-1], device=device)
                T = len(segments)
                first = torch.cat([segments.new_ones(1), (segments[1:] != segments[:-1]).to(segments.dtype)])
                at = torch.arange(T, device=device)
                positions = at - torch.cummax(at * first, 0).values
                mask = (segments[:, None] == segments[None]) & (at[:, None] >= at[None])
                ids = torch.tensor(batch.tokens[row].astype(np.int64), device=device)
                logits = model(
                    input_ids=ids[None, :-1], position_ids=positions[None], attention_mask=mask[None, None],
                    use_cache=False,
                ).logits  # fmt: skip
                each = torch.nn.functional.cross_entropy(logits[0].float(), ids[1:], reduction="none")
                nats += float(each[torch.tensor(is_target[row], device=device)].sum())
            targets += int(is_target.sum())
            text_bytes += int(batch.text_bytes[:, 1:][is_target].sum())
    model.train()
    model.set_attn_implementation("causal")
    return nats / targets, nats / np.log(2) / text_bytes


def _point(step: int, seconds: float, tokens: int, loss: float, bits: float) -> Row:
    return {"step": step, "seconds": seconds, "tokens": tokens, "held-out loss": loss, "bits per byte": bits}


def draw(curves: dict[str, list[Row]], file: Path, title: str) -> None:
    """Draw held-out loss against training time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=150)
    axes = figure.add_subplot()
    for side, lines in curves.items():
        name = "Hugging Face + torch.compile" if side == "peer" else f"smollm-jax{side.removeprefix('ours')}"
        axes.plot(*zip(*((x["seconds"], x["held-out loss"]) for x in lines), strict=True), "o-", ms=3,
                  color=COLOURS[side], label=name)  # fmt: skip
    axes.set(xlabel="seconds of training", ylabel="held-out loss, nats per token", title=title)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    with written_aside(file) as part:
        figure.savefig(part, format="png")


if __name__ == "__main__":
    as_command(race, "race")
