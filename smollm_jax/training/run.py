"""A run in motion: what the loop moves forward, and when it saves and evaluates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from smollm_jax.checkpoint.manager import CheckpointManager
from smollm_jax.config.serialization import to_dict
from smollm_jax.config.settings import Config
from smollm_jax.data.heldout import HeldOut
from smollm_jax.data.loader import PrefetchLoader, merged
from smollm_jax.distributed.processes import Processes
from smollm_jax.generation.generator import Generator
from smollm_jax.runs.metrics import NullMetrics, RunMetrics
from smollm_jax.runtime.signals import StopRequest
from smollm_jax.tokenizer.tokenizer import Tokenizer


@dataclass
class Progress:
    """What a checkpoint records beside the arrays."""

    step: int = 0
    tokens: int = 0
    bad_steps: int = 0
    bad_steps_in_a_row: int = 0
    ledger: str = ""
    """Running hash of every batch so far."""
    cursor: dict[str, Any] | None = None


@dataclass
class Run:
    """A run in motion. `steps` holds the compiled train step of each batch size."""

    config: Config
    run_dir: Path
    stop: StopRequest
    tokenizer: Tokenizer
    stream: PrefetchLoader
    heldout: HeldOut | None
    mesh: jax.sharding.Mesh
    dtype: Any
    steps: dict[int, jax.stages.Compiled]
    nll: Callable[..., jax.Array]
    checkpoints: CheckpointManager
    state: dict[str, Any]
    report: RunMetrics | NullMetrics
    progress: Progress = field(default_factory=Progress)
    saved: int = 0
    """Step of the last checkpoint begun."""
    reported: int = 0
    """Last step whose metrics were read."""
    recorded: int = 0
    """Last step with a line in metrics.jsonl."""
    evaluated: int = 0
    """Last step whose evaluation is on record."""
    ledgers: dict[int, str] = field(default_factory=dict)
    """Of the steps that were on record at the start; those that come again must agree."""
    computed: dict[str, Any] = field(default_factory=dict)
    """Dtype, platform and number of devices, kept in each checkpoint."""
    processes: Processes = field(default_factory=Processes)
    kernels: bool | None = None
    """False where samples do without kernels, as the steps do."""
    generator: Generator | None = None
    """Of the samples, once there were some."""

    @property
    def interrupted(self) -> bool:
        """Whether to drop what is being done. One of several processes goes on until all have agreed to stop."""
        return self.stop.requested and not self.processes.several

    @property
    def last_step(self) -> int:
        """Where this process stops: the end of the run, or --stop-after."""
        return min(self.config.total_steps, self.config.run.stop_after or self.config.total_steps)


def save(run: Run) -> None:
    """Begin a checkpoint of the step the run stands at, unless there is one."""
    step = run.progress.step
    if step == run.saved:
        return
    cursor = merged(run.processes.gather(run.progress.cursor))
    meta = {
        "cursor": cursor,
        "progress": dataclasses.asdict(run.progress) | {"cursor": cursor},
        "config": to_dict(run.config),
        "computed": run.computed,
    }
    with run.processes.watch.long("a save"):
        run.checkpoints.save(step, run.state, meta)
    run.saved = step


def evaluation_due(run: Run) -> bool:
    every, step = run.config.run.eval_every, run.progress.step
    return every > 0 and (step % every == 0 or step == run.config.total_steps)


def save_due(run: Run) -> bool:
    every, step = run.config.run.checkpoint_every, run.progress.step
    # in a row of bad steps nothing new is to be kept, and an older good state must not make room for it
    return step == run.config.total_steps or (
        every > 0 and step % every == 0 and not run.progress.bad_steps_in_a_row
    )
