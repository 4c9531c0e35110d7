"""Hash every batch that was trained on, to notice a lost or repeated batch.

The hash of a batch is a sum of 32-bit words, one per token and position. So the hash does not depend on how
devices and processes share the rows. The train step computes the hash from what the device received. The same
function over numpy arrays computes the expected hash. The running hash is the metric `ledger`. No JAX here.
"""

from typing import Any

import numpy as np
import xxhash

# odd, and without a pattern: the first words of the hexadecimal expansion of pi, as in Blowfish
LANES = (0x243F6A89, 0x85A308D3, 0x13198A2F, 0x03707345)
OF_SEGMENT, OF_POSITION = 0xA4093823, 0x299F31D1


def batch_hash(tokens_BT1: Any, segment_ids_BT1: Any, xp: Any = np, *, rows: int | None = None) -> Any:
    """Hash a batch (B, T+1) to four uint32 words.

    The arrays are numpy's, or JAX's with `xp=jax.numpy`. Only the first `rows` rows count: the rest is padding.
    """
    B, T1 = tokens_BT1.shape
    position_BT1 = xp.arange(B, dtype=xp.uint32)[:, None] * xp.uint32(T1) + xp.arange(T1, dtype=xp.uint32)[None]
    words = tokens_BT1.astype(xp.uint32) + segment_ids_BT1.astype(xp.uint32) * xp.uint32(OF_SEGMENT)
    keyed = _mix(words ^ _mix(position_BT1 * xp.uint32(OF_POSITION), xp), xp)
    counts_B1 = (xp.arange(B) < (B if rows is None else rows)).astype(xp.uint32)[:, None]
    return xp.stack([xp.sum(_mix(keyed ^ xp.uint32(lane), xp) * counts_B1, dtype=xp.uint32) for lane in LANES])


def extend(ledger: str, words: Any) -> str:
    """Return the running hash `ledger` extended by one batch's hash."""
    return xxhash.xxh3_128_hexdigest(ledger.encode() + np.asarray(words, np.uint32).tobytes())


def _mix(x: Any, xp: Any) -> Any:
    """Spread every bit of a word over the whole word, by MurmurHash3's finalizer (Appleby 2011)."""
    x = (x ^ (x >> xp.uint32(16))) * xp.uint32(0x85EBCA6B)
    x = (x ^ (x >> xp.uint32(13))) * xp.uint32(0xC2B2AE35)
    return x ^ (x >> xp.uint32(16))
