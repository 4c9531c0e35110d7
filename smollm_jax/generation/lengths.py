"""Check the length of a prompt, and round lengths up so that few programs serve all texts."""

from collections.abc import Sequence

import numpy as np

from smollm_jax.runtime.errors import require

SMALLEST_BUCKET = 32


def check_prompt(prompt: Sequence[int], *, context: int, vocab_size: int) -> None:
    """Raise `UserError` unless the ids fit the vocabulary and leave room in the context."""
    length = len(prompt)
    odd = next((token for token in prompt if not isinstance(token, int | np.integer)), 0)
    require(isinstance(odd, int | np.integer), f"token ids are whole numbers; {odd!r:.40} came")
    require(0 < length < context, f"the prompt has {length:,} tokens; the model reads 1 to {context - 1:,}")
    for token in (min(prompt), max(prompt)):
        require(0 <= token < vocab_size, f"token id {token} is outside the vocabulary, 0 to {vocab_size - 1:,}")


def bucket(length: int) -> int:
    """Round `length` up to a power of two of at least `SMALLEST_BUCKET`."""
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())
