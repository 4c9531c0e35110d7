"""Set up a run before its first step, and log what it will do. The cheapest checks come first."""

import contextlib
import logging
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from smollm_jax.checkpoint.listing import VerifiedCheckpoint
from smollm_jax.checkpoint.manager import CheckpointManager
from smollm_jax.config.serialization import to_dict
from smollm_jax.config.settings import Config
from smollm_jax.data.heldout import head_texts, held_out
from smollm_jax.data.loader import Loader, PrefetchLoader, check_vocab
from smollm_jax.distributed.processes import Processes
from smollm_jax.distributed.sharding import make_mesh, shards_here
from smollm_jax.kernels.select import select_attention
from smollm_jax.model.transformer import Policy
from smollm_jax.runs.convert import require_exportable
from smollm_jax.runs.load import with_ids_of
from smollm_jax.runs.lock import WRITTEN
from smollm_jax.runs.metrics import NullMetrics, RunMetrics
from smollm_jax.runs.records import keep_records
from smollm_jax.runtime.devices import device_name, training_dtype, use_compilation_cache, use_precision_of
from smollm_jax.runtime.errors import require, say
from smollm_jax.runtime.files import Damaged, clean_left_overs, read_json, write_json_atomic
from smollm_jax.runtime.signals import StopRequest
from smollm_jax.tokenizer.chat_setup import with_chat_template
from smollm_jax.tokenizer.load import load_tokenizer
from smollm_jax.tokenizer.tokenizer import Tokenizer
from smollm_jax.training.chat import prompt_ids, survey_run, with_pad_of
from smollm_jax.training.compile import compile_within, make_scorer, remat_before, select_agreed_ops
from smollm_jax.training.reference import prepare_reference
from smollm_jax.training.restore import StartState, resolve_start, state_at_start, vocabulary_follows
from smollm_jax.training.run import Progress, Run
from smollm_jax.training.step import abstract_state, trained_part
from smollm_jax.training.summary import log_summary

# documents from the head of the data on which a `train:VOCAB` tokenizer is trained
TOKENIZER_DOCUMENTS = 20_000


def setup(config: Config, run_dir: Path, stop: StopRequest, job: Processes) -> Run:
    """Build or restore a run, and log a summary of it.

    Raises `UserError` for a mistake in settings or input, `SourceTimeout` if the data does not answer.
    """
    began, tell = time.monotonic(), say if job.first else lambda _: None
    logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
    mesh = make_mesh(config)
    dtype = training_dtype(config.compute.dtype, device := mesh.devices.flat[0])
    select_attention(config.compute.attention, device, dtype)  # raises before the network is asked
    checkpoints = CheckpointManager(
        run_dir / "checkpoints", keep_last=config.run.keep_last, keep_every=config.run.keep_every, processes=job
    )
    if job.first:
        remove_left_overs(run_dir, checkpoints)
    with job.first_then_rest():  # the first process saves the tokenizer, the others load it
        start = resolve_start(config, run_dir, checkpoints)
        if start.checkpoint is None:  # a run of an earlier version may go on
            require_exportable(start.config.model)
        tokenizer = prepare_tokenizer(start, run_dir, is_saved=not job.first)
    job.require_same({"step": start.checkpoint and start.checkpoint.step}, "checkpoints: --run-dir must be shared")
    found, config = start.checkpoint, fit_to_tokenizer(start, tokenizer)
    use_compilation_cache(config.compute.compilation_cache_dir)
    tell(f"data        opening {config.data.data}")
    with job.all_or_none():
        resumes = found is not None
        held = held_out(config.data, tokenizer, resumes=resumes)
        start.notes.append(f"special     {tokenizer.describe_special()}")
        check_prompts(config, tokenizer)
        config = config if resumes else survey_run(config, tokenizer, held, start.notes, tell)
        loader = Loader(config, tokenizer, held, shards=shards_here(mesh, config), resumes=resumes)
        stream = PrefetchLoader(loader, found.meta["cursor"] if found else None)
    job.require_same(stream.loader.fixed | {"steps": config.total_steps}, "files of --data or documents held out")
    if job.first:
        keep_config(config, run_dir)
    use_precision_of(dtype)
    tell(f"kernels     checking {config.compute.attention} against the reference")
    ops, remarks = select_agreed_ops(config, mesh, dtype, job)
    shapes = abstract_state(config, mesh)
    checkpoints.prepare(trained_part(shapes))  # while the compiler works
    steps, remat, warnings = compile_within(config, mesh, dtype, checkpoints, ops, before=remat_before(found))
    computed = described(mesh, dtype, remat)
    notes = [*start.notes, *check_computed(found, computed), *remarks, *warnings]
    progress = Progress(**found.meta["progress"]) if found else Progress()
    state = state_at_start(start, config, mesh, checkpoints)
    checkpoints.newest = step = progress.step
    # a fresh start evaluates step 0 again: an earlier attempt may have had other weights or data
    evaluated, ledgers = keep_records(run_dir, step if found else -1) if job.first else (0, {})
    report = RunMetrics(run_dir, start=step, config=config) if job.first else NullMetrics()
    run = Run(
        config=config, run_dir=run_dir, stop=stop, job=job, tokenizer=tokenizer, stream=stream, heldout=held,
        mesh=mesh, dtype=dtype, steps=steps, nll=make_scorer(config, mesh, dtype, ops), checkpoints=checkpoints,
        state=state, report=report, progress=progress, saved=step, evaluated=job.gather(evaluated)[0],
        ledgers=ledgers, computed=computed, base=start.base, kernels=False if ops.kernels == "plain" else None,
    )  # fmt: skip
    run.reference = prepare_reference(run, found)
    # one of several processes cannot leave by itself
    stop.nothing_to_lose = lambda: not job.several and checkpoints.newest == run.progress.step
    log_summary(run, remat, notes, seconds=time.monotonic() - began)
    return run


def remove_left_overs(run_dir: Path, checkpoints: CheckpointManager) -> None:
    """Remove the files that dead processes left half written. Only the holder of the lock may call."""
    checkpoints.clean()
    clean_left_overs(run_dir, WRITTEN, is_locked=True)


def described(mesh: Mesh, dtype: Any, remat: Policy) -> dict[str, Any]:
    """Return what computes a run and how, as each checkpoint stores it."""
    return {
        "dtype": dtype.name, "platform": jax.default_backend(), "device": device_name(mesh.devices.flat[0]),
        "devices": int(mesh.size), "remat": remat,
    }  # fmt: skip


def check_computed(found: VerifiedCheckpoint | None, computed: dict[str, Any]) -> list[str]:
    """Return notes on other devices than the checkpoint's. Raises `UserError` for another dtype."""
    before = computed | (found.meta.get("computed", {}) if found else {})
    was, now = before["dtype"], computed["dtype"]
    remedy = f"give --dtype {was}, or start afresh with --new-run"
    require(was == now, f"the run computed in {was}, and would go on in {now}; {remedy}")
    return [
        f"{name} changed from {before.get(name)} to {now}: same maths, the last bits will differ"
        for name, now in computed.items()
        if before.get(name) != now
    ]


def check_prompts(config: Config, tokenizer: Tokenizer) -> None:
    """Raise `UserError` for a sample prompt that fills the context, before an evaluation would."""
    for prompt in config.run.sample_prompts if config.run.sample_tokens else ():
        length, most = len(prompt_ids(config, tokenizer, prompt)), config.model.max_seq_len - 1
        require(0 < length <= most, f"--sample-prompts {prompt[:40]!r} has {length} tokens; 1 to {most} fit")


def keep_config(config: Config, run_dir: Path) -> None:
    """Write config.json unless it holds the same settings."""
    path, values = run_dir / "config.json", to_dict(config)
    require(path.is_file() or not path.exists(), f"{path} is not a file; remove it")
    with contextlib.suppress(Damaged):
        if read_json(path) == values:
            return
    write_json_atomic(path, values)


def prepare_tokenizer(start: StartState, run_dir: Path, *, is_saved: bool) -> Tokenizer:
    """Load the run's own tokenizer if it resumes or `is_saved` by another process. Else make and save it.

    Raises `UserError` if it is missing.
    """
    folder, special = run_dir / "tokenizer", start.config.data.special_tokens
    if start.checkpoint is not None or is_saved:
        shared = "; all processes have to see the same --run-dir" if is_saved else ""
        missing = f"{folder} is missing; the run was tokenised with it{shared}"
        require((folder / "tokenizer.json").exists(), missing)
        tokenizer = load_tokenizer(str(folder), special_tokens=special)
        if start.checkpoint is not None:
            tokenizer.encode_as_of(start.checkpoint.meta["cursor"]["tokenizer"])
    else:
        data, name, init_from = start.config.data, start.config.data.tokenizer, start.config.run.init_from
        theirs = start.tokenizer
        if theirs is not None and name == init_from:
            tokenizer, theirs.mode = theirs, special
        else:
            documents = None
            is_trained = name.startswith("train:")
            how = f"training {name} on up to {TOKENIZER_DOCUMENTS:,} documents of {data.data}"
            say(f"tokenizer   {how if is_trained else f'reading {name}'}")
            if is_trained:
                documents = islice(head_texts(data), TOKENIZER_DOCUMENTS)
            tokenizer = load_tokenizer(name, documents=documents, special_tokens=special)
        if theirs is not None and tokenizer.fingerprint != theirs.fingerprint:
            start.notes.append(f"tokenizer {name} is not the one that the weights of {init_from} learned with")
        if data.is_chat:
            tokenizer, note = with_chat_template(tokenizer, data.chat_template, name)
            start.notes.append(note)
        tokenizer.save(folder)
    return tokenizer


def fit_to_tokenizer(start: StartState, tokenizer: Tokenizer) -> Config:
    """Return the settings with the tokenizer's ids, and its size unless one was given."""
    config = start.config
    if start.checkpoint is None and start.params is None and vocabulary_follows(config):
        config = replace(config, model=replace(config.model, vocab_size=tokenizer.vocab_size))
    check_vocab(tokenizer, config.model.vocab_size)
    model = with_ids_of(config.model, tokenizer)
    return replace(config, model=with_pad_of(model, tokenizer) if config.data.is_chat else model)
