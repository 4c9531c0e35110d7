"""Replay the documents of any step of a run, and compare the recorded batch hash.

The data loader starts at the newest good checkpoint before the step and reads forward. Nothing is trained.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from smollm_jax.checkpoint.listing import verified_checkpoints
from smollm_jax.data.batch_hash import batch_hash, extend
from smollm_jax.data.heldout import held_out
from smollm_jax.data.loader import BatchIterator, Loader
from smollm_jax.runs.load import parent_of, progress_of, read_run
from smollm_jax.runs.records import read_metrics
from smollm_jax.runtime.errors import UserError, require, say
from smollm_jax.runtime.files import expand_home
from smollm_jax.tokenizer.load import load_tokenizer


def replay_step(
    run_dir: str | Path, step: int, *, data: str | None = None, eval_data: str | None = None
) -> tuple[list[dict[str, Any]], str]:
    """Return the documents of update `step`, counted from 1, and whether its batch hash agrees.

    A document has its source, file, row and text. `data` and `eval_data` name the run's data now. Raises
    `UserError` if the run has no such step, or if its data has changed.
    """
    run_dir = expand_home(run_dir)
    config = read_run(run_dir)
    # the run has stopped at a row that cannot be read, or skipped it
    places = replace(config.data, data=data or config.data.data, eval_data=eval_data or config.data.eval_data)
    config = replace(config, data=replace(places, on_bad_data="skip"))
    require(1 <= step <= config.total_steps, f"--step {step}: the run has steps 1 to {config.total_steps:,}")
    every = verified_checkpoints(run_dir / "checkpoints", group="step")
    found = [x for x in every if "progress" in x.meta]  # an import has none
    before = next((x for x in found if x.step < step), None)
    parent = parent_of(run_dir)
    own = parent is None or step > parent["step"]
    require(own, f"--step {step}: the run is a branch of {parent and parent['parent']}, whose batches these are")
    gone = f"--step {step}: no good checkpoint of the branch before this step says where its data went on"
    require(parent is None or before is not None, gone)
    progress, cursor = progress_of(before) if before else ({}, None)
    ledger = progress.get("ledger", "")
    tokenizer = load_tokenizer(str(run_dir / "tokenizer"), special_tokens=config.data.special_tokens)
    if found:
        tokenizer.encode_as_of(progress_of(found[0])[1]["tokenizer"])
    loader = Loader(config, tokenizer, held_out(config.data, tokenizer, resumes=True), resumes=True)
    batches = BatchIterator(loader, cursor)
    start = cursor["step"] if cursor else 0
    if step - start > 1:
        say(f"replaying steps {start + 1:,} to {step:,}")
    try:
        for _ in range(start, step):
            batch, _ = next(batches)
            ledger = extend(ledger, batch_hash(batch.tokens, batch.segment_ids))
    except StopIteration:
        raise UserError(f"--step {step}: the data ended before") from None
    recorded = next((x["ledger"] for x in read_metrics(run_dir) if x["step"] == step and "ledger" in x), None)
    known = "as on record" if recorded == ledger else f"BUT {recorded} IS ON RECORD"
    if recorded is None:
        known = "none on record to compare it with"
    return batches.documents(), f"step {step:,}: ledger {ledger}, {known}"
