"""Compute the log-probabilities of continuations with two compiled programs per length of rows.

One program computes the features of rows, the other the log-probabilities of some targets. So logits exist for
targets alone. Rows have `ROW` tokens. Longer requests go into rows of a second length.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import jax
import numpy as np

from smollm_jax.config.architecture import ModelConfig
from smollm_jax.evaluation.prefix_tree import Request, Row, pack
from smollm_jax.generation.lengths import bucket
from smollm_jax.kernels.select import select_ops
from smollm_jax.model.attention import tree_attention
from smollm_jax.model.loss import token_logprobs
from smollm_jax.model.transformer import SmolLM
from smollm_jax.runtime.devices import precision_of

ROW = 512  # longer rows waste fewer tokens at their ends, and more scores of attention
TOKENS, TOKENS_ON_CPU = 32_768, 512  # of the rows that are computed together
TARGETS, TARGETS_ON_CPU = 4_096, 128  # whose log-probabilities are computed together
CHUNK = 1_024  # targets whose logits exist at once

Sent = tuple[list[Row], list[tuple[jax.Array, jax.Array]]]


class Scorer:
    """The programs that score requests with a model of architecture `config` in a compute dtype."""

    def __init__(self, config: ModelConfig, dtype: Any):
        on_cpu = jax.default_backend() == "cpu"
        self._config, self._dtype = config, dtype
        self._tokens, self._targets = (TOKENS_ON_CPU, TARGETS_ON_CPU) if on_cpu else (TOKENS, TARGETS)
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
        # plain: kernels need a check before use, and know no trees
        self._ops = replace(select_ops("plain", mesh, dtype), attention=tree_attention)
        precise = precision_of(dtype)  # as in training, whatever the process has set
        self._features = jax.jit(precise(self._features_of_rows))
        self._logprobs = jax.jit(precise(self._logprobs_of_targets))

    def score(
        self, params: Any, requests: Sequence[Request], watch: Callable[[int, int], None] = lambda *_: None
    ) -> list[tuple[float, bool]]:
        """Return each request's log-probability in nats, and whether all its targets are the arg-max.

        `watch` is called with the number of requests done and of all. It may raise to end the work.
        """
        results: dict[int, tuple[float, bool]] = {}
        sent: deque[Sent] = deque()
        for rows in chain(self._batches(requests), [[]]):
            if rows:
                sent.append((rows, self._send(params, rows)))
            while len(sent) > bool(rows):  # the device computes a batch while the host packs the next one
                results |= _take(sent.popleft(), requests)
                watch(len(results), len(requests))
        return [results[i] for i in range(len(requests))]

    def _batches(self, requests: Sequence[Request]) -> Iterator[list[Row]]:
        lengths = [len(request.ids) for request in requests]
        longest = bucket(max(lengths, default=0))
        for fits, length in ((lambda n: n <= ROW, ROW), (lambda n: n > ROW, longest)):
            rows = iter(pack(requests, [i for i, n in enumerate(lengths) if fits(n)], length))
            count = max(self._tokens // length, 1)
            while batch := list(islice(rows, count)):
                yield batch + [Row(length) for _ in range(count - len(batch))]

    def _send(self, params: Any, rows: list[Row]) -> list[tuple[jax.Array, jax.Array]]:
        """Send rows to the device. Returns the results for groups of targets, the last group padded."""
        arrays = (np.stack([getattr(row, name) for row in rows]) for name in ("tokens", "depths", "ends"))
        x_MD = self._features(params, *arrays)
        T, P = len(rows[0].tokens), self._targets
        nodes = np.concatenate([np.array(row.nodes, np.int32) + i * T for i, row in enumerate(rows)])
        targets = np.concatenate([np.array(row.targets, np.int32) for row in rows])
        both = np.pad(np.stack([nodes, targets]), ((0, 0), (0, -len(nodes) % P)))
        return [self._logprobs(params, x_MD, *both[:, at : at + P]) for at in range(0, len(nodes), P)]

    def _features_of_rows(self, params: Any, tokens_BT: Any, depths_BT: Any, ends_BT: Any) -> jax.Array:
        x_BTD = self._model(params).features_at(tokens_BT, depths_BT, ends_BT)
        return x_BTD.reshape(-1, x_BTD.shape[-1])

    def _logprobs_of_targets(self, params: Any, x_MD: jax.Array, nodes_P: Any, targets_P: Any):
        logprob_1P, is_argmax_1P = token_logprobs(
            x_MD[nodes_P][None], self._model(params).head_VD, targets_P[None], CHUNK
        )
        return logprob_1P[0], is_argmax_1P[0]

    def _model(self, params: Any) -> SmolLM:
        return SmolLM.from_params(self._config, params, dtype=self._dtype, ops=self._ops)


def _take(sent: Sent, requests: Sequence[Request]) -> dict[int, tuple[float, bool]]:
    """Wait for the results of rows. Returns the result of each request by its number."""
    rows, found = sent
    numbers = [number for row in rows for number in row.requests]
    logprobs, are_argmax = (np.concatenate(list(map(np.asarray, arrays))) for arrays in zip(*found, strict=True))
    results, at = {}, 0
    for number in numbers:
        here = slice(at, at := at + len(requests[number].targets))
        results[number] = float(logprobs[here].sum(dtype=np.float64)), bool(are_argmax[here].all())
    return results
