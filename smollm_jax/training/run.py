"""Hold the state of a training run, and the rules for saving and evaluating it."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from smollm_jax.checkpoint.manager import CheckpointManager
from smollm_jax.config.serialization import to_dict
from smollm_jax.config.settings import Config
from smollm_jax.data.loader import PrefetchLoader, merge_cursors
from smollm_jax.data.shuffle import TokenizedDocument
from smollm_jax.distributed.processes import Processes
from smollm_jax.evaluation.scorer import Scorer
from smollm_jax.generation.generator import Generator
from smollm_jax.model.transformer import SmolLM
from smollm_jax.runs.metrics import NullMetrics, RunMetrics
from smollm_jax.runtime.signals import StopRequest
from smollm_jax.tokenizer.tokenizer import Tokenizer
from smollm_jax.training.compile import Step
from smollm_jax.training.step import trained_part


@dataclass
class Progress:
    """The counters that a checkpoint stores next to the arrays."""

    step: int = 0
    tokens: int = 0
    bad_steps: int = 0
    bad_steps_in_a_row: int = 0
    skipped_steps: int = 0  # whose gradients overflowed float16: no fault of the data
    ledger: str = ""  # running hash of all batches so far
    cursor: dict[str, Any] | None = None
    elapsed_seconds: float = 0.0  # from the first step on, over all starts, without time lost to a kill
    # of the steps with finite gradients since the last metrics line: sum of the nats, and their targets or pairs
    nats: float = 0.0
    targets: int = 0
    figures: dict[str, float] = field(default_factory=dict)  # of pairs, sums like `nats`


@dataclass
class Pending:
    """A step on the device. Its metrics are read after the next step was dispatched."""

    step: int
    metrics: dict[str, jax.Array]
    cursor_before: dict[str, Any] | None
    cursor: dict[str, Any] | None
    sent: float  # time of dispatch, by `time.monotonic`


@dataclass
class Interval:
    """The sums of this process since the last metrics line, without evaluations and saves."""

    began: float = field(default_factory=time.monotonic)
    steps: int = 0
    targets: int = 0
    slots: int = 0  # token positions of the batches
    filled: int = 0  # in chat data, the positions without padding
    data_wait_seconds: float = 0.0
    latest: tuple[Pending, dict[str, Any]] | None = None  # the last step, if it has no line yet, and its metrics

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keep the time inside out of the interval."""
        paused = time.monotonic()
        yield
        self.began += time.monotonic() - paused


@dataclass(kw_only=True)
class Run:
    """A run in progress. `steps` maps a batch size to its compiled train step."""

    config: Config
    run_dir: Path
    stop: StopRequest
    job: Processes
    tokenizer: Tokenizer
    stream: PrefetchLoader
    heldout: list[TokenizedDocument]
    mesh: jax.sharding.Mesh
    dtype: Any
    steps: dict[int, Step]
    nll: Callable[..., jax.Array]
    checkpoints: CheckpointManager
    state: dict[str, Any]
    report: RunMetrics | NullMetrics
    progress: Progress
    saved: int  # step of the last checkpoint begun
    evaluated: int  # last step whose evaluation is on record, else -1
    ledgers: dict[int, str]  # batch hash per step on record at the start: a step trained again must have the same
    interval: Interval = field(default_factory=Interval)
    computed: dict[str, Any]  # dtype, platform and number of devices, stored in each checkpoint
    base: dict[str, Any] | None  # place and hash of the weights under the adapters, None without adapters
    kernels: bool | None  # False if samples must not use kernels because the steps do not
    clock: float = field(default_factory=time.monotonic)  # when `progress.elapsed_seconds` was counted last
    generator: Generator | None = None  # decodes the samples, None before the first evaluation
    tasks: Any = None  # of --eval-tasks, loaded, in the first process
    scorer: Scorer | None = None  # scores the tasks
    reference: Any = None  # of pairs, the `training.reference.Reference`

    @property
    def interrupted(self) -> bool:
        """Return whether to drop the current work. One of several processes goes on until all agree to stop."""
        return self.stop.requested and not self.job.several

    @property
    def last_step(self) -> int:
        return min(self.config.total_steps, self.config.run.stop_after or self.config.total_steps)

    def close(self) -> None:
        """Stop the loader, wait for a save in progress, close the records."""
        self.stream.close()
        self.checkpoints.close()
        self.report.close()


def loaded_generator(run: Run, params: Any) -> Generator:
    """Return the run's generator with `params`, which are on one device. To be unloaded after use."""
    model = SmolLM.from_params(run.config.model, params, dtype=run.dtype)
    if run.generator is None:
        run.generator = Generator(model, kernels=run.kernels)
    else:
        run.generator.load(model)
    return run.generator


def save(run: Run) -> None:
    """Begin a checkpoint of the current step, unless the step is saved already."""
    step = run.progress.step
    if step == run.saved:
        return
    cursor = merge_cursors(run.job.gather(run.progress.cursor))
    count_seconds(run)
    meta = {
        "cursor": cursor,
        "progress": dataclasses.asdict(run.progress) | {"cursor": cursor},
        "config": to_dict(run.config),
        "computed": run.computed,
        "sources": run.stream.loader.origins,
    }
    if run.base is not None:
        meta["base"] = run.base
    run.checkpoints.retention = dataclasses.replace(run.checkpoints.retention, before=run.config.decay_start)
    if run.reference is not None:
        meta["reference"] = run.reference.digest
    with run.job.watchdog.patient("a save"):
        run.checkpoints.save(step, trained_part(run.state), meta)
    run.saved = step


def count_seconds(run: Run) -> None:
    """Add the time since the last call to the run's own clock."""
    now = time.monotonic()
    run.progress.elapsed_seconds += now - run.clock
    run.clock = now


def evaluation_due(run: Run) -> bool:
    """Return whether the current step is evaluated: every --eval-every steps, and the last.

    Step 0, before the first one, is evaluated if --eval-on-start asks for it.
    """
    every, step = run.config.run.eval_every, run.progress.step
    asked = step > 0 or run.config.run.eval_on_start
    return every > 0 and asked and (step % every == 0 or step == run.config.total_steps)


def save_step(run: Run) -> bool:
    """Return whether a checkpoint is due at the current step: each --checkpoint-every, before a decay, the last.

    A checkpoint that a bad step left out is due until it is made.
    """
    every, step, before = run.config.run.checkpoint_every, run.progress.step, run.config.decay_start
    is_due = step // every > run.saved // every or run.saved < (before or 0) <= step if every else False
    return is_due or step == run.config.total_steps


def save_due(run: Run) -> bool:
    """Return whether a checkpoint follows the current step, whose metrics are read."""
    # in a row of bad steps there is nothing new to keep, and retention must not delete an older good state
    last = run.progress.step == run.config.total_steps
    return last or (save_step(run) and not run.progress.bad_steps_in_a_row)
