"""Every setting of the project and the recipes, as frozen dataclasses.

Nothing heavy is imported here, so that `--help` answers at once, and nothing here knows of JAX, files
or the network. A number stands once: as the default of its field, or in the recipe or preset that
differs from it. A mistake raises `ValueError` with what was expected, what came and what to do.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from smollm_jax.config.architecture import MODELS, ModelConfig, require_finite
from smollm_jax.runtime.errors import require

WARMUP_STEPS = {"replica": 100, "smollm2": 2_000, "quickstart": 50}  # of each recipe
WARMUP_SHARE = 10  # a recipe's own warm-up is at most a tenth of the steps
DECAY_SHARE = 5  # warm-up-stable-decay decays over the last fifth: 400,000 of SmolLM2's 2,000,000 steps

MESH_AXES = ("data", "fsdp", "tensor")

Dtype = Literal["auto", "float32", "bfloat16"]
Remat = Literal["auto", "none", "dots", "full"]
AttentionName = Literal["auto", "plain", "splash", "pallas"]
Schedule = Literal["linear", "constant", "cosine", "wsd"]


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How the maths is carried out; none of it but `dtype` changes the result by more than rounding."""

    mesh: str = ""
    """Devices by axis, such as data=4,fsdp=2,tensor=1; empty: all of them on data."""
    dtype: Dtype = "auto"
    """Compute dtype over float32 parameters; auto: float32 on a CPU, bfloat16 on GPU and TPU."""
    remat: Remat = "auto"
    """What the backward pass recomputes: what is cheap, all but products with weights, all; auto: by memory."""
    attention: AttentionName = "auto"
    """Kernel: plain, splash (TPU), pallas (GPU); auto: the best that agrees with plain at the start."""
    coordinator: str | None = None
    """HOST:PORT of the first process, where no launcher tells; each process is then given its number too."""
    num_processes: int | None = None
    process_id: int | None = None
    unroll: int = 0
    """Layers a turn of the scan over layers; 0: all on a GPU with its kernels and remat none, else 1."""
    loss_chunk: int = 0
    """Tokens whose logits exist at one time; 0: 1,024, on a GPU with its kernels 8,192 unless remat is full."""
    grad_accum: int = 1
    """Micro-batches a step; the batch is split, the result is that of the whole."""
    compilation_cache_dir: str = "~/.cache/smollm_jax"
    """Where compiled programs are kept between runs; empty: nowhere."""

    def __post_init__(self) -> None:
        require_finite(self)
        for name in ("unroll", "loss_chunk"):
            require(
                getattr(self, name) >= 0, f"{name}={getattr(self, name)} must be at least 1, or 0 for the default"
            )
        require(self.grad_accum > 0, f"grad_accum={self.grad_accum} must be at least 1")
        job = (self.coordinator, self.num_processes, self.process_id)
        require(
            all(x is None for x in job) or None not in job,
            "coordinator, num_processes and process_id belong together: give all three or none",
        )
        if self.coordinator is not None and self.num_processes is not None and self.process_id is not None:
            _, colon, port = self.coordinator.rpartition(":")
            require(bool(colon) and port.isdecimal(), f"coordinator={self.coordinator!r} must read HOST:PORT")
            require(
                0 <= self.process_id < self.num_processes,
                f"process_id={self.process_id} must lie in 0 to {self.num_processes - 1}, below num_processes",
            )
        self.mesh_sizes  # noqa: B018 - a mistake in it is to surface here

    def unroll_for(self, remat: str, layers: int, *, on_gpu: bool) -> int:
        """`unroll`, where `on_gpu` says that a GPU runs with its kernels: its loop copies all that is kept."""
        return self.unroll or (layers if on_gpu and remat == "none" else 1)

    def loss_chunk_for(self, remat: str, *, on_gpu: bool) -> int:
        """`loss_chunk`: the fewer tokens, the more often a GPU reads and writes the head's gradient; where even
        layers are computed again, memory is what counts.
        """
        return self.loss_chunk or (8_192 if on_gpu and remat != "full" else 1_024)

    @property
    def mesh_sizes(self) -> dict[str, int]:
        """`mesh` as a dict: "data=4,fsdp=2" is {"data": 4, "fsdp": 2}; empty for the default."""
        sizes: dict[str, int] = {}
        for part in self.mesh.split(",") if self.mesh.strip() else ():
            axis, _, count = (word.strip() for word in part.partition("="))
            good = axis in MESH_AXES and axis not in sizes and count.isdecimal() and int(count) > 0
            require(good, f"mesh={self.mesh!r}: expected {MESH_AXES[0]}=N and the like, of {', '.join(MESH_AXES)}")
            sizes[axis] = int(count)
        return sizes


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and how it becomes rows."""

    data: str = "HuggingFaceTB/smollm-corpus:cosmopedia-v2"
    """OWNER/NAME:CONFIG, a .jsonl/.parquet/.txt file or glob, or builtin:python-docs; A=0.7,B=0.3 mixes."""
    split: str = "train"
    """Split of a Hub dataset."""
    text_column: str = "text"
    """Column that holds the text."""
    tokenizer: str = "HuggingFaceTB/SmolLM2-135M"
    """Hub id, folder, or train:VOCAB for a byte-level BPE trained on the head of the data."""
    seq_len: int = 2_048
    """Tokens a row."""
    shuffle_window: int = 1_024
    """Documents shuffled together; 1: the order of the source."""
    shards: int = 1
    """Streams that the rows of a batch come from, each with its part of the data; a process reads only its own."""
    epochs: int = 0
    """Passes over a finite source, each shuffled anew; 0: for as long as the run lasts."""
    eval_data: str | None = None
    """Held-out source; without it documents are held out of the training source."""
    eval_documents: int = 200
    """Documents held out; 0: none."""
    eval_batches: int = 16
    """Batches an evaluation reads at most."""
    on_bad_data: Literal["stop", "skip"] = "stop"
    """A row that cannot be read stops the run, or is skipped and counted."""
    data_timeout: float = 600.0
    """Seconds to wait for a source that does not answer before saving and leaving with exit code 75."""

    def __post_init__(self) -> None:
        require_finite(self)
        for name in ("seq_len", "shuffle_window", "shards", "eval_batches"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1")
        for name in ("epochs", "eval_documents"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must be 0 or more")
        require(
            self.eval_data is None or self.eval_documents > 0,
            f"eval_data={self.eval_data} is read, so eval_documents=0 must be above 0",
        )
        require(self.data_timeout > 0, f"data_timeout={self.data_timeout} must be above 0 seconds")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    learning_rate: float = 6e-4
    """Peak."""
    schedule: Schedule = "linear"
    """After the warm-up: linear or cosine decay to the end, constant, or stable then linear decay."""
    warmup_steps: int | None = None
    """Linear warm-up; default: the recipe's, at most a tenth of the steps."""
    decay_steps: int | None = None
    """Length of the decay of `wsd`; default: a fifth of the steps."""
    final_learning_rate: float = 0.0
    """Where a decay ends."""
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.01
    """Decoupled; norm weights are exempt."""
    clip_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down."""
    max_bad_steps: int = 10
    """Steps in a row without finite gradients (they change nothing) after which the run stops."""

    def __post_init__(self) -> None:
        require_finite(self)
        for name in ("learning_rate", "epsilon", "clip_norm", "max_bad_steps"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be above 0")
        for name in ("warmup_steps", "decay_steps", "weight_decay", "final_learning_rate"):
            require((getattr(self, name) or 0) >= 0, f"{name}={getattr(self, name)} must be 0 or more")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"{name}={getattr(self, name)} must lie in [0, 1)")
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
    """How long, how large, where to, and what is shown and kept."""

    run_dir: str | None = None
    """Run folder; default: runs/RECIPE."""
    new_run: bool = False
    """Start afresh: an existing run folder is moved aside, not deleted."""
    init_from: str | None = None
    """Weights to start from: a run, an exported folder or a Hub id."""
    phases: str = "5000x32,50x8"
    """Steps x sequences a step, one after the other under one schedule."""
    steps: int | None = None
    """Length of the run and of its schedule; default: that of the phases."""
    batch_size: int | None = None
    """Sequences a step, of the longest phase; smaller phases stay smaller."""
    stop_after: int | None = None
    """Stop, saved, after this step; the schedule stays, the same command without it goes on."""
    seed: int = 0
    log_every: int = 10
    """Steps between reports."""
    eval_every: int = 500
    """Steps between evaluations, one more at the end; 0: never."""
    checkpoint_every: int = 500
    """Steps between checkpoints, one more at the end; 0: only at the end."""
    keep_last: int = 3
    """Newest checkpoints kept."""
    keep_every: int = 0
    """Checkpoints of every so-manieth step kept for good; 0: none."""
    sample_prompts: tuple[str, ...] = (
        "Once upon a time",
        "Photosynthesis is the process by which",
        "The first step to learn how to cook is",
    )
    """Prompts continued at each evaluation."""
    sample_tokens: int = 64
    """Tokens a sample; 0: no samples."""
    export: bool = True
    """Write RUN/export at the end."""

    def __post_init__(self) -> None:
        require_finite(self)
        for name in ("steps", "batch_size", "stop_after", "log_every", "keep_last"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name}={value} must be at least 1")
        for name in ("eval_every", "checkpoint_every", "keep_every", "sample_tokens", "seed"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must be 0 or more")
        require(self.seed < 2**32, f"seed={self.seed} must be below 2**32")
        require(all(map(str.strip, self.sample_prompts)), "sample_prompts: every prompt must have text")
        parse_phases(self.phases)


@dataclass(frozen=True, kw_only=True)
class Phase:
    steps: int
    batch_size: int


def parse_phases(text: str) -> tuple[Phase, ...]:
    """`"5000x32,50x8"` as phases; raises `ValueError` on anything else."""
    phases = []
    for part in text.split(","):
        steps, _, batch_size = part.strip().partition("x")
        require(
            steps.isdecimal() and batch_size.isdecimal() and int(steps) > 0 and int(batch_size) > 0,
            f"phases={text!r} must read STEPSxBATCH,STEPSxBATCH such as 5000x32,50x8",
        )
        phases.append(Phase(steps=int(steps), batch_size=int(batch_size)))
    return tuple(phases)


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run."""

    recipe: str = "replica"
    """replica: the seed's run. smollm2: the published recipe. quickstart: no download, minutes on a CPU."""
    preset: str = "135M"
    """Architecture: 135M, 360M, 1.7B, quickstart; single numbers by the flags under `model`."""
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    model: ModelConfig = field(default_factory=ModelConfig)

    def __post_init__(self) -> None:
        require_finite(self)
        require(self.recipe in WARMUP_STEPS, f"recipe={self.recipe} must be one of {', '.join(WARMUP_STEPS)}")
        require(self.preset in MODELS, f"preset={self.preset} must be one of {', '.join(MODELS)}")
        micro, warmup = self.compute.grad_accum, self.optimizer.warmup_steps
        require(self.total_steps < 2**31, f"steps={self.total_steps} must be below 2**31")
        for phase in self.phases:
            require(
                phase.batch_size % micro == 0,
                f"grad_accum={micro} must divide the batch size {phase.batch_size} of every phase",
            )
        require(
            warmup is None or warmup < self.total_steps,
            f"warmup_steps={warmup} must be below the {self.total_steps} steps of the run; "
            "leave --warmup-steps out to have the recipe's fitted",
        )
        require(
            self.warmup_steps + self.decay_steps <= self.total_steps,
            f"warmup_steps={self.warmup_steps} and decay_steps={self.decay_steps} together must not "
            f"exceed the {self.total_steps} steps of the run",
        )
        for phase in self.phases:
            require(
                phase.batch_size % self.data.shards == 0,
                f"shards={self.data.shards} must divide every batch size; {phase.batch_size} came",
            )
        require(
            self.data.seq_len <= self.model.max_seq_len,
            f"seq_len={self.data.seq_len} must not exceed the model's max_seq_len={self.model.max_seq_len}",
        )

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The recipe's phases under `--steps` (cut at the end, or the longest made longer) and `--batch-size`."""
        phases = list(parse_phases(self.run.phases))
        main = max(range(len(phases)), key=lambda i: phases[i].steps)
        if self.run.batch_size is not None:
            for i, phase in enumerate(phases):
                batch_size = self.run.batch_size if i == main else min(phase.batch_size, self.run.batch_size)
                phases[i] = replace(phase, batch_size=batch_size)
        if self.run.steps is None:
            return tuple(phases)
        total = sum(phase.steps for phase in phases)
        if self.run.steps >= total:
            phases[main] = replace(phases[main], steps=phases[main].steps + self.run.steps - total)
            return tuple(phases)
        kept, left = [], self.run.steps
        for phase in phases:
            if left > 0:
                kept.append(replace(phase, steps=min(phase.steps, left)))
            left -= phase.steps
        return tuple(kept)

    @property
    def total_steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    @property
    def main_batch_size(self) -> int:
        """Sequences a step of the longest phase; evaluations use it too."""
        return max(self.phases, key=lambda phase: phase.steps).batch_size

    def batch_size_at(self, step: int) -> int:
        """Sequences of update `step`, counted from 1."""
        for phase in self.phases:
            if step <= phase.steps:
                return phase.batch_size
            step -= phase.steps
        raise ValueError(f"step lies {step} past the end of the run")

    @property
    def warmup_steps(self) -> int:
        if self.optimizer.warmup_steps is not None:
            return self.optimizer.warmup_steps
        return min(WARMUP_STEPS[self.recipe], self.total_steps // WARMUP_SHARE)

    @property
    def decay_steps(self) -> int:
        """Updates of the decay: the rest of the run, but for `wsd` and `constant`."""
        if self.optimizer.schedule == "constant":
            return 0
        if self.optimizer.schedule == "wsd":
            given = self.optimizer.decay_steps
            return self.total_steps // DECAY_SHARE if given is None else given
        return self.total_steps - self.warmup_steps

    @property
    def run_dir(self) -> str:
        return self.run.run_dir or f"runs/{self.recipe}"
