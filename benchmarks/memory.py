"""Watch the memory of the stream over time: `python -m benchmarks.memory --minutes 60`.

The stream is read at the pace of a device, so that every prefetch buffer is full. It runs in this process,
without a model.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice

from benchmarks.data import endless
from benchmarks.harness.tables import Row, as_command, finish, gib, resident
from smollm_jax.config.settings import DataConfig
from smollm_jax.data.heldout import head_texts
from smollm_jax.data.loader import PrefetchLoader
from smollm_jax.data.packing import num_targets
from smollm_jax.runtime.errors import require
from smollm_jax.tokenizer.load import load_tokenizer

LOOKS = 12  # samples of the memory, evenly over the minutes


def memory(
    *,
    data: str = "builtin:python-docs",
    tokenizer: str = "train:4096",
    documents: int = 20_000,
    seq_len: int = 2_048,
    batch_size: int = 8,
    shuffle_window: int = 1_024,
    minutes: float = 60,
    tokens_per_second: int = 20_000,
) -> int:
    """Read the stream for some minutes and sample the process's memory.

    Args:
        data: A source, as in train_jax.py.
        tokenizer: Hub id, folder or train:VOCAB.
        documents: Documents from the head of the source for train:VOCAB.
        seq_len: Tokens per row.
        batch_size: Rows per batch.
        shuffle_window: Documents shuffled together.
        minutes: Duration.
        tokens_per_second: Pace of the device.
    """
    require(minutes > 0 and tokens_per_second > 0, "--minutes and --tokens-per-second must be more than 0")
    require(resident() is not None, "this system has no /proc to read the memory from")
    config = DataConfig(data=data, seq_len=seq_len, shuffle_window=shuffle_window, eval_documents=0)
    fast = load_tokenizer(tokenizer, documents=islice(head_texts(config), documents))
    stream = endless(config, fast, batch_size)
    try:
        rows = list(_looks(stream, minutes * 60, tokens_per_second))
    finally:
        stream.close()
    finish(
        f"memory of the stream, {data}, {tokenizer}", rows, minutes=minutes, tokens_per_second=tokens_per_second
    )
    return 0


def _looks(stream: PrefetchLoader, seconds: float, pace: int) -> Iterator[Row]:
    """Yield a row after each part of `seconds`."""
    began, tokens = time.perf_counter(), 0
    for part in range(1, LOOKS + 1):
        while (passed := time.perf_counter() - began) < seconds * part / LOOKS:
            if tokens > passed * pace:
                time.sleep(min(0.1, tokens / pace - passed))
            elif item := stream.get(timeout=1):
                tokens += num_targets(item[0])
        yield {
            "minute": passed / 60,
            "tokens": tokens,
            "tokens/s": tokens / passed,
            "resident GiB": gib(resident()),
            "at most": gib(resident("VmHWM")),
        }


if __name__ == "__main__":
    as_command(memory, "memory")
