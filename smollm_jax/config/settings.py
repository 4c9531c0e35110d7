"""Every setting of the project as frozen dataclasses, checked when they are made.

This module imports nothing heavy, so that `--help` answers at once, and knows nothing of JAX, files or the
network. A number has one home: the default of its field, or the recipe or preset that differs from it. A mistake
raises `UserError` with what was expected, what came and what to do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from smollm_jax.config.architecture import MODELS, ModelConfig
from smollm_jax.config.fields import (
    ABOVE_0,
    AT_LEAST_0,
    AT_LEAST_1,
    DEFAULT_OR_MORE,
    FRACTION,
    FREE,
    SAME_MATHS,
    SCHEDULE,
    check_fields,
)
from smollm_jax.config.phases import Phase, parse_phases, resize
from smollm_jax.runtime.errors import require

WARMUP_STEPS = {"replica": 100, "smollm2": 2_000, "quickstart": 50}  # of each recipe
WARMUP_SHARE = 10  # a recipe's own warm-up is at most a tenth of the steps
DECAY_SHARE = 5  # warm-up-stable-decay decays over the last fifth: 400,000 of SmolLM2's 2,000,000 steps

MESH_AXES = ("data", "fsdp", "tensor")
PROMPTS = ("Once upon a time", "Photosynthesis is the process by which", "The first step to learn how to cook is")

Remat = Literal["auto", "none", "dots", "full"]
AttentionName = Literal["auto", "plain", "splash", "pallas"]


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How the result is computed; only `dtype` changes it by more than rounding."""

    mesh: str = field(default="", metadata=SAME_MATHS)
    """Devices per mesh axis, such as data=4,fsdp=2,tensor=1; empty: all devices on data."""
    dtype: Literal["auto", "float32", "bfloat16"] = field(default="auto", metadata=FREE)
    """Compute dtype over float32 parameters. auto: float32 on a CPU, bfloat16 on GPU and TPU."""
    remat: Remat = field(default="auto", metadata=SAME_MATHS)
    """What the backward pass recomputes. none: cheap ops; dots: all but matmuls; full: all; auto: by memory."""
    attention: AttentionName = field(default="auto", metadata=SAME_MATHS)
    """Kernel. plain: the reference; splash: TPU; pallas: GPU; auto: the best that agrees with plain at start."""
    coordinator: str | None = field(default=None, metadata=FREE)
    """HOST:PORT of the first process, if no launcher tells it; then give each process its number too."""
    num_processes: int | None = field(default=None, metadata=FREE)
    process_id: int | None = field(default=None, metadata=FREE)
    """Number of this process, counted from 0, with --coordinator."""
    unroll: int = field(default=0, metadata=DEFAULT_OR_MORE | SAME_MATHS)
    """Layers per iteration of the scan over layers; 0: all on a GPU with its kernels and remat none, else 1."""
    loss_chunk: int = field(default=0, metadata=DEFAULT_OR_MORE | SAME_MATHS)
    """Tokens whose logits exist at once; 0: 1,024, or 8,192 on a GPU with its kernels unless remat is full."""
    grad_accum: int = field(default=1, metadata=AT_LEAST_1 | SAME_MATHS)
    """Microbatches per step; the gradient equals the gradient of the whole batch."""
    compilation_cache_dir: str = field(default="~/.cache/smollm_jax", metadata=FREE)
    """Folder that keeps compiled programs between runs; empty: keep none."""

    def __post_init__(self) -> None:
        check_fields(self)
        job = (self.coordinator, self.num_processes, self.process_id)
        together = "coordinator, num_processes and process_id belong together: give all three or none"
        require(job.count(None) in (0, len(job)), together)
        if self.coordinator is not None:
            _, colon, port = self.coordinator.rpartition(":")
            require(bool(colon) and port.isdecimal(), f"coordinator={self.coordinator!r} must read HOST:PORT")
            number, last = self.process_id or 0, (self.num_processes or 0) - 1
            require(0 <= number <= last, f"process_id={number} must lie in 0 to {last}, below num_processes")
        self.mesh_sizes  # noqa: B018 - raises on a mistake in `mesh`

    def unroll_for(self, remat: str, layers: int, *, on_gpu: bool) -> int:
        """Return `unroll` or its default; `on_gpu` means a GPU with its kernels, whose loop copies residuals."""
        return self.unroll or (layers if on_gpu and remat == "none" else 1)

    def loss_chunk_for(self, remat: str, *, on_gpu: bool) -> int:
        """Return `loss_chunk` or its default; per chunk a GPU rewrites the head's gradient."""
        return self.loss_chunk or (8_192 if on_gpu and remat != "full" else 1_024)

    @property
    def mesh_sizes(self) -> dict[str, int]:
        """Return `mesh` as a dict: "data=4,fsdp=2" is {"data": 4, "fsdp": 2}; empty for the default."""
        sizes: dict[str, int] = {}
        for part in self.mesh.split(",") if self.mesh.strip() else ():
            axis, _, count = (word.strip() for word in part.partition("="))
            good = axis in MESH_AXES and axis not in sizes and count.isdecimal() and int(count) > 0
            require(good, f"mesh={self.mesh!r}: expected {MESH_AXES[0]}=N and the like, of {', '.join(MESH_AXES)}")
            sizes[axis] = int(count)
        return sizes


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and how it becomes batches."""

    data: str = "HuggingFaceTB/smollm-corpus:cosmopedia-v2"
    """OWNER/NAME:CONFIG, a .jsonl/.parquet/.txt file or glob, or builtin:python-docs; A=0.7,B=0.3 mixes."""
    split: str = "train"
    """Split of a Hub dataset."""
    text_column: str = "text"
    """Column that holds the text."""
    tokenizer: str = "HuggingFaceTB/SmolLM2-135M"
    """Hub id, folder, or train:VOCAB to train a byte-level BPE on the start of the data."""
    seq_len: int = field(default=2_048, metadata=AT_LEAST_1)
    """Tokens per sequence."""
    shuffle_window: int = field(default=1_024, metadata=AT_LEAST_1)
    """Documents shuffled together; 1: the order of the source."""
    shards: int = field(default=1, metadata=AT_LEAST_1)
    """Streams that fill a batch, each with its shard of the data; a process reads only its own."""
    epochs: int = field(default=0, metadata=AT_LEAST_0)
    """Passes over a finite source, each shuffled anew; 0: for as long as the run lasts."""
    eval_data: str | None = None
    """Held-out source; default: documents of the training source, which training then skips."""
    eval_documents: int = field(default=200, metadata=AT_LEAST_0)
    """Documents held out; 0: none."""
    eval_batches: int = field(default=16, metadata=AT_LEAST_1)
    """Maximum number of batches per evaluation."""
    on_bad_data: Literal["stop", "skip"] = field(default="stop", metadata=FREE)
    """What to do with a row that cannot be read: stop the run, or skip and count it."""
    data_timeout: float = field(default=600.0, metadata=ABOVE_0 | FREE)
    """Seconds to wait for a silent source before the run saves and exits with code 75."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(
            self.eval_data is None or self.eval_documents > 0,
            f"eval_data={self.eval_data} is read, so eval_documents=0 must be above 0",
        )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning rate schedule."""

    learning_rate: float = field(default=6e-4, metadata=ABOVE_0 | SCHEDULE)
    """Peak learning rate."""
    schedule: Literal["linear", "constant", "cosine", "wsd"] = field(default="linear", metadata=SCHEDULE)
    """After the warm-up: linear or cosine decay to the end, constant, or wsd (stable, then linear decay)."""
    warmup_steps: int | None = field(default=None, metadata=AT_LEAST_0 | SCHEDULE)
    """Steps of linear warm-up; default: the recipe's, at most a tenth of the steps."""
    decay_steps: int | None = field(default=None, metadata=AT_LEAST_0 | SCHEDULE)
    """Steps of the decay of wsd; default: a fifth of the steps."""
    final_learning_rate: float = field(default=0.0, metadata=AT_LEAST_0 | SCHEDULE)
    """Learning rate at the end of a decay."""
    beta1: float = field(default=0.9, metadata=FRACTION)
    beta2: float = field(default=0.95, metadata=FRACTION)
    epsilon: float = field(default=1e-8, metadata=ABOVE_0)
    weight_decay: float = field(default=0.01, metadata=AT_LEAST_0)
    """Decoupled weight decay; norm weights are exempt."""
    clip_norm: float = field(default=1.0, metadata=ABOVE_0)
    """Global gradient norm above which gradients are scaled down."""
    max_bad_steps: int = field(default=10, metadata=ABOVE_0 | FREE)
    """Stop after this many steps in a row without finite gradients; such steps change nothing."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(
            self.final_learning_rate <= self.learning_rate,
            f"final_learning_rate={self.final_learning_rate} must not be above learning_rate={self.learning_rate}",
        )
        require(
            self.final_learning_rate == 0 or self.schedule != "constant",
            f"final_learning_rate={self.final_learning_rate} belongs to a schedule that decays; constant came",
        )
        require(
            self.decay_steps is None or self.schedule == "wsd",
            f"decay_steps={self.decay_steps} belongs to --schedule wsd; {self.schedule} came",
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How long, how large and where a run is, and what it shows and keeps."""

    run_dir: str | None = field(default=None, metadata=FREE)
    """Run folder; default: runs/RECIPE."""
    new_run: bool = field(default=False, metadata=FREE)
    """Start afresh: an existing run folder is moved aside, not deleted."""
    init_from: str | None = None
    """Weights to start from: a run, an exported folder or a Hub id."""
    phases: str = field(default="5000x32,50x8", metadata=SCHEDULE)
    """Phases as STEPSxBATCH, one after the other under one schedule."""
    steps: int | None = field(default=None, metadata=AT_LEAST_1 | SCHEDULE)
    """Length of the run and of its schedule; default: the sum of the phases."""
    batch_size: int | None = field(default=None, metadata=AT_LEAST_1 | SCHEDULE)
    """Sequences per step in the longest phase; phases with smaller batches keep theirs."""
    stop_after: int | None = field(default=None, metadata=AT_LEAST_1 | FREE)
    """Save and stop after this step; the schedule stays, and the same command without the flag continues."""
    seed: int = field(default=0, metadata=AT_LEAST_0)
    """Seed of the initial weights, the shuffling and the samples."""
    log_every: int = field(default=10, metadata=AT_LEAST_1 | FREE)
    """Steps between reports."""
    eval_every: int = field(default=500, metadata=AT_LEAST_0 | FREE)
    """Steps between evaluations, with one more at the end; 0: never."""
    checkpoint_every: int = field(default=500, metadata=AT_LEAST_0 | FREE)
    """Steps between checkpoints, with one more at the end; 0: only at the end."""
    keep_last: int = field(default=3, metadata=AT_LEAST_1 | FREE)
    """Newest checkpoints kept."""
    keep_every: int = field(default=0, metadata=AT_LEAST_0 | FREE)
    """Keep the checkpoint of every Nth step permanently; 0: none."""
    sample_prompts: tuple[str, ...] = field(default=PROMPTS, metadata=FREE)
    """Prompts continued at each evaluation."""
    sample_tokens: int = field(default=64, metadata=AT_LEAST_0 | FREE)
    """Tokens per sample; 0: no samples."""
    export: bool = field(default=True, metadata=FREE)
    """Write a Hugging Face folder to RUN/export at the end."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.seed < 2**32, f"seed={self.seed} must be below 2**32")
        require(all(map(str.strip, self.sample_prompts)), "sample_prompts: every prompt must have text")
        parse_phases(self.phases)


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run."""

    recipe: str = field(default="replica", metadata=FREE)
    """replica: the seed's run. smollm2: the published recipe. quickstart: no download, minutes on a CPU."""
    preset: str = field(default="135M", metadata=FREE)
    """Architecture: 135M, 360M, 1.7B or quickstart; the flags under `model` change single numbers."""
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    model: ModelConfig = field(default_factory=ModelConfig)

    def __post_init__(self) -> None:
        require(self.recipe in WARMUP_STEPS, f"recipe={self.recipe} must be one of {', '.join(WARMUP_STEPS)}")
        require(self.preset in MODELS, f"preset={self.preset} must be one of {', '.join(MODELS)}")
        micro, warmup, steps = self.compute.grad_accum, self.optimizer.warmup_steps, self.total_steps
        require(steps < 2**31, f"steps={steps} must be below 2**31")
        for size in (phase.batch_size for phase in self.phases):
            require(size % micro == 0, f"grad_accum={micro} must divide the batch size {size} of every phase")
            shards = self.data.shards
            require(size % shards == 0, f"shards={shards} must divide every batch size; {size} came")
        require(
            warmup is None or warmup < steps,
            f"warmup_steps={warmup} must be below the {steps} steps of the run; "
            "leave --warmup-steps out to have the recipe's fitted",
        )
        require(
            self.warmup_steps + self.decay_steps <= steps,
            f"warmup_steps={self.warmup_steps} and decay_steps={self.decay_steps} together must not "
            f"exceed the {steps} steps of the run",
        )
        require(
            self.data.seq_len <= self.model.max_seq_len,
            f"seq_len={self.data.seq_len} must not exceed the model's max_seq_len={self.model.max_seq_len}",
        )

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The recipe's phases, resized by --steps and --batch-size."""
        return resize(parse_phases(self.run.phases), self.run.steps, self.run.batch_size)

    @property
    def total_steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    @property
    def main_batch_size(self) -> int:
        """Sequences per step in the longest phase; evaluations use it too."""
        return max(self.phases, key=lambda phase: phase.steps).batch_size

    def batch_size_at(self, step: int) -> int:
        """Return the sequences of update `step`, counted from 1."""
        for phase in self.phases:
            if step <= phase.steps:
                return phase.batch_size
            step -= phase.steps
        raise ValueError(f"step lies {step} past the end of the run")

    @property
    def warmup_steps(self) -> int:
        given = self.optimizer.warmup_steps
        return min(WARMUP_STEPS[self.recipe], self.total_steps // WARMUP_SHARE) if given is None else given

    @property
    def decay_steps(self) -> int:
        """Updates of the decay: the whole rest of the run for `linear` and `cosine`."""
        schedule, given = self.optimizer.schedule, self.optimizer.decay_steps
        if schedule == "wsd":
            return self.total_steps // DECAY_SHARE if given is None else given
        return 0 if schedule == "constant" else self.total_steps - self.warmup_steps

    @property
    def run_dir(self) -> str:
        return self.run.run_dir or f"runs/{self.recipe}"
