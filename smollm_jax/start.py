"""Everything before the first step: the run folder, the data, the devices, and what the run starts from.

In the order in which a mistake is cheapest to find: settings against the run folder, tokenizer, data,
compile, weights. The outcome is a `Run`, which the loop in train.py moves forward.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

from smollm_jax.checkpoint import Checkpoints
from smollm_jax.config import Config, require
from smollm_jax.config_file import as_dict
from smollm_jax.data import HeldOut, Stream, check_vocab, head_texts, heldout, open_stream
from smollm_jax.generation import Generator
from smollm_jax.hardware import compute_dtype, memory_bytes, use_precision_of
from smollm_jax.introduction import introduce
from smollm_jax.inventory import Found
from smollm_jax.kernels import choose_checked
from smollm_jax.model import Policy
from smollm_jax.origin import Origin, find_origin
from smollm_jax.processes import Processes
from smollm_jax.report import Report, Silence, say
from smollm_jax.resume import Records, keep_records
from smollm_jax.run_folder import Damaged, RunLock, read_json, write_json_atomic
from smollm_jax.sharding import by_row, bytes_a_device, layout_of, make_mesh, on_devices, padded_rows, shards_here
from smollm_jax.step import (
    abstract_state,
    compile_steps,
    compiled_bytes,
    init_state,
    make_nll,
)
from smollm_jax.stop import StopRequest
from smollm_jax.tokenizer import Tokenizer, load_tokenizer

# documents from the head of the data that a `train:VOCAB` tokenizer is trained on
TOKENIZER_DOCUMENTS = 20_000


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
    stream: Stream
    heldout: HeldOut | None
    mesh: jax.sharding.Mesh
    dtype: Any
    steps: dict[int, jax.stages.Compiled]
    nll: Callable[..., jax.Array]
    checkpoints: Checkpoints
    state: dict[str, Any]
    report: Report | Silence
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


def claim(config: Config, processes: Processes) -> Claimed:
    """Take the run folder and its lock, until the stack is closed, whose context is the folder.

    --new-run moves an old folder aside first. Of several processes the first has the lock, for all. Raises
    `ValueError` when the folder is in use.
    """
    run_dir, stack = Path(config.run_dir), Claimed(Path(config.run_dir))
    if not processes.first:
        return stack
    if config.run.new_run and (run_dir / "config.json").exists():
        with RunLock(run_dir):
            aside = next(p for n in range(1, 10_000) if not (p := Path(f"{run_dir}.old{n}")).exists())
            run_dir.rename(aside)
        say(f"moved the old run to {aside}")
    stack.enter_context(RunLock(run_dir))
    return stack


class Claimed(ExitStack):
    """A run folder held; entered, it gives the folder."""

    def __init__(self, run_dir: Path):
        super().__init__()
        self.run_dir = run_dir

    def __enter__(self) -> Path:  # type: ignore[override]
        return self.run_dir


def begin(config: Config, run_dir: Path, stop: StopRequest, processes: Processes) -> Run:
    """Build or restore the run, and say what it will do."""
    began = time.monotonic()
    logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
    checkpoints = Checkpoints(
        run_dir / "checkpoints",
        keep_last=config.run.keep_last,
        keep_every=config.run.keep_every,
        processes=processes,
    )
    if processes.first:
        clean(run_dir, checkpoints)
    origin, tokenizer = processes.in_turn(lambda: known(config, run_dir, checkpoints, processes))
    config, found = with_ids_of(origin.config, tokenizer), origin.checkpoint
    use_compilation_cache(config)
    mesh, dtype = make_mesh(config), compute_dtype(config.compute.dtype, jax.default_backend())
    held_out, stream = processes.together(lambda: open_data(config, tokenizer, found, mesh))
    processes.require_same(stream.fixed, "the files of --data, or what is held out of them,")
    if processes.first:
        keep_config(config, run_dir)
    use_precision_of(dtype)
    computed = {"dtype": dtype.name, "platform": jax.default_backend(), "devices": int(mesh.size)}
    chosen, remarks = with_attention(config, mesh, dtype, processes)
    checkpoints.prepare(abstract_state(config, mesh))  # while the compiler is at work
    steps, remat, warnings = compile_within(chosen, mesh, dtype, checkpoints)
    notes = [*origin.notes, *check_computed(found, computed), *remarks, *warnings]
    nll, progress, start = make_scorer(chosen, mesh, dtype), Progress(), 0
    if found is None:
        state = init_state(config, mesh, origin.weights[0] if origin.weights else None)
    else:
        state = checkpoints.restore(found.step, abstract_state(config, mesh))
        progress, start = Progress(**found.meta["progress"]), found.step
    records = keep_records(run_dir, start) if processes.first else Records(0, {})
    evaluated = processes.gather(records.evaluated)[0]
    report = Report(run_dir, start=start, total=config.total_steps) if processes.first else Silence()
    run = Run(
        config, run_dir, stop, tokenizer, stream, held_out, mesh, dtype, steps, nll, checkpoints, state, report,
        progress, start, start, start, evaluated, records.ledgers, computed, processes,
        kernels=False if chosen.compute.attention == "plain" else None,
    )  # fmt: skip
    checkpoints.newest = start
    # one of several cannot leave by itself
    stop.nothing_to_lose = lambda: not processes.several and checkpoints.newest == run.progress.step
    introduce(run, notes, remat=remat, seconds=time.monotonic() - began)
    return run


def with_attention(
    config: Config, mesh: jax.sharding.Mesh, dtype: Any, processes: Processes
) -> tuple[Config, list[str]]:
    """The config with the attention kernel that has passed its check in all processes, and notes on it."""
    attention, remarks = processes.together(
        lambda: choose_checked(config.compute.attention, mesh, config.model, dtype)
    )
    if len(set(processes.gather(attention))) > 1:
        attention, remarks = "plain", ["attention   plain: the kernel's check did not go alike in all processes"]
    return replace(config, compute=replace(config.compute, attention=attention)), remarks


def compile_within(
    config: Config, mesh: jax.sharding.Mesh, dtype: Any, checkpoints: Checkpoints
) -> tuple[dict[int, jax.stages.Compiled], Policy, list[str]]:
    """The steps, their remat policy by the memory there is, and a note where that may not do."""
    gather, here = checkpoints.processes.gather, mesh.local_mesh.devices
    memory = min(gather(memory_bytes(here.flat[0], config.model.num_parameters, devices=here.size)))
    steps, remat = compile_steps(
        config, mesh, dtype=dtype, memory_bytes=memory, agree=lambda fits: all(gather(fits))
    )
    needed = max(gather(compiled_bytes(steps[max(steps)])))
    # on a CPU what a save takes is not among what the step may have
    copied = 0 if here.flat[0].platform == "cpu" else bytes_a_device(abstract_state(config, mesh))
    checkpoints.beside_the_step = needed + copied <= memory
    if needed <= memory:
        return steps, remat, []
    note = (
        f"MEMORY      the step needs {needed / 2**30:.1f} GiB a device, {memory / 2**30:.1f} can be counted on: "
        "the system may end the run for it; --grad-accum 2 or more, or a smaller --batch-size, needs less"
    )
    return steps, remat, [note]


def make_scorer(config: Config, mesh: jax.sharding.Mesh, dtype: Any) -> Callable[..., jax.Array]:
    """`nll(params, tokens, segment_ids)` of rows that all processes have."""
    rows = by_row(mesh)
    layout = layout_of(abstract_state(config, mesh)["params"])
    compiled = jax.jit(make_nll(config, mesh, dtype=dtype, remat="none"), in_shardings=(layout, rows, rows))

    def nll(params: Any, *arrays: np.ndarray) -> jax.Array:
        return compiled(params, *(on_devices(x, padded_rows(len(x), mesh), 0, mesh) for x in arrays))

    return nll


def clean(run_dir: Path, checkpoints: Checkpoints) -> None:
    """Remove what dead processes left half written."""
    checkpoints.clean()
    for left_over in run_dir.glob(".export.*"):
        shutil.rmtree(left_over, ignore_errors=True)


def known(
    config: Config, run_dir: Path, checkpoints: Checkpoints, processes: Processes
) -> tuple[Origin, Tokenizer]:
    """What the run starts from, and its tokenizer, from then on in the run folder."""
    origin = find_origin(config, run_dir, checkpoints)
    return origin, prepare_tokenizer(origin, run_dir, in_place=not processes.first)


def open_data(
    config: Config, tokenizer: Tokenizer, found: Found | None, mesh: jax.sharding.Mesh
) -> tuple[HeldOut | None, Stream]:
    """What is held out, and the stream of what is not, or of the rows that this process has devices for."""
    held_out = None
    if config.data.eval_documents:
        held_out = heldout(config.data, tokenizer, resumes=found is not None)
    check_prompts(config, tokenizer)
    stream = open_stream(
        config.data,
        tokenizer,
        seed=config.run.seed,
        batch_size_at=config.batch_size_at,
        steps=config.total_steps,
        cursor=found.meta["cursor"] if found else None,
        excluded=held_out.hashes if held_out else frozenset(),
        shards=shards_here(mesh, config),
    )
    return held_out, stream


def check_computed(found: Found | None, computed: dict[str, Any]) -> list[str]:
    """Notes on what computes now and what did before; raises `ValueError` for another dtype."""
    before = found.meta.get("computed", computed) if found else computed
    require(
        before["dtype"] == computed["dtype"],
        f"the run computed in {before['dtype']}, and would go on in {computed['dtype']}; "
        f"give --dtype {before['dtype']}, or start afresh with --new-run",
    )
    return [
        f"{name} changed from {before[name]} to {now}: same maths, the last bits will differ"
        for name, now in computed.items()
        if before[name] != now
    ]


def check_prompts(config: Config, tokenizer: Tokenizer) -> None:
    """Raise `ValueError` for a sample prompt that leaves no room in the context: now, not at an evaluation."""
    for prompt in config.run.sample_prompts if config.run.sample_tokens else ():
        length = len(tokenizer.encode(prompt))
        require(
            0 < length < config.model.max_seq_len,
            f"--sample-prompts {prompt[:40]!r} has {length} tokens; 1 to {config.model.max_seq_len - 1} fit",
        )


def keep_config(config: Config, run_dir: Path) -> None:
    """Write config.json unless it says just that."""
    path = run_dir / "config.json"
    try:
        if read_json(path) == as_dict(config):
            return
    except Damaged:
        pass
    write_json_atomic(path, as_dict(config))


def prepare_tokenizer(origin: Origin, run_dir: Path, *, in_place: bool) -> Tokenizer:
    """The run's own tokenizer when it resumes or another process has put it there, else that of the weights or
    the one asked for, kept in the run.
    """
    folder, config = run_dir / "tokenizer", origin.config
    if origin.checkpoint is not None or in_place:
        require((folder / "tokenizer.json").exists(), f"{folder} is missing; the run was tokenised with it")
        tokenizer = load_tokenizer(str(folder))
    else:
        tokenizer = _asked_for(origin)
        tokenizer.save(folder)
    check_vocab(tokenizer, config.model.vocab_size)
    return tokenizer


def _asked_for(origin: Origin) -> Tokenizer:
    name, run = origin.config.data.tokenizer, origin.config.run
    theirs = origin.weights[1] if origin.weights else None
    if theirs is not None and name == run.init_from:
        return theirs
    documents = islice(head_texts(origin.config.data), TOKENIZER_DOCUMENTS) if name.startswith("train:") else None
    tokenizer = load_tokenizer(name, documents=documents)
    if theirs is not None and tokenizer.fingerprint != theirs.fingerprint:
        origin.notes.append(f"tokenizer {name} is not the one that the weights of {run.init_from} learned with")
    return tokenizer


def with_ids_of(config: Config, tokenizer: Tokenizer) -> Config:
    """The config whose model ends a text with the tokenizer's own eos."""
    return replace(config, model=replace(config.model, eos_token_id=tokenizer.eos_id))


def use_compilation_cache(config: Config) -> None:
    if config.compute.compilation_cache_dir:
        folder = os.path.expanduser(config.compute.compilation_cache_dir)
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
