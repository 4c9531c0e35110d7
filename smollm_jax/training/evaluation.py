"""Held-out loss and bits per byte: of a run under way, and of any model on any text.

Bits per byte compare across tokenizers: the nats of the targets over the UTF-8 bytes that those very targets
stand for. Sums are kept to the end; a mean of means would weigh short batches more.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smollm_jax.config.settings import ComputeConfig, Config, DataConfig
from smollm_jax.data.heldout import plain_batches
from smollm_jax.data.loader import check_vocab
from smollm_jax.data.packing import Batch
from smollm_jax.distributed.sharding import make_mesh, on_one_device
from smollm_jax.generation.generator import Generator
from smollm_jax.generation.sampling import Sampling
from smollm_jax.model.transformer import SmolLM
from smollm_jax.runs.load import is_run, load_model, read_run
from smollm_jax.runs.metrics import finite_or_none
from smollm_jax.runtime.devices import use_precision_of
from smollm_jax.runtime.errors import require
from smollm_jax.training.run import Run
from smollm_jax.training.step import make_nll


@dataclass(frozen=True)
class Score:
    """Sums over the held-out targets: nats, targets, and bytes of text they stand for."""

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / max(self.tokens, 1)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / max(self.bytes, 1)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


def score(
    nll: Callable[..., jax.Array],
    params: Any,
    batches: Iterable[Batch],
    token_bytes_V: np.ndarray,
    *,
    stopped: Callable[[], bool] = lambda: False,
) -> Score | None:
    """Score `batches` with `nll(params, tokens, segment_ids)`; None when `stopped` turns true on the way."""
    nats, tokens, text_bytes = 0.0, 0, 0
    for batch in batches:
        if stopped():
            return None
        nats += float(nll(params, batch.tokens, batch.segment_ids))
        before, after = batch.segment_ids[:, :-1], batch.segment_ids[:, 1:]
        targets = batch.tokens[:, 1:][(before == after) & (after != 0)]
        tokens += targets.size
        text_bytes += int(token_bytes_V[targets].sum())
    return Score(nats, tokens, text_bytes)


def evaluate_model(
    path: str | Path,
    data: DataConfig,
    *,
    seq_len: int | None = None,
    batch_size: int,
    max_batches: int | None = None,
    dtype: str,
) -> dict[str, Any]:
    """Score a run, exported folder or Hub id on all of `data.data`, in order; plain JSON values.

    Rows are as long as those that the run was trained on, or as `seq_len`, but never longer than the model's
    context. Raises `ValueError` for what cannot be read or holds nothing to score.
    """
    require(batch_size > 0, f"--batch-size {batch_size} must be at least 1")
    require(max_batches is None or max_batches > 0, f"--max-batches {max_batches} must be at least 1")
    model, params, tokenizer = load_model(path)
    check_vocab(tokenizer, model.vocab_size)
    trained = read_run(path).data.seq_len if is_run(path) else DataConfig.seq_len
    settings = replace(data, seq_len=min(trained, model.max_seq_len) if seq_len is None else seq_len)
    # plain: no kernel is checked here as a run checks its own
    config = Config(model=model, data=settings, compute=ComputeConfig(attention="plain"))
    use_precision_of(jnp.dtype(dtype))
    mesh = make_mesh(config, jax.devices()[:1])
    nll = jax.jit(make_nll(config, mesh, dtype=jnp.dtype(dtype), remat="none"))
    batches = islice(plain_batches(settings, tokenizer, batch_size), max_batches)
    result = score(nll, jax.tree.map(jnp.asarray, params), batches, tokenizer.token_bytes)
    assert result is not None
    require(result.tokens > 0, f"--data {settings.data} holds nothing to score: no document of two tokens")
    return {
        "path": str(path),
        "data": settings.data,
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "tokens": result.tokens,
        "bytes": result.bytes,
        "seq_len": settings.seq_len,
        "dtype": dtype,
    }


# greedy base models repeat themselves; this shows what was learned and is still nearly deterministic
SAMPLE_TEMPERATURE, SAMPLE_TOP_P = 0.7, 0.95


def evaluate_run(run: Run, save: Callable[[], None]) -> None:
    """Held-out loss, samples and loss.png; left for the next start when asked to stop on the way.

    A stop that comes while there is much to compile is met by another thread, which calls `save`.
    """
    if run.heldout is None or run.interrupted:
        return
    began, config, step = time.monotonic(), run.config, run.progress.step
    parts = config.compute.grad_accum
    batches = run.heldout.batches(config.main_batch_size // parts, config.data.eval_batches * parts)

    def stopped() -> bool:
        run.processes.watch.moved()
        return run.interrupted

    away = run.stop.away(None if run.processes.several else save)
    with away, run.processes.watch.long("a batch of an evaluation, or samples"):
        result = score(run.nll, run.state["params"], batches, run.tokenizer.token_bytes, stopped=stopped)
        if result is None:
            return
        texts = sample(run)
    line = {
        "step": step,
        "eval_loss": finite_or_none(result.loss),
        "eval_bits_per_byte": finite_or_none(result.bits_per_byte),
        "eval_tokens": result.tokens,
        "eval_seconds": time.monotonic() - began,
    }
    if run.interrupted:
        return
    with run.processes.watch.long("drawing loss.png"):
        run.report.evaluation(line, texts)
    run.evaluated = step


def sample(run: Run) -> list[tuple[str, str]]:
    """The sample prompts and their continuations; those that were made when a stop was requested."""
    settings = run.config.run
    if not settings.sample_tokens or run.interrupted:
        return []
    params = on_one_device(run.state["params"], run.mesh)
    if not run.processes.first:
        return []
    model = SmolLM.from_params(run.config.model, params, dtype=run.dtype)
    if run.generator is None:
        run.generator = Generator(model, kernels=run.kernels)
    else:
        run.generator.load(model)
    sampling = Sampling(
        max_new_tokens=settings.sample_tokens,
        temperature=SAMPLE_TEMPERATURE,
        top_p=SAMPLE_TOP_P,
        seed=settings.seed,
        stop_ids=(run.tokenizer.eos_id,),
    )
    texts = []
    for prompt in settings.sample_prompts:
        ids: list[int] = []
        for piece in run.generator.stream(run.tokenizer.encode(prompt).tolist(), sampling):
            ids += piece
            if run.interrupted:
                break
        texts.append((prompt, run.tokenizer.decode(ids)))
    run.generator.unload()  # the next step has use for the memory
    return texts
