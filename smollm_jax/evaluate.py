"""Held-out loss and bits per byte.

Bits per byte compare across tokenizers: the nats of the targets over the UTF-8 bytes that those very targets
stand for. Sums are kept to the end; a mean of means would weigh short batches more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from smollm_jax.data import Batch


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
