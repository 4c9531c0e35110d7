"""Held-out loss and bits per byte: of a run under way, and of any model on any text.

Bits per byte compare across tokenizers: the nats of the targets over the UTF-8 bytes that those very targets
stand for. Sums are kept to the end; a mean of means would weigh short batches more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smollm_jax.config import ComputeConfig, Config, DataConfig, require
from smollm_jax.data import Batch, check_vocab, plain_batches
from smollm_jax.hardware import use_precision_of
from smollm_jax.loading import is_run, load_for_inference, read_run
from smollm_jax.sharding import make_mesh
from smollm_jax.step import make_nll


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
    model, params, tokenizer = load_for_inference(path)
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
