"""The batch hash changes with a lost or repeated row, a swap or a flipped bit."""

import numpy as np
import pytest

from smollm_jax.data.batch_hash import batch_hash, extend


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return rng.integers(0, 49_152, (8, 33)).astype(np.int32), rng.integers(0, 5, (8, 33)).astype(np.int32)


def changed(array, where, value):
    array = array.copy()
    array[where] = value
    return array


def test_any_change_changes_every_word(batch):
    tokens, segments = batch
    words = batch_hash(tokens, segments)
    others = [batch_hash(changed(tokens, (3, i), tokens[3, i] ^ 1), segments) for i in range(33)]
    others += [batch_hash(tokens, changed(segments, (3, i), segments[3, i] + 1)) for i in range(33)]
    others += [batch_hash(tokens[::-1], segments[::-1]), batch_hash(tokens[:, ::-1], segments)]
    others += [batch_hash(tokens[:-1], segments[:-1]), batch_hash(segments, tokens)]
    for other in others:
        assert (other != words).all()
    assert len({extend("", other) for other in [words, *others]}) == len(others) + 1


def test_zeros_in_different_shapes_differ():
    shapes = [(2, 6), (3, 4), (2, 5), (1, 12), (1, 13)]
    hashes = {batch_hash(np.zeros(shape, np.int32), np.zeros(shape, np.int32)).tobytes() for shape in shapes}
    assert len(hashes) == 3  # of 12, 10 and 13 places: the shape itself is the config's


def test_the_order_of_batches_counts(batch):
    one, other = batch_hash(*batch), batch_hash(batch[0] + 1, batch[1])
    assert extend(extend("", one), other) != extend(extend("", other), one)
