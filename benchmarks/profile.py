"""Profile whole train steps and attribute the device's time to parts: `python -m benchmarks.profile`.

Each operation belongs to the innermost scope (`jax.named_scope`) of the model around it; XLA keeps scopes through
differentiation and fusion. A fusion counts as its last operation. On a GPU or TPU, times are the device's own; on
a CPU they are summed over threads, so only the shares are meaningful.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.harness.tables import Row, as_command, finish
from benchmarks.harness.workload import COMPUTE, Preset, StepWork, config_of, dtype_of, our_step
from smollm_jax.config.settings import ComputeConfig
from smollm_jax.runtime.devices import has_accelerator
from smollm_jax.runtime.errors import require

REST, NOBODYS = "rest", "XLA's own: copies, fills"
PARTS = {
    "embedding": "embedding",
    "layers": "scan over layers, residuals",
    "norm": "norms",
    "projections": "attention: projections and rope",
    "scores": "attention: scores to values",
    "feed_forward": "feed-forward",
    "head": "head and loss",
    "optimizer": "optimizer",
}
UNKNOWN = ("", "not in the program")
# their time is the time of the operations inside
CONTAINERS = ("while", "conditional", "call", "async-start", "async-done")
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*? ([\w\-]+)\(")
SCOPES_OF = re.compile(r'op_name="([^"\[]*)"')  # with a bracket it names a parameter, as in copies


def profile(
    *,
    preset: Preset = "135M",
    batch_size: int = 2,
    seq_len: int = 256,
    documents: int = 1,
    steps: int = 5,
    compute: ComputeConfig = COMPUTE,
    top: int = 15,
    out: str | None = None,
    seed: int = 0,
) -> int:
    """Profile whole train steps and attribute the device's time to the parts of the model.

    Args:
        preset: Architecture.
        batch_size: Rows per step.
        seq_len: Tokens per row.
        documents: Documents packed into a row.
        steps: Steps in the profile.
        compute: Settings of the step.
        top: Longest operations shown.
        out: Folder to keep the profile in, for TensorBoard or Perfetto.
        seed: Seed of the tokens and documents.
    """
    if has_accelerator():  # kernels of one graph do not name their operation
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="
    config = config_of(preset, batch_size, seq_len, compute)
    dtype = dtype_of(compute)
    with ExitStack() as stack:
        folder = Path(out or stack.enter_context(tempfile.TemporaryDirectory(prefix="profile-benchmark-")))
        text, note = _profiled(StepWork(config, dtype, documents, steps, seed), folder)
        seconds, wall = read_profile(max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime))
    require(bool(seconds), "the profile holds no operation of the step: this backend does not name them")
    operations = read_operations(text)
    title = f"profile, {preset}, {dtype}, {batch_size} x {seq_len}, {documents} documents a row, {note}"
    rows = by_part(seconds, operations, steps)
    busy = sum(row["ms a step"] for row in rows)
    finish(
        title,
        [*rows, {"part": "all", "ms a step": busy, "share": 1.0}],
        summary=_longest(seconds, operations, steps, top),
        steps=steps,
        compute=vars(compute),
        wall_ms_a_step=wall * 1e3 / steps,
    )
    return 0


def _profiled(work: StepWork, folder: Path) -> tuple[str, str]:
    """Run the steps under the profiler; return the compiled program's text and a note on its kernels."""
    import jax

    step = our_step(work)
    jax.block_until_ready(step.run())
    with jax.profiler.trace(folder):
        for _ in range(work.steps):
            metrics = step.run()
        jax.block_until_ready(metrics)
    return step.program.as_text() or "", step.note


def read_profile(path: Path) -> tuple[Counter[str], float]:
    """Return the seconds of each operation over all steps, and from the first start to the last end."""
    import jax

    seconds: Counter[str] = Counter()
    begins, ends = [], []
    for event, stats in _events(jax.profiler.ProfileData.from_file(str(path))):
        if "step" in str(stats.get("hlo_module", "")):
            seconds[str(stats["hlo_op"]).lstrip("%")] += event.duration_ns / 1e9
            begins.append(event.start_ns)
            ends.append(event.start_ns + event.duration_ns)
    return seconds, (max(ends) - min(begins)) / 1e9 if begins else 0.0


def _events(data: Any) -> list[tuple[Any, dict[str, Any]]]:
    """Return the events of operations: from devices if they recorded any, else from the CPU's threads."""
    planes = list(data.planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    return list(_operations(devices)) or list(_operations(planes))


def _operations(planes: list[Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
    for plane in planes:
        lines = list(plane.lines)
        operations = [line for line in lines if line.name == "XLA Ops"]
        for line in operations or [line for line in lines if line.name != "XLA Modules"]:
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" in stats:
                    yield event, stats


def read_operations(text: str) -> dict[str, tuple[str, str]]:
    """Map each operation of a compiled program to its kind and its part of the model."""
    operations = {}
    for line in text.splitlines():
        if found := INSTRUCTION.match(line):
            scopes = SCOPES_OF.search(line)
            operations[found[1]] = (found[2], part_of(scopes[1]) if scopes else NOBODYS)
    return operations


def part_of(scopes: str) -> str:
    """Return the part of the innermost scope, as in `jit(step)/transpose(jvp(layers))/while/body/norm/mul`."""
    names = [name for name in re.findall(r"\w+", scopes) if name in PARTS]
    return PARTS[names[-1]] if names else REST


def by_part(seconds: Counter[str], operations: dict[str, tuple[str, str]], steps: int) -> list[Row]:
    totals: Counter[str] = Counter()
    for name, value in seconds.items():
        kind, part = operations.get(name, UNKNOWN)
        if kind not in CONTAINERS:
            totals[part] += value
    whole = sum(totals.values())
    return [
        {"part": part, "ms a step": value * 1e3 / steps, "share": value / whole}
        for part, value in totals.most_common()
    ]


def _longest(seconds: Counter[str], operations: dict[str, tuple[str, str]], steps: int, top: int) -> list[Row]:
    longest = [(name, *operations.get(name, UNKNOWN), value) for name, value in seconds.most_common()]
    return [
        {"operation": name, "kind": kind, "part": part, "ms a step": value * 1e3 / steps}
        for name, kind, part, value in longest
        if kind not in CONTAINERS
    ][:top]


if __name__ == "__main__":
    as_command(profile, "profile")
