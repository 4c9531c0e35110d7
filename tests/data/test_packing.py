"""Packing: the rows of a reference that goes token by token, and every token a target exactly once."""

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from smollm_jax.data.packing import Packer, num_targets, pack


def make_documents(lengths):
    """Documents of distinct tokens, each ended by 0."""
    ids = iter(range(1, 10_000))
    return [np.array([*(next(ids) for _ in range(n - 1)), 0], np.int32) for n in lengths]


def reference_rows(documents, seq_len):
    """Rows of (token, segment, document), built one token at a time; the last is padded."""
    rows, row, segment = [], [], 0
    for number, document in enumerate(documents):
        for i, token in enumerate(document.tolist()):
            if len(row) == seq_len + 1:
                rows.append(row)
                row, segment = ([(int(document[i - 1]), 1, number)], 1) if i else ([], 0)
            segment += i == 0
            row.append((token, segment, number))
    padding = [(0, 0, None)] * (seq_len + 1 - len(row))
    return [*rows, row + padding] if row else rows


def assert_rows(packer, batch, expected):
    """The batch holds the expected rows and then padding, and the packer names their documents."""
    width = batch.tokens.shape[1]
    expected_rows = expected + [[(0, 0, None)] * width] * (len(batch.tokens) - len(expected))
    assert batch.tokens.tolist() == [[token for token, _, _ in row] for row in expected_rows]
    assert batch.segment_ids.tolist() == [[segment for _, segment, _ in row] for row in expected_rows]
    assert packer.documents == sorted({number for row in expected for _, _, number in row} - {None})
    assert batch.tokens.dtype == batch.segment_ids.dtype == np.int32


lengths = st.lists(st.integers(1, 40), max_size=30)


@given(lengths=lengths, seq_len=st.integers(1, 12), batches=st.data())
@settings(max_examples=300, deadline=None)
def test_packed_rows_are_the_rows_of_the_reference(lengths, seq_len, batches):
    """Whatever the sizes of the batches, and however many documents are added ahead of them."""
    documents = make_documents(lengths)
    expected = reference_rows(documents, seq_len)
    packer, waiting = Packer(seq_len), list(enumerate(documents))
    while expected:
        rows, ahead = batches.draw(st.integers(1, 4)), batches.draw(st.integers(0, 5))
        while waiting and (packer.rows < rows or ahead):
            ahead -= packer.rows >= rows
            packer.add(*waiting.pop(0))
        assert packer.rows <= len(expected)
        assert waiting or packer.rows >= len(expected) - 1
        assert_rows(packer, packer.batch(rows), expected[:rows])
        expected = expected[rows:]
    assert packer.state is None
    assert packer.rows == 0


@given(lengths=lengths, seq_len=st.integers(1, 12), rows=st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_a_packer_resumed_between_any_two_batches_makes_the_same_rows(lengths, seq_len, rows):
    documents = make_documents(lengths)
    expected = reference_rows(documents, seq_len)
    packer, number = Packer(seq_len), 0
    while expected:
        while packer.rows < rows and number < len(documents):
            packer.add(number, documents[number])
            number += 1
        assert_rows(packer, packer.batch(rows), expected[:rows])
        expected, offset = expected[rows:], packer.state
        packer = Packer(seq_len)
        if offset is not None:
            packer.add(number - 1, documents[number - 1], offset)


@given(lengths=lengths, seq_len=st.integers(1, 12), rows=st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_each_token_but_a_documents_first_is_a_target_exactly_once(lengths, seq_len, rows):
    documents = make_documents(lengths)
    pairs, padded = [], False
    for batch in pack(enumerate(documents), seq_len, rows):
        assert num_targets(batch) or not padded
        for tokens, segments in zip(batch.tokens, batch.segment_ids, strict=True):
            assert not (padded and segments.any()), "a row after the padded one"
            padded = padded or not segments.all()
            valid = (segments[1:] == segments[:-1]) & (segments[1:] != 0)
            pairs += zip(tokens[:-1][valid].tolist(), tokens[1:][valid].tolist(), strict=True)
    assert pairs == [pair for d in documents for pair in pairwise(d.tolist())]
