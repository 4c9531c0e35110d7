"""Define every setting of the project in frozen dataclasses, checked when made.

The text beside or below a field is its help. A number has one home: the default of its field, or the recipe or
preset that differs from it. This module imports nothing heavy, so that `--help` answers at once.
"""

from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

from smollm_jax.config.adapters import AdapterConfig
from smollm_jax.config.architecture import MODELS, ModelConfig
from smollm_jax.config.fields import check_fields, setting
from smollm_jax.config.optimizer import OptimizerConfig
from smollm_jax.config.phases import SFT_RATES, WARMUP_STEPS, Phase, check_extend, parse_phases, resize, up_to
from smollm_jax.config.preference import PreferenceConfig
from smollm_jax.runtime.errors import require
from smollm_jax.runtime.files import expand_home

RUNS = "runs"  # the folder of runs without --run-dir
MESH_AXES = ("data", "fsdp", "tensor")
CONTEXT = ("rope_theta", "max_seq_len")  # of the architecture, what longer rows change
PROMPTS = ("Once upon a time", "Photosynthesis is the process by which", "The first step to learn how to cook is")

AttentionName = Literal["auto", "plain", "splash", "pallas"]


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How the result is computed. Only `dtype` changes it by more than rounding."""

    mesh: str = setting("", resume="same maths")
    """Devices per mesh axis, such as data=4,fsdp=2,tensor=1 (empty: all devices on data)."""
    # free: the dtype that auto resolves to is compared at the start, by training.setup.check_computed
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting("auto", resume="free")
    """Compute dtype over float32 parameters. auto: float32 on a CPU, float16 on T4 and V100, else bfloat16."""
    remat: Literal["auto", "none", "dots", "full"] = setting("auto", resume="same maths")
    """What the backward pass recomputes. none: cheap ops; dots: all but matmuls; full: all; auto: by memory."""
    attention: AttentionName = setting("auto", resume="same maths")
    """Kernel. plain: the reference; splash: TPU; pallas: GPU; auto: the best that agrees with plain at start."""
    coordinator: str | None = setting(None, resume="free")
    """HOST:PORT of the first process, if no launcher tells it. Give each process its number too."""
    num_processes: int | None = setting(None, resume="free")
    process_id: int | None = setting(None, resume="free")
    """Number of this process, counted from 0, with --coordinator."""
    unroll: int = setting(0, "at least 1, or 0 for the default", resume="same maths")
    """Layers per iteration of the scan over layers (0: all on a GPU with its kernels and remat none, else 1)."""
    loss_chunk: int = setting(0, "at least 1, or 0 for the default", resume="same maths")
    """Tokens whose logits exist at once (0: 1,024, or 8,192 on a GPU with its kernels unless remat is full)."""
    grad_accum: int = setting(1, "at least 1", resume="same maths")
    """Microbatches per step. The gradient equals the gradient of the whole batch."""
    compilation_cache_dir: str = setting("~/.cache/smollm_jax", resume="free")
    """Folder that keeps compiled programs between runs (empty: keep none)."""

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
        """Return `unroll` or its default. `on_gpu` means a GPU with its kernels, whose loop copies residuals."""
        return self.unroll or (layers if on_gpu and remat == "none" else 1)

    def loss_chunk_for(self, remat: str, *, on_gpu: bool) -> int:
        """Return `loss_chunk` or its default. Per chunk a GPU rewrites the head's gradient."""
        return self.loss_chunk or (8_192 if on_gpu and remat != "full" else 1_024)

    @property
    def mesh_sizes(self) -> dict[str, int]:
        """Return `mesh` as a dict: "data=4,fsdp=2" is {"data": 4, "fsdp": 2}. Empty for the default."""
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

    data_kind: Literal["text", "chat", "pairs"] = "text"
    """text: every document is trained on; chat: also messages, conversations or prompt and completion; pairs:
    chosen and rejected."""
    data: str = "HuggingFaceTB/smollm-corpus:cosmopedia-v2"
    """OWNER/NAME:CONFIG, a .jsonl/.parquet/.txt file, folder or glob, builtin:python-docs. A=0.7,B=0.3 mixes."""
    split: str = "train"  # Split of a Hub dataset.
    text_column: str = "text"  # Column that holds the text.
    tokenizer: str = "HuggingFaceTB/SmolLM2-135M"
    """Hub id, folder, or train:VOCAB to train a byte-level BPE on the data's start (:chat adds ChatML's)."""
    special_tokens: Literal["text", "parse"] = "text"
    """Special tokens that a text spells out. text: they stay text; parse: they become ids, as in transformers."""
    loss_on: Literal["assistant", "all"] = "assistant"
    """What counts in the loss of a conversation. all: also the user's words and the template's."""
    chat_template: str = "auto"
    """Of conversations. auto: the tokenizer's, else chatml; chatml; or a file with a Jinja template."""
    seq_len: int = setting(2_048, "at least 1")  # Tokens per sequence.
    shuffle_window: int = setting(1_024, "at least 1")  # Documents shuffled together (1: source order).
    shards: int = setting(1, "at least 1")
    """Streams that fill a batch, each with its shard of the data. A process reads only its own."""
    epochs: int = setting(0, "0 or more")
    """Passes over a finite source, each shuffled anew (0: for as long as the run lasts)."""
    eval_data: str | None = None
    """Held-out source. Default: documents of the training source, which training then skips."""
    eval_documents: int = setting(200, "0 or more")
    """Documents held out (0: none). Of a source of fewer than ten, the end of the last one is held out."""
    eval_batches: int = setting(16, "at least 1")  # Maximum number of batches per evaluation.
    on_bad_data: Literal["stop", "skip"] = setting("stop", resume="free")
    """What to do with a row that cannot be read: stop the run, or skip and count it."""
    data_timeout: float = setting(600.0, "above 0", resume="free")
    """Seconds to wait for a silent source before the run saves and exits with code 75."""

    def __post_init__(self) -> None:
        check_fields(self)
        unread = self.eval_data is not None and not self.eval_documents
        require(not unread, f"eval_data={self.eval_data} is read, so eval_documents=0 must be above 0")
        for name, kinds in (("loss_on", ("chat",)), ("chat_template", ("chat", "pairs"))):
            value = getattr(self, name)
            fits = self.data_kind in kinds or value == getattr(DataConfig, name)
            require(fits, f"{name}={value} is for conversations: give --data-kind chat, or --recipe sft")

    @property
    def is_chat(self) -> bool:
        """Return whether rows hold whole conversations, as `is_pairs` data does too."""
        return self.data_kind != "text"

    @property
    def is_pairs(self) -> bool:
        return self.data_kind == "pairs"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How long, how large and where a run is, and what it shows and keeps."""

    run_dir: str | None = setting(None, resume="free")  # Run folder. Default: runs/RECIPE.
    new_run: bool = setting(False, resume="free")
    """Start afresh: an existing run folder is moved aside, not deleted."""
    init_from: str | None = None  # Weights to start from: a run, an exported folder or a Hub id.
    own_context: tuple[str, ...] = setting((), resume="free")
    """What holds over these weights' own value: rope_theta, max_seq_len. The flags of these names add them."""
    phases: str = setting("5000x32,50x8", resume="schedule")
    """Phases as STEPSxBATCH, one after the other under one schedule."""
    steps: int | None = setting(None, "at least 1", resume="schedule")
    """Length of the run and of its schedule. Default: the sum of the phases."""
    batch_size: int | None = setting(None, "at least 1", resume="schedule")
    """Sequences per step in the longest phase. Phases with smaller batches keep theirs."""
    extend: int = setting(0, "0 or more", resume="schedule")
    """Steps after the run's own end, with its last batch size: of constant, or of wsd before its decay."""
    stop_after: int | None = setting(None, "at least 1", resume="free")
    """Save and stop after this step. The schedule stays: the same command without the flag continues."""
    seed: int = setting(0, "0 or more")  # Seed of the initial weights, the shuffling and the samples.
    # free: what a run began with stays on record, by training.restore
    scale_residual_init: bool = setting(False, resume="free")
    """Begin with the outputs of attention and feed-forward divided by sqrt(2 layers), as nanotron does."""
    log_every: int = setting(10, "at least 1", resume="free")  # Steps between reports.
    eval_every: int = setting(500, "0 or more", resume="free")
    """Steps between evaluations, with one more at the end (0: never)."""
    eval_on_start: bool = setting(False, resume="free")  # Evaluate before step 1, too, unless --eval-every is 0.
    checkpoint_every: int = setting(500, "0 or more", resume="free")
    """Steps between checkpoints, with one more before a decay and at the end (0: only at the end)."""
    keep_last: int = setting(3, "at least 1", resume="free")  # Newest checkpoints kept.
    keep_every: int = setting(0, "0 or more", resume="free")
    """Keep the checkpoint of every Nth step permanently (0: none)."""
    sample_prompts: tuple[str, ...] = setting(PROMPTS, resume="free")  # Prompts continued at each evaluation.
    sample_tokens: int = setting(64, "0 or more", resume="free")  # Tokens per sample (0: no samples).
    report_to: str = setting("tensorboard", resume="free")  # Trackers: tensorboard, trackio, wandb, by commas.
    eval_tasks: str = setting("", resume="free")
    """Tasks scored at each evaluation: names of lm_eval or YAML files, by commas. Needs the extra eval."""
    eval_task_limit: int = setting(200, "0 or more", resume="free")  # Documents per task (0: all).
    export: bool = setting(True, resume="free")  # Write a Hugging Face folder to RUN/export at the end.

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.seed < 2**32, f"seed={self.seed} must be below 2**32")
        require(all(map(str.strip, self.sample_prompts)), "sample_prompts: every prompt must have text")
        parse_phases(self.phases)
        named = set(self.own_context) <= {*CONTEXT}
        require(named, f"own_context={' '.join(self.own_context)} must be of {', '.join(CONTEXT)}")
        require(not self.eval_tasks or self.eval_every > 0, "eval_tasks need evaluations: eval_every above 0")


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run."""

    recipe: str = setting("replica", resume="free")
    """replica: the seed's run. smollm2: the published recipe. fast: Muon. quickstart: minutes on a CPU. sft:
    conversations. dpo: pairs of answers."""
    preset: str = setting("135M", resume="free")
    """Architecture: 135M, 360M, 1.7B or quickstart. The flags under `model` change single numbers."""
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)

    def __post_init__(self) -> None:
        require(self.recipe in WARMUP_STEPS, f"recipe={self.recipe} must be one of {', '.join(WARMUP_STEPS)}")
        require(self.preset in MODELS, f"preset={self.preset} must be one of {', '.join(MODELS)}")
        has_base = self.run.init_from is not None or not self.adapter.is_on
        require(has_base, f"lora_rank={self.adapter.lora_rank} needs the weights of a base: give --init-from")
        fits = self.optimizer.optimizer == "adamw" or not self.adapter.is_on
        require(fits, "optimizer=muon is for whole matrices; adapters train with adamw: give --optimizer adamw")
        fits = self.optimizer.z_loss == 0 or not self.data.is_pairs
        require(fits, f"z_loss={self.optimizer.z_loss} is for text and conversations, not for pairs")
        changed = ", ".join(f"{name}={value}" for name, value in vars(self.preference).items())
        used = self.data.is_pairs or self.preference == PreferenceConfig()
        require(used, f"{changed}: these are for pairs, so give --data-kind pairs, or --recipe dpo")
        steps, warmup, decay = self.total_steps, self.warmup_steps, self.decay_steps
        check_extend(self.run.extend, self.optimizer.schedule)
        require(steps < 2**31, f"steps={steps} must be below 2**31")
        for size in (phase.batch_size for phase in self.phases):
            for name, parts in (("grad_accum", self.compute.grad_accum), ("shards", self.data.shards)):
                require(size % parts == 0, f"{name}={parts} must divide the batch size {size} of every phase")
        require(
            warmup < steps or self.optimizer.warmup_steps is None,
            f"warmup_steps={warmup} must be below the {steps} steps of the run; leave it out to have it fitted",
        )
        require(
            warmup + decay <= steps,
            f"warmup_steps={warmup} and decay_steps={decay} together must not exceed the {steps} steps of the run",
        )
        length, longest = self.data.seq_len, self.model.max_seq_len
        require(length <= longest, f"seq_len={length} must not exceed the model's max_seq_len={longest}")

    @property
    def own_phases(self) -> tuple[Phase, ...]:
        """Return the recipe's phases, resized by --steps and --batch-size."""
        return resize(parse_phases(self.run.phases), self.run.steps, self.run.batch_size)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Return the run's own phases, the last one extended by --extend."""
        return up_to(self.own_phases, self.own_steps + self.run.extend)

    @property
    def own_steps(self) -> int:
        """Return the steps without --extend, by which warm-up and decay are fitted."""
        return sum(phase.steps for phase in self.own_phases)

    @property
    def total_steps(self) -> int:
        return self.own_steps + self.run.extend

    @property
    def main_batch_size(self) -> int:
        """Return the sequences per step in the longest phase. Evaluations use the same number."""
        return max(self.own_phases, key=lambda phase: phase.steps).batch_size

    def batch_size_at(self, step: int) -> int:
        """Return the sequences of update `step`, counted from 1."""
        ends = list(accumulate(phase.steps for phase in self.phases))
        return self.phases[bisect_left(ends, step)].batch_size

    @property
    def warmup_steps(self) -> int:
        given = self.optimizer.warmup_steps
        return min(WARMUP_STEPS[self.recipe], self.own_steps // 10) if given is None else given

    @property
    def learning_rate(self) -> float:
        """Return the peak learning rate: the given one, or the published one of the model's size."""
        given = self.optimizer.learning_rate
        by_size = next(rate for size, rate in SFT_RATES if self.model.num_parameters < size)
        return by_size if given is None else given

    @property
    def decay_steps(self) -> int:
        """Return the updates of the decay: the rest of the run for `linear` and `cosine`."""
        schedule, given = self.optimizer.schedule, self.optimizer.decay_steps
        if schedule == "wsd":  # a fifth, as 400,000 of SmolLM2's 2,000,000 steps
            return self.own_steps // 5 if given is None else given
        return 0 if schedule == "constant" else self.total_steps - self.warmup_steps

    @property
    def decay_start(self) -> int | None:
        """Return the last step before the decay of `wsd`, whose checkpoint is kept. None for other schedules."""
        is_stable = self.optimizer.schedule == "wsd" and self.decay_steps > 0
        return self.total_steps - self.decay_steps if is_stable else None

    @property
    def run_dir(self) -> str:
        return str(expand_home(self.run.run_dir or f"{RUNS}/{self.recipe}"))
