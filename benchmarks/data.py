"""Time how documents become batches, stage by stage: `python -m benchmarks.data`.

Each stage runs alone over the same documents; the stream runs all of them as a run does. The bare tokenizer on the
same text is the upper bound; `--device-tokens-per-second` is the speed that the stream must reach.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

from benchmarks.harness.tables import Row, as_command, finish, spread
from smollm_jax.config.architecture import ModelConfig
from smollm_jax.config.settings import Config, DataConfig, RunConfig
from smollm_jax.data.heldout import head_texts
from smollm_jax.data.loader import Loader, PrefetchLoader
from smollm_jax.data.packing import num_targets, pack
from smollm_jax.data.shuffle import tokenize
from smollm_jax.data.sources import Document, mixture, open_source
from smollm_jax.tokenizer.load import load_tokenizer
from smollm_jax.tokenizer.tokenizer import Tokenizer

BARE, STREAM = "tokenizers.encode_batch", "stream"


def data(
    *,
    data: str = "builtin:python-docs",
    tokenizer: str = "train:4096",
    documents: int = 20_000,
    seq_len: int = 2_048,
    batch_size: int = 8,
    shuffle_window: int = 1_024,
    rounds: int = 3,
    device_tokens_per_second: int | None = None,
) -> int:
    """Time reading, tokenizing, packing and the whole stream.

    Args:
        data: A source, as in train_jax.py.
        tokenizer: Hub id, folder or train:VOCAB.
        documents: Documents from the head of the source.
        seq_len: Tokens per row.
        batch_size: Rows per batch.
        shuffle_window: Documents shuffled together.
        rounds: Rounds counted.
        device_tokens_per_second: Tokens/s that a device consumes, to compare the stages with.
    """
    config = DataConfig(data=data, seq_len=seq_len, shuffle_window=shuffle_window, eval_documents=0)
    fast = load_tokenizer(tokenizer, documents=islice(head_texts(config), documents))
    # read once beforehand: imports, the list of files and the standard library's docstrings are done only once
    found = list(islice(_documents(config), documents))
    rates: dict[str, list[float]] = {}
    tokens, waits = 0, []
    for _ in range(rounds):  # all stages in each round, so that other load affects them alike
        tokens, seconds = _stages(config, found, fast, batch_size)
        waited, streaming, count = read_stream(endless(config, fast, batch_size), tokens)
        waits.append(waited)
        for name, value in seconds.items():
            rates.setdefault(name, []).append(tokens / value)
        rates.setdefault(STREAM, []).append(count / streaming)
    rows = _rows(rates, tokens / len(found), device_tokens_per_second)
    finish(
        f"stream, {data}, {tokenizer}, T = {seq_len}",
        rows,
        documents=len(found),
        tokens=tokens,
        first_batch_seconds=spread(waits),
        rounds=rounds,
        device_tokens_per_second=device_tokens_per_second,
    )
    return 0


def _documents(config: DataConfig) -> Iterator[Document]:
    for spec, _ in mixture(config.data):
        yield from open_source(spec, config).documents()


def _stages(
    config: DataConfig, found: list[Document], fast: Tokenizer, batch_size: int
) -> tuple[int, dict[str, float]]:
    """Return the tokens in the documents, one eos each included, and the seconds of each stage alone."""
    seconds = {"read": seconds_of(lambda: list(islice(_documents(config), len(found))))[0]}
    texts = [document.text for document in found]
    seconds[BARE], encoded = seconds_of(lambda: fast._fast.encode_batch(texts, add_special_tokens=False))
    tokens = sum(len(one.ids) for one in encoded) + len(texts)
    del encoded
    seconds["tokenise"], drawn = seconds_of(lambda: list(tokenize(found, fast)))
    seconds["pack"], _ = seconds_of(partial(list, pack(iter(drawn), config.seq_len, batch_size)))
    return tokens, seconds


def seconds_of(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def endless(config: DataConfig, tokenizer: Tokenizer, batch_size: int) -> PrefetchLoader:
    run = RunConfig(phases=f"{2**31 - 1}x{batch_size}")
    model = ModelConfig(max_seq_len=config.seq_len)
    return PrefetchLoader(Loader(Config(data=config, run=run, model=model), tokenizer), None)


def read_stream(stream: PrefetchLoader, targets: int) -> tuple[float, float, int]:
    """Return the seconds to the first batch, the seconds after it, and the targets of those seconds."""
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


def _rows(rates: dict[str, list[float]], length: float, needed: int | None) -> list[Row]:
    """Return a row per stage; `length` is the tokens per document."""
    rows: list[Row] = []
    for name, values in rates.items():
        rate = spread(values)
        shares = [value / bare for value, bare in zip(values, rates[BARE], strict=True)]
        rows.append(
            {
                "stage": name,
                "tokens/s": rate,
                "documents/s": rate["median"] / length,
                "of encode_batch": spread(shares),
                "of what the device eats": rate["median"] / needed if needed else None,
            }
        )
    return rows


if __name__ == "__main__":
    as_command(data, "data")
