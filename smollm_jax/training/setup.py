"""Everything before the first step: the run folder, the data, the devices, and what the run starts from.

In the order in which a mistake is cheapest to find: settings against the run folder, tokenizer, data,
compile, weights. The outcome is a `Run`, which the loop in train.py moves forward.
"""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import jax

from smollm_jax.checkpoint.listing import VerifiedCheckpoint
from smollm_jax.checkpoint.manager import CheckpointManager
from smollm_jax.config.serialization import to_dict
from smollm_jax.config.settings import Config
from smollm_jax.data.heldout import HeldOut, head_texts, heldout
from smollm_jax.data.loader import PrefetchLoader, check_vocab, open_stream
from smollm_jax.distributed.processes import Processes
from smollm_jax.distributed.sharding import make_mesh, shards_here
from smollm_jax.runs.metrics import NullMetrics, Records, RunMetrics, keep_records
from smollm_jax.runtime.devices import compute_dtype, use_compilation_cache, use_precision_of
from smollm_jax.runtime.errors import require
from smollm_jax.runtime.files import Damaged, read_json, write_json_atomic
from smollm_jax.runtime.signals import StopRequest
from smollm_jax.tokenizer.tokenizer import Tokenizer, load_tokenizer
from smollm_jax.training.compile import compile_within, make_scorer, with_attention
from smollm_jax.training.restore import StartState, find_start
from smollm_jax.training.run import Progress, Run
from smollm_jax.training.step import abstract_state, init_state
from smollm_jax.training.summary import log_summary

# documents from the head of the data that a `train:VOCAB` tokenizer is trained on
TOKENIZER_DOCUMENTS = 20_000


def begin(config: Config, run_dir: Path, stop: StopRequest, processes: Processes) -> Run:
    """Build or restore the run, and say what it will do."""
    began = time.monotonic()
    logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
    checkpoints = CheckpointManager(
        run_dir / "checkpoints",
        keep_last=config.run.keep_last,
        keep_every=config.run.keep_every,
        processes=processes,
    )
    if processes.first:
        clean(run_dir, checkpoints)
    origin, tokenizer = processes.in_turn(lambda: known(config, run_dir, checkpoints, processes))
    config, found = with_ids_of(origin.config, tokenizer), origin.checkpoint
    use_compilation_cache(config.compute.compilation_cache_dir)
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
    report = RunMetrics(run_dir, start=start, total=config.total_steps) if processes.first else NullMetrics()
    run = Run(
        config, run_dir, stop, tokenizer, stream, held_out, mesh, dtype, steps, nll, checkpoints, state, report,
        progress, start, start, start, evaluated, records.ledgers, computed, processes,
        kernels=False if chosen.compute.attention == "plain" else None,
    )  # fmt: skip
    checkpoints.newest = start
    # one of several cannot leave by itself
    stop.nothing_to_lose = lambda: not processes.several and checkpoints.newest == run.progress.step
    log_summary(run, notes, remat=remat, seconds=time.monotonic() - began)
    return run


def clean(run_dir: Path, checkpoints: CheckpointManager) -> None:
    """Remove what dead processes left half written."""
    checkpoints.clean()
    for left_over in run_dir.glob(".export.*"):
        shutil.rmtree(left_over, ignore_errors=True)


def known(
    config: Config, run_dir: Path, checkpoints: CheckpointManager, processes: Processes
) -> tuple[StartState, Tokenizer]:
    """What the run starts from, and its tokenizer, from then on in the run folder."""
    origin = find_start(config, run_dir, checkpoints)
    return origin, prepare_tokenizer(origin, run_dir, in_place=not processes.first)


def open_data(
    config: Config, tokenizer: Tokenizer, found: VerifiedCheckpoint | None, mesh: jax.sharding.Mesh
) -> tuple[HeldOut | None, PrefetchLoader]:
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


def check_computed(found: VerifiedCheckpoint | None, computed: dict[str, Any]) -> list[str]:
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
        if read_json(path) == to_dict(config):
            return
    except Damaged:
        pass
    write_json_atomic(path, to_dict(config))


def prepare_tokenizer(origin: StartState, run_dir: Path, *, in_place: bool) -> Tokenizer:
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


def _asked_for(origin: StartState) -> Tokenizer:
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
