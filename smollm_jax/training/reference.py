"""Compute the reference model's log-probs of pairs once, and keep them in the run folder.

The reference model is the run's own start. Adapters change nothing there, so it is their base. Its sums come from
the program that computes the policy's, on the rows of the steps. So a run needs no second model in memory, and its
first loss is exactly the loss of equal models. A pair is found again by a hash of its tokens, in whatever row it
stands.
"""

import json
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xxhash

from smollm_jax.checkpoint.listing import VerifiedCheckpoint
from smollm_jax.config.serialization import to_dict
from smollm_jax.config.settings import Config
from smollm_jax.data.batch_hash import batch_hash
from smollm_jax.data.heldout import pack_to_score
from smollm_jax.data.loader import BatchIterator, Loader
from smollm_jax.data.packing import Batch, are_targets
from smollm_jax.distributed.sharding import on_devices, on_one_device, padded_rows
from smollm_jax.model.preference import FIGURES, pair_step, pairs_per_row
from smollm_jax.runs.lock import REFERENCE
from smollm_jax.runs.metrics import finite_or_none
from smollm_jax.runtime.errors import UserError, one_line, require
from smollm_jax.runtime.files import written_aside
from smollm_jax.training.compile import PairStep
from smollm_jax.training.run import Run
from smollm_jax.training.step import State, weights_of

ELSEWHERE = {"coordinator", "num_processes", "process_id", "compilation_cache_dir"}  # of no result
TELL_SECONDS = 20.0
AFRESH = "bring the old one back, or train afresh with --new-run"


class Reference:
    """The reference model's sums of log-probs of answers, by the hash of the pair.

    `about` names the weights, the data and the steps that the sums were computed for.
    """

    def __init__(self, about: dict[str, Any], sums: dict[int, tuple[float, float]] | None = None):
        self.about, self.sums = about, {} if sums is None else sums

    @property
    def digest(self) -> str:
        """Return a hash of everything, which checkpoints hold."""
        about = json.dumps(self.about, sort_keys=True).encode()
        return xxhash.xxh3_128_hexdigest(about + b"".join(array.tobytes() for array in self._arrays()))

    def of(self, batch: Batch) -> np.ndarray:
        """Return the sums of a batch's pairs, float32 (B, P, 2)."""
        found = np.zeros((len(batch.tokens), pairs_per_row(batch.tokens.shape[1] - 1), 2), np.float32)
        for row, pair, key in pair_keys(batch):
            require(
                key in self.sums, f"a pair has no reference log-probs: data or settings have changed; {AFRESH}"
            )
            found[row, pair] = self.sums[key]
        return found

    def add(self, batch: Batch, sums_BP2: np.ndarray) -> None:
        """Keep the sums of a batch's pairs that are new."""
        for row, pair, key in pair_keys(batch):
            chosen, rejected = sums_BP2[row, pair].tolist()
            self.sums.setdefault(key, (chosen, rejected))

    def save(self, path: Path) -> None:
        keys, sums = self._arrays()
        with written_aside(path) as part, part.open("wb") as file:
            np.savez(file, keys=keys, sums=sums, about=np.array(json.dumps(self.about)))

    @classmethod
    def load(cls, path: Path) -> "Reference":
        """Return what `save` wrote. Raises `UserError` for a file that is missing or damaged."""
        try:
            with np.load(path) as file:
                keys, sums, about = (file[name] for name in ("keys", "sums", "about"))
            return cls(json.loads(str(about)), dict(zip(keys.tolist(), map(tuple, sums.tolist()), strict=True)))
        except FileNotFoundError:
            raise UserError(f"{path} is missing, which holds the reference log-probs; {AFRESH}") from None
        except Exception as error:  # of zip, of npy and of JSON
            raise UserError(f"{path} is damaged ({one_line(error)}); {AFRESH}") from None

    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        ordered = sorted(self.sums.items())
        keys = np.array([key for key, _ in ordered], np.uint64)
        return keys, np.array([sums for _, sums in ordered], np.float32).reshape(-1, 2)


def pair_keys(batch: Batch) -> Iterator[tuple[int, int, int]]:
    """Yield row, place in the row, and hash of each pair of a batch.

    The hash covers tokens and targets.
    """
    for row, (tokens, segment_ids) in enumerate(zip(batch.tokens, batch.segment_ids, strict=True)):
        pair_T1 = (np.abs(segment_ids) + 1) // 2
        for pair in range(int(pair_T1.max())):
            ours = pair_T1 == pair + 1
            kind = np.sign(segment_ids[ours]) * (2 - np.abs(segment_ids[ours]) % 2)  # 1 or 2, below 0 if only read
            yield row, pair, xxhash.xxh3_64_intdigest(tokens[ours].tobytes() + kind.astype(np.int8).tobytes())


def prepare_reference(run: Run, found: VerifiedCheckpoint | None) -> Reference | None:
    """Return the log-probs kept in the run folder, else compute them from the weights.

    Returns None unless the data are pairs. Raises `UserError` if the run resumes and the file is missing, damaged
    or of other weights or data. Raises it too if the file covers fewer steps than the run has. The run is closed
    then.
    """
    try:
        return _prepared(run, found)
    except BaseException:
        run.close()
        raise


def _prepared(run: Run, found: VerifiedCheckpoint | None) -> Reference | None:
    path = run.run_dir / REFERENCE
    if not run.config.data.is_pairs:
        return None
    if found is not None:
        with run.job.all_or_none():
            reference = Reference.load(path)
            same = reference.digest == found.meta.get("reference")
            require(same, f"{path} is of other weights or data than checkpoint {found.step}; {AFRESH}")
            rows, total = reference.about["rows"], rows_of(run.config)
            short = f"{path} covers {rows:,} rows; the run has {total:,}"
            require(rows >= total or reference.about["complete"], f"{short}; start anew with --new-run")
        return reference
    settings = to_dict(run.config)
    compute = {name: value for name, value in settings["compute"].items() if name not in ELSEWHERE}
    about = {
        "weights": weights_hash(run.state["params"]), "rows": rows_of(run.config),
        "base": run.base and run.base["sha256"], "seed": run.config.run.seed, "phases": list(run.config.phases),
        "data": settings["data"], "compute": compute, "computed": run.computed, **run.stream.loader.fixed,
    }  # fmt: skip
    about = json.loads(json.dumps(about))  # as it is read back
    try:
        reference = Reference.load(path)
    except UserError:
        reference = Reference({})
    is_ours = {**reference.about, "complete": None} == {**about, "complete": None}
    if not all(run.job.gather(is_ours)):
        reference = _computed(run, about)
        if run.job.first:
            reference.save(path)
    run.report.say(f"reference   log-probs of {len(reference.sums):,} pairs in {path}")
    return reference


def rows_of(config: Config) -> int:
    """Return the rows of all steps."""
    return sum(phase.steps * phase.batch_size for phase in config.phases)


def weights_hash(params: Any) -> str:
    """Return a hash of all parameters' bits."""

    def words(leaf: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(leaf, jnp.uint32).reshape(1, -1)
        return batch_hash(bits, jnp.zeros_like(bits), jnp)

    found = jax.device_get(jax.jit(lambda tree: jax.tree.map(words, tree))(params))
    return xxhash.xxh3_128_hexdigest(b"".join(leaf.tobytes() for leaf in jax.tree.leaves(found)))


def _computed(run: Run, about: dict[str, Any]) -> Reference:
    """Compute the sums on the batches of the run, up to its last step or until every pair was seen."""
    run.report.say(f"reference   computing the log-probs of up to {run.config.total_steps:,} steps")
    # sources of its own, because closing a source ends all its readers, the training data's too
    loader = Loader(run.config, run.tokenizer, run.heldout, shards=run.stream.loader.shards)
    reference, batches = Reference(about), BatchIterator(loader, None)
    complete, told_at = False, time.monotonic()
    for step in range(1, run.config.total_steps + 1):
        if time.monotonic() - told_at > TELL_SECONDS:
            run.report.say(f"reference   at step {step:,} of {run.config.total_steps:,}")
            told_at = time.monotonic()
        rows = run.config.batch_size_at(step)
        with run.job.all_or_none():
            no_rows = Batch(*np.zeros((2, rows, run.config.data.seq_len + 1), np.int32))
            batch, cursor = next(batches, (no_rows, None))
        known = all(key in reference.sums for _, _, key in pair_keys(batch))
        over = cursor is None or (known and _seen_once(cursor))
        told = run.job.gather([known, over])
        complete = all(ended for _, ended in told)
        if complete:
            break
        if not all(old for old, _ in told):
            program = run.steps[rows]
            assert isinstance(program, PairStep)
            padded = padded_rows(rows, run.mesh, run.config.compute.grad_accum)
            arrays = (on_devices(x, padded, batch.first_row, run.mesh) for x in (batch.tokens, batch.segment_ids))
            sums = program.logprobs(weights_of(run.state), *arrays)
            reference.add(batch, np.asarray(on_one_device(sums, run.mesh))[batch.first_row :])
    for source in batches.sources:
        source.close()
    for batch in heldout_batches(run):
        reference.add(batch, np.asarray(run.nll(weights_of(run.state), batch.tokens, batch.segment_ids)))
    parts, reference.sums = run.job.gather([[str(key), *sums] for key, sums in reference.sums.items()]), {}
    for part in parts:  # in the order of processes, so that all keep the same sums of a pair that several saw
        for key, chosen, rejected in part:
            reference.sums.setdefault(int(key), (chosen, rejected))
    reference.about = about | {"complete": complete}
    return reference


def _seen_once(cursor: dict[str, Any]) -> bool:
    """Return whether every pair was seen: all documents with a part left are of a later epoch."""
    states = (state for lane in cursor["lanes"].values() for state in lane["sources"])
    return all(state["epoch"] > 0 or state["ended"] for state in states)


def eval_batches(run: Run) -> Iterator[Batch]:
    """Yield the held-out batches that an evaluation reads."""
    return islice(heldout_batches(run), run.config.data.eval_batches * run.config.compute.grad_accum)


def heldout_batches(run: Run) -> Iterator[Batch]:
    """Yield all held-out batches."""
    config, rows = run.config, run.config.main_batch_size // run.config.compute.grad_accum
    return pack_to_score(run.heldout, run.tokenizer, config.data.seq_len, rows, chat=config.data.is_chat)


def score_pairs(run: Run, batches: Iterable[Batch], weights: State) -> dict[str, Any]:
    """Return the fields of a metrics line on held-out pairs. Bits per byte are of the chosen answers."""
    assert run.reference is not None
    figures = dict.fromkeys(("loss", "pairs", *FIGURES), 0.0)
    tokens = text_bytes = 0
    scored = jax.jit(pair_step, static_argnums=3)
    for batch in batches:
        logprobs = run.nll(weights, batch.tokens, batch.segment_ids)
        sums, _ = scored(logprobs, run.reference.of(batch), batch.segment_ids, run.config.preference)
        figures = {name: total + float(sums[name]) for name, total in figures.items()}
        is_target = are_targets(batch.segment_ids)
        tokens += int(is_target.sum())
        assert batch.text_bytes is not None, "the batch was not packed to be scored"
        text_bytes += int(batch.text_bytes[:, 1:][is_target & (batch.segment_ids[:, 1:] % 2 == 1)].sum())
    pairs = max(figures["pairs"], 1)
    bits = -figures["logps/chosen"] / np.log(2) / max(text_bytes, 1)
    return {
        "eval_loss": finite_or_none(figures["loss"] / pairs),
        "eval_bits_per_byte": finite_or_none(bits),
        "eval_tokens": tokens,
        "eval_pairs": int(figures["pairs"]),
        **{f"eval_{name}": finite_or_none(figures[name] / pairs) for name in FIGURES},
    }
