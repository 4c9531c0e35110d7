"""Set up a run: everything before the first step, the cheapest place to find a mistake first."""

from __future__ import annotations

import contextlib
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
from smollm_jax.data.heldout import head_texts, held_out
from smollm_jax.data.loader import check_vocab, open_loader
from smollm_jax.distributed.processes import Processes
from smollm_jax.distributed.sharding import make_mesh, shards_here
from smollm_jax.runs.metrics import NullMetrics, RunMetrics, keep_records
from smollm_jax.runtime.devices import compute_dtype, use_compilation_cache, use_precision_of
from smollm_jax.runtime.errors import require
from smollm_jax.runtime.files import Damaged, read_json, write_json_atomic
from smollm_jax.runtime.signals import StopRequest
from smollm_jax.tokenizer.tokenizer import Tokenizer, load_tokenizer
from smollm_jax.training.compile import compile_within, make_scorer, select_agreed_ops
from smollm_jax.training.restore import StartState, resolve_start
from smollm_jax.training.run import Counters, Progress, Run
from smollm_jax.training.step import abstract_state, init_state

# documents from the head of the data on which a `train:VOCAB` tokenizer is trained
TOKENIZER_DOCUMENTS = 20_000


def setup(config: Config, run_dir: Path, stop: StopRequest, job: Processes) -> tuple[Run, list[str]]:
    """Build or restore a run; returns it with notes for the start-up summary.

    Raises `UserError` for a mistake in settings or input, `SourceTimeout` if the data does not answer.
    """
    began = time.monotonic()
    logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
    checkpoints = CheckpointManager(
        run_dir / "checkpoints", keep_last=config.run.keep_last, keep_every=config.run.keep_every, processes=job
    )
    if job.first:
        remove_left_overs(run_dir, checkpoints)
    with job.first_then_rest():  # the first process saves the tokenizer, the others load it
        start = resolve_start(config, run_dir, checkpoints)
        tokenizer = prepare_tokenizer(start, run_dir, is_saved=not job.first)
    job.require_same({"step": start.checkpoint and start.checkpoint.step}, "checkpoints: --run-dir must be shared")
    found, model = start.checkpoint, replace(start.config.model, eos_token_id=tokenizer.eos_id)
    config = replace(start.config, model=model)  # a text ends with the tokenizer's own eos
    use_compilation_cache(config.compute.compilation_cache_dir)
    mesh, dtype = make_mesh(config), compute_dtype(config.compute.dtype, jax.default_backend())
    with job.all_or_none():
        held = held_out(config.data, tokenizer, resumes=found is not None) if config.data.eval_documents else None
        check_prompts(config, tokenizer)
        stream = open_loader(
            config.data,
            tokenizer,
            seed=config.run.seed,
            batch_size_at=config.batch_size_at,
            steps=config.total_steps,
            excluded=held.hashes if held else frozenset(),
            shards=shards_here(mesh, config),
            resumes=found is not None,
        ).prefetch(found.meta["cursor"] if found else None)
    job.require_same(stream.loader.fixed, "files of --data, or documents held out of them")
    if job.first:
        keep_config(config, run_dir)
    use_precision_of(dtype)
    computed = {"dtype": dtype.name, "platform": jax.default_backend(), "devices": int(mesh.size)}
    ops, remarks = select_agreed_ops(config, mesh, dtype, job)
    checkpoints.prepare(abstract_state(config, mesh))  # while the compiler works
    steps, remat, warnings = compile_within(config, mesh, dtype, checkpoints, ops)
    notes = [*start.notes, *check_computed(found, computed), *remarks, *warnings]
    nll = make_scorer(config, mesh, dtype, ops)
    if found is None:
        progress, state = Progress(), init_state(config, mesh, start.weights[0] if start.weights else None)
    else:
        progress = Progress(**found.meta["progress"])
        state = checkpoints.restore(found.step, abstract_state(config, mesh))
    counters, report = open_records(config, run_dir, job, found.step if found else 0)
    checkpoints.newest = counters.saved
    run = Run(
        config=config, run_dir=run_dir, stop=stop, job=job, tokenizer=tokenizer, stream=stream, heldout=held,
        mesh=mesh, dtype=dtype, remat=remat, steps=steps, nll=nll, checkpoints=checkpoints, state=state,
        report=report, progress=progress, counters=counters, computed=computed,
        kernels=False if ops.kernels == "plain" else None, setup_seconds=time.monotonic() - began,
    )  # fmt: skip
    # one of several processes cannot leave by itself
    stop.nothing_to_lose = lambda: not job.several and checkpoints.newest == run.progress.step
    return run, notes


def remove_left_overs(run_dir: Path, checkpoints: CheckpointManager) -> None:
    """Remove the files that dead processes left half written; only for the holder of the lock."""
    checkpoints.clean()
    for left_over in run_dir.glob(".export.*"):
        shutil.rmtree(left_over, ignore_errors=True)
    for part in run_dir.glob(".*.part-*"):
        part.unlink(missing_ok=True)


def open_records(
    config: Config, run_dir: Path, job: Processes, step: int
) -> tuple[Counters, RunMetrics | NullMetrics]:
    """Cut the records back to `step`, the step of the checkpoint, and open them in the first process."""
    evaluated, ledgers = keep_records(run_dir, step) if job.first else (0, {})
    report = RunMetrics(run_dir, start=step, total=config.total_steps) if job.first else NullMetrics()
    evaluated = job.gather(evaluated)[0]
    return Counters(saved=step, read=step, recorded=step, evaluated=evaluated, ledgers=ledgers), report


def check_computed(found: VerifiedCheckpoint | None, computed: dict[str, Any]) -> list[str]:
    """Return notes on other devices than the checkpoint's; raises `UserError` for another dtype."""
    before = found.meta.get("computed", computed) if found else computed
    was, now = before["dtype"], computed["dtype"]
    hint = f"give --dtype {was}, or start afresh with --new-run"
    require(was == now, f"the run computed in {was}, and would go on in {now}; {hint}")
    return [
        f"{name} changed from {before[name]} to {now}: same maths, the last bits will differ"
        for name, now in computed.items()
        if before[name] != now
    ]


def check_prompts(config: Config, tokenizer: Tokenizer) -> None:
    """Raise `UserError` for a sample prompt that fills the context, now rather than at an evaluation."""
    for prompt in config.run.sample_prompts if config.run.sample_tokens else ():
        length, most = len(tokenizer.encode(prompt)), config.model.max_seq_len - 1
        require(0 < length <= most, f"--sample-prompts {prompt[:40]!r} has {length} tokens; 1 to {most} fit")


def keep_config(config: Config, run_dir: Path) -> None:
    """Write config.json unless it holds the same settings."""
    path, values = run_dir / "config.json", to_dict(config)
    with contextlib.suppress(Damaged):
        if read_json(path) == values:
            return
    write_json_atomic(path, values)


def prepare_tokenizer(start: StartState, run_dir: Path, *, is_saved: bool) -> Tokenizer:
    """Load the run's own tokenizer if it resumes or `is_saved` by another process; else make it and save it.

    Raises `UserError` if it is missing, or has more entries than the model.
    """
    folder = run_dir / "tokenizer"
    if start.checkpoint is not None or is_saved:
        shared = "; all processes have to see the same --run-dir" if is_saved else ""
        missing = f"{folder} is missing; the run was tokenised with it{shared}"
        require((folder / "tokenizer.json").exists(), missing)
        tokenizer = load_tokenizer(str(folder))
    else:
        data, name, init_from = start.config.data, start.config.data.tokenizer, start.config.run.init_from
        theirs = start.weights[1] if start.weights else None
        if theirs is not None and name == init_from:
            tokenizer = theirs
        else:
            documents = islice(head_texts(data), TOKENIZER_DOCUMENTS) if name.startswith("train:") else None
            tokenizer = load_tokenizer(name, documents=documents)
        if theirs is not None and tokenizer.fingerprint != theirs.fingerprint:
            start.notes.append(f"tokenizer {name} is not the one that the weights of {init_from} learned with")
        tokenizer.save(folder)
    check_vocab(tokenizer, start.config.model.vocab_size)
    return tokenizer
