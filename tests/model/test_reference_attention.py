"""The reference attention against the textbook's formula."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smollm_jax.model.attention import BLOCKS, SMALLEST_BLOCK, _blocks, packed_attention, starts_of
from tests.support.packed import TOLERANCE, outcome, random_rows


def textbook(q_BTNH, k_BTKH, v_BTKH, start_BT):
    """Softmax attention as the formula has it, all scores at once; its gradient is JAX's own."""
    T, N, H = q_BTNH.shape[1:]
    k_BTNH, v_BTNH = (jnp.repeat(x, N // k_BTKH.shape[2], axis=2) for x in (k_BTKH, v_BTKH))
    scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BTNH) / H**0.5
    own_BTS = (start_BT[:, :, None] == start_BT[:, None]) & jnp.tril(jnp.ones((1, T, T), bool))
    weights_BNTS = jax.nn.softmax(jnp.where(own_BTS[:, None], scores_BNTS, -jnp.inf))
    return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BTNH)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("length", "heads"),
    [(1, (9, 3)), (100, (4, 4)), (SMALLEST_BLOCK + 1, (3, 1)), (BLOCKS * SMALLEST_BLOCK + 70, (6, 2))],
)
def test_the_reference_is_the_textbook_s(dtype, length, heads):
    q, k, v, do, start = random_rows(length, length=length, heads=heads, dtype=dtype)
    ours = jax.jit(partial(outcome, packed_attention))(q, k, v, do, start)
    exact = jax.jit(partial(outcome, textbook))(*(np.asarray(x, np.float32) for x in (q, k, v, do)), start)
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == dtype
        # of one token the gradients of q and k are 0
        atol = TOLERANCE[dtype] * max(float(np.abs(b).max()), 1.0)
        np.testing.assert_allclose(np.asarray(a, np.float32), b, atol=atol)


@pytest.mark.parametrize(
    ("length", "count", "largest"),
    [(1, 1, 1), (128, 1, 128), (129, 2, 128), (1025, 5, 256), (4096, 8, 512), (4097, 9, 512), (8192, 16, 512)],
)
def test_blocks_cover_a_row_once(length, count, largest):
    blocks = _blocks(length)
    assert [i for block in blocks for i in range(block.start, block.stop)] == list(range(length))
    assert (len(blocks), max(block.stop - block.start for block in blocks)) == (count, largest)


def test_the_way_back_does_not_share_the_scores_of_the_way_there():
    rows = random_rows(0, length=SMALLEST_BLOCK)
    assert "optimization_barrier" in jax.jit(partial(outcome, packed_attention)).lower(*rows).as_text()


def test_documents_begin_where_the_segment_changes():
    segment_ids = jnp.array([[1, 1, 1, 2, 2, 3, 0, 0], [4, 4, 5, 5, 5, 5, 5, 6]])
    assert starts_of(segment_ids).tolist() == [[0, 0, 0, 3, 3, 5, 6, 6], [0, 0, 2, 2, 2, 2, 2, 7]]
