"""Score n-gram models on the held-out text of a recipe: `python -m benchmarks.ngram`.

Interpolated n-grams of the run's own tokens (Witten & Bell 1991) are trained on every document that a run may
train on and scored on the very targets of its held-out loss. A language model has to beat them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from benchmarks.harness.tables import Row, as_command, finish
from smollm_jax.config.recipes import RECIPES
from smollm_jax.config.settings import DataConfig
from smollm_jax.data.heldout import head_texts, held_out
from smollm_jax.tokenizer.load import load_tokenizer
from smollm_jax.tokenizer.tokenizer import Tokenizer


class NGram:
    """P(w | h) = (c(hw) + d(h) P(w | h')) / (c(h) + d(h)); d(h) counts the different words seen after h."""

    def __init__(self, documents: Iterable[list[int]], vocab_size: int, order: int):
        self.vocab_size, self.order = vocab_size, order
        self.after: Counter[tuple[int, ...]] = Counter()
        self.different: Counter[tuple[int, ...]] = Counter()
        self.seen: Counter[tuple[int, ...]] = Counter()
        for ids in documents:
            for gram in self._grams(ids):
                self.after[gram[:-1]] += 1
                self.different[gram[:-1]] += gram not in self.seen
                self.seen[gram] += 1

    def _grams(self, ids: list[int]) -> Iterator[tuple[int, ...]]:
        for end in range(1, len(ids)):  # as in training, the first token of a document is no target
            for n in range(1, min(self.order, end + 1) + 1):
                yield tuple(ids[end + 1 - n : end + 1])

    def probability(self, history: tuple[int, ...], word: int) -> float:
        p = 1 / self.vocab_size
        for start in range(len(history), -1, -1):
            h = history[start:]
            if self.after[h]:
                d = self.different[h]
                p = (self.seen[(*h, word)] + d * p) / (self.after[h] + d)
        return p

    def nats(self, ids: list[int]) -> float:
        """Return the nats, summed over all but the first token."""
        context = self.order - 1
        return -sum(
            math.log(self.probability(tuple(ids[max(0, i - context) : i]) if context else (), ids[i]))
            for i in range(1, len(ids))
        )


def score(config: DataConfig, tokenizer: Tokenizer, orders: tuple[int, ...]) -> tuple[list[Row], int]:
    """Score an n-gram model of each order on the held-out text of `config`; also returns the tokens trained on."""
    held = [ids.tolist() for _, ids in held_out(config, tokenizer)]
    eos = tokenizer.eos_id
    training = [[*ids.tolist(), eos] for ids in tokenizer.encode_batch(list(head_texts(config)))]
    targets = sum(len(ids) - 1 for ids in held)
    text_bytes = sum(int(tokenizer.token_bytes[np.array(ids[1:])].sum()) for ids in held)
    rows: list[Row] = []
    for order in orders:
        model = NGram(training, tokenizer.vocab_size, order)
        nats = sum(model.nats(ids) for ids in held)
        rows.append(
            {
                "model": f"{order}-gram",
                "nats a token": nats / targets,
                "bits per byte": nats / math.log(2) / text_bytes,
                "tokens": targets,
            }
        )
    return rows, sum(map(len, training))


def ngram(*, recipe: str = "quickstart", orders: tuple[int, ...] = (1, 2, 3, 4)) -> int:
    """Score n-grams on the held-out text of a recipe.

    Args:
        recipe: Recipe that names the data and the tokenizer.
        orders: Lengths of n-grams.
    """
    config = RECIPES[recipe].data
    rows, training_tokens = score(config, load_tokenizer(config.tokenizer, documents=head_texts(config)), orders)
    finish(f"n-grams on the held-out text of {recipe}", rows, training_tokens=training_tokens)
    return 0


if __name__ == "__main__":
    as_command(ngram, "ngram")
