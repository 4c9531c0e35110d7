"""How fast documents become batches, stage by stage, against the bare tokenizer on the same text.

    python benchmarks/data.py [--data SOURCE] [--tokenizer NAME] [--documents N]

Each stage runs alone over the same documents, but for `stream`, which is all of them as a run uses them.
The table and, last, one line of JSON go to stdout. Best of `--repeats` rounds.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import tyro

from smollm_jax.config import DataConfig
from smollm_jax.data import Stream, head_texts, num_targets, open_stream
from smollm_jax.packing import pack
from smollm_jax.sources import Document, mixture, open_source
from smollm_jax.tokenizer import Tokenizer, load_tokenizer
from smollm_jax.windows import tokenised


def seconds_of(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def read_stream(stream: Stream, targets: int) -> tuple[float, float, int]:
    """Seconds to the first batch, seconds from there on, and targets in those."""
    began, first, count = time.perf_counter(), 0.0, 0
    try:
        while count < targets:
            item = stream.get(timeout=600)
            if item is None:
                break
            if not first:
                first = time.perf_counter()
            else:
                count += num_targets(item[0])
    except StopIteration:
        pass
    finally:
        stream.close()
    return first - began, time.perf_counter() - first, count


def main(
    *,
    data: str = "builtin:python-docs",
    tokenizer: str = "train:4096",
    documents: int = 20_000,
    seq_len: int = 2_048,
    batch_size: int = 8,
    shuffle_window: int = 1_024,
    repeats: int = 3,
) -> None:
    """Measure reading, tokenising, packing and the whole stream.

    Args:
        data: A source, as in train_jax.py.
        tokenizer: Hub id, folder or train:VOCAB.
        documents: Documents from the head of the source.
        seq_len: Tokens a row.
        batch_size: Rows a batch.
        shuffle_window: Documents shuffled together.
        repeats: Rounds, of which the best counts.
    """
    config = DataConfig(data=data, seq_len=seq_len, shuffle_window=shuffle_window, eval_documents=0)
    fast = load_tokenizer(tokenizer, documents=islice(head_texts(config), documents))

    def read() -> list[Document]:
        sources = [open_source(spec, config) for spec, _ in mixture(config.data)]
        return list(islice((d for source in sources for d in source.documents()), documents))

    found = (
        read()
    )  # once for what is only done once: imports, the list of files, the standard library's docstrings
    texts = [document.text for document in found]
    best: dict[str, float] = {}
    tokens, first = 0, float("inf")
    for _ in range(repeats):  # all stages in each round, so that other load meets them alike
        seconds = {"read": seconds_of(read)[0]}
        seconds["tokenizers.encode_batch"], encoded = seconds_of(
            lambda: fast._fast.encode_batch(texts, add_special_tokens=False)
        )
        tokens = sum(len(one.ids) for one in encoded) + len(texts)
        del encoded
        seconds["tokenise"], drawn = seconds_of(lambda: list(tokenised(found, fast)))
        packed = pack(iter(drawn), seq_len, batch_size)
        seconds["pack"], _ = seconds_of(partial(list, packed))
        waited, streaming, count = read_stream(endless(config, fast, batch_size), tokens)
        seconds["stream"] = streaming * tokens / count
        first = min(first, waited)
        best = {name: min(value, best.get(name, value)) for name, value in seconds.items()}
    report({name: tokens / value for name, value in best.items()}, found, tokens, first)


def endless(config: DataConfig, tokenizer: Tokenizer, batch_size: int) -> Stream:
    return open_stream(config, tokenizer, seed=0, batch_size_at=lambda _: batch_size, steps=2**40)


def report(rates: dict[str, float], found: list[Document], tokens: int, first: float) -> None:
    characters = sum(len(document.text) for document in found)
    length = tokens / len(found)
    print(f"{len(found):,} documents, {characters:,} characters, {tokens:,} tokens; {os.cpu_count()} cores\n")
    print(f"{'stage':<26}{'tokens/s':>14}{'documents/s':>14}{'of encode_batch':>17}")
    for name, rate in rates.items():
        share = rate / rates["tokenizers.encode_batch"]
        print(f"{name:<26}{rate:>14,.0f}{rate / length:>14,.0f}{share:>17.2f}")
    print(f"\nfirst batch after {first:.2f} s")
    line = {
        "documents": len(found),
        "tokens": tokens,
        "cores": os.cpu_count(),
        "tokens_per_second": {name: round(rate) for name, rate in rates.items()},
        "documents_per_second": {name: round(rate / length) for name, rate in rates.items()},
        "stream_of_encode_batch": round(float(np.divide(rates["stream"], rates["tokenizers.encode_batch"])), 3),
        "first_batch_seconds": round(first, 3),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    tyro.cli(main)
