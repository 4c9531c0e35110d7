"""The ledger: a running hash over every batch that was trained on, so that none is lost or repeated unnoticed.

A batch's hash is a sum of 32-bit words, one for each token and its place, so it is the same however the rows
are spread over devices and processes; the train step forms it from what the device was really given, and the
same function over numpy arrays tells what it should be. No JAX here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xxhash

# odd, and without a pattern: the first words of the hexadecimal expansion of pi, as in Blowfish
LANES = (0x243F6A89, 0x85A308D3, 0x13198A2F, 0x03707345)
OF_SEGMENT, OF_PLACE = 0xA4093823, 0x299F31D1


def batch_hash(tokens_BT1: Any, segment_ids_BT1: Any, xp: Any = np, *, rows: int | None = None) -> Any:
    """Four uint32 words over a batch (B, T+1) of numpy arrays, or of JAX arrays with `xp=jax.numpy`.

    Behind the first `rows` of it there is nothing but padding, which is no part of the batch.
    """
    B, T1 = tokens_BT1.shape
    place_BT1 = xp.arange(B, dtype=xp.uint32)[:, None] * xp.uint32(T1) + xp.arange(T1, dtype=xp.uint32)
    words = tokens_BT1.astype(xp.uint32) + segment_ids_BT1.astype(xp.uint32) * xp.uint32(OF_SEGMENT)
    keyed = _mixed(words ^ _mixed(place_BT1 * xp.uint32(OF_PLACE), xp), xp)
    counts_B1 = (xp.arange(B) < (B if rows is None else rows)).astype(xp.uint32)[:, None]
    return xp.stack([xp.sum(_mixed(keyed ^ xp.uint32(lane), xp) * counts_B1, dtype=xp.uint32) for lane in LANES])


def extended(ledger: str, words: Any) -> str:
    """The ledger with one more batch's hash."""
    return xxhash.xxh3_128_hexdigest(ledger.encode() + np.asarray(words, np.uint32).tobytes())


def _mixed(x: Any, xp: Any) -> Any:
    """Every bit of a word spread over all of it: the finalizer of MurmurHash3 (Appleby 2011)."""
    x = (x ^ (x >> xp.uint32(16))) * xp.uint32(0x85EBCA6B)
    x = (x ^ (x >> xp.uint32(13))) * xp.uint32(0xC2B2AE35)
    return x ^ (x >> xp.uint32(16))
