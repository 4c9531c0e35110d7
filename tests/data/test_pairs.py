"""Pairs of answers: their formats, their tokens, and two segments of one row each."""

import numpy as np
import pytest

from smollm_jax.config.settings import Config, DataConfig, RunConfig
from smollm_jax.data.best_fit import SECOND, ids_of
from smollm_jax.data.chat import encode_to_fit
from smollm_jax.data.conversations import conversation_of
from smollm_jax.data.documents import Document
from smollm_jax.data.loader import BatchIterator, Loader
from smollm_jax.data.sources import open_source
from smollm_jax.data.survey import describe, survey
from smollm_jax.runtime.errors import UserError
from tests.support.texts import chat_tokenizer, make_pairs, write_rows

ASK = {"role": "user", "content": "the cat"}
GOOD, BAD = {"role": "assistant", "content": "reads"}, {"role": "assistant", "content": "next row"}
SAME = {
    "whole conversations": {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    "and the prompt in words": {"prompt": "the cat", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    "texts": {"prompt": "the cat", "chosen": "reads", "rejected": "next row"},
    "lists": {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
    "from and value": {
        "chosen": [{"from": "human", "value": "the cat"}, {"from": "gpt", "value": "reads"}],
        "rejected": [{"from": "human", "value": "the cat"}, {"from": "gpt", "value": "next row"}],
    },
}


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer()


def config_of(path="unread", **changes):
    return DataConfig(**({"data": str(path), "data_kind": "pairs", "seq_len": 64, "epochs": 1} | changes))


def encoded(row, tokenizer, size=65, **changes):
    pair = conversation_of(row)
    document = Document(pair.text, "s", "f.jsonl", 7, {}, conversation=pair)
    ((tokens, length),) = encode_to_fit([document], tokenizer, config_of(seq_len=size - 1, **changes))
    return tokens, length


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_every_format_gives_the_same_pair(name, suffix, tmp_path):
    rows = [SAME[name], SAME[name]]
    if suffix == ".jsonl":
        path = write_rows(tmp_path / "a.jsonl", rows)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path := tmp_path / "a.parquet")
    pairs = [document.conversation for document in open_source(str(path), config_of(path)).documents()]
    found = [(list(pair.messages), list(pair.rejected), pair.trained_from) for pair in pairs]
    assert found == [([ASK, GOOD], [ASK, BAD], 1)] * 2


def test_the_prompt_is_the_longest_common_beginning():
    before = [{"role": "system", "content": "row"}, ASK, GOOD, ASK]
    assert conversation_of({"chosen": [*before, GOOD], "rejected": [*before, BAD]}).trained_from == 4
    longer = conversation_of({"chosen": [ASK, GOOD], "rejected": [ASK, GOOD, ASK, BAD]})
    assert longer.trained_from == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": [ASK, GOOD], "rejected": [{**ASK, "content": "b"}, BAD]}, "answer no common prompt"),
        ({"chosen": "a", "rejected": "b"}, "without a prompt; expected the column 'prompt'"),
        ({"chosen": [ASK, {"role": "critic", "content": "x"}], "rejected": [ASK, BAD]}, "the role 'critic'"),
        ({"chosen": None, "rejected": [ASK, BAD]}, "chosen is NoneType, not a list of messages"),
        ({"chosen": [], "rejected": [ASK, BAD]}, "chosen holds no message"),
        ({"chosen": [ASK], "rejected": [ASK, BAD]}, "answer no common prompt"),
    ],
)
def test_a_row_that_is_no_pair_is_one_line(row, message):
    with pytest.raises(UserError, match=message):
        conversation_of(row)


def test_a_missing_column_is_named(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"chosen": [ASK, GOOD], "reject": [ASK, BAD]}])
    with pytest.raises(UserError, match="no column 'rejected' but chosen, reject; a pair has"):
        list(open_source(str(path), config_of(path)).documents())
    path = write_rows(tmp_path / "b.jsonl", [SAME["texts"], {"prompt": "a", "chosen": "b"}])
    with pytest.raises(UserError, match="row 1, cannot be read: no pair of chosen and rejected but prompt"):
        list(open_source(str(path), config_of(path)).documents())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.txt", "holds texts; a pair has the columns 'chosen' and 'rejected'"),
        ("builtin:python-docs", "has no rows of --data-kind pairs"),
    ],
)
def test_texts_are_no_pairs(name, message, tmp_path):
    (tmp_path / "a.txt").write_text("the cat\n\nreads")
    spec = name if name.startswith("builtin") else str(tmp_path / name)
    with pytest.raises(UserError, match=message):
        list(open_source(spec, config_of(spec)).documents())


def test_a_pair_is_two_segments_and_its_answers_are_the_targets(tokenizer):
    tokens, length = encoded(SAME["texts"], tokenizer)
    assert len(tokens) == length
    (second,) = np.flatnonzero(tokens < SECOND)
    sides = [tokens[:second], tokens[second:]]
    for side, answer in zip(sides, ("reads", "next row"), strict=True):
        assert tokenizer.decode(ids_of(side), skip_special=False) == (
            f"<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        )
        assert tokenizer.decode(side[side >= 0], skip_special=False) == f"{answer}<|im_end|>"


def test_equal_answers_and_a_prompt_without_room_are_dropped(tokenizer):
    same = {"prompt": "a", "chosen": "the row", "rejected": "the row"}
    assert len(encoded(same, tokenizer)[0]) == 0
    talk = {"prompt": "the cat " * 40, "chosen": "reads", "rejected": "text"}
    assert len(encoded(talk, tokenizer, 60)[0]) == 0
    equal_as_cut = {"prompt": "a", "chosen": "row " * 90 + "a", "rejected": "row " * 90 + "b"}
    assert len(encoded(equal_as_cut, tokenizer, 80)[0]) == 0
    assert len(encoded(equal_as_cut, tokenizer, 999)[0]) > 0


def test_the_longer_answer_loses_its_end_first(tokenizer):
    row = {"prompt": "a", "chosen": "text " * 60, "rejected": "row"}
    tokens, length = encoded(row, tokenizer, 50)
    (second,) = np.flatnonzero(tokens < SECOND)
    assert length > len(tokens) == 50
    whole, _ = encoded(row, tokenizer, 999)
    assert (tokens[second:] == whole[np.flatnonzero(whole < SECOND)[0] :]).all()
    both, _ = encoded({**row, "rejected": "row " * 60}, tokenizer, 50)
    assert np.flatnonzero(both < SECOND).tolist() == [25]
    assert len(both) == 50


def test_rows_hold_whole_pairs_in_odd_and_even_segments(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", make_pairs(60))
    data = config_of(path, seq_len=128)
    config = Config(data=data, run=RunConfig(phases="100x2"))
    documents = list(open_source(str(path), data).documents())
    expected = [tokens for tokens, _ in encode_to_fit(documents, tokenizer, data) if len(tokens)]
    batches = BatchIterator(Loader(config, tokenizer), None)
    found, cursor = [], None
    while True:
        try:
            batch, cursor = next(batches)
        except StopIteration:
            break
        for tokens, segments in zip(batch.tokens, batch.segment_ids, strict=True):
            assert np.abs(segments).max() % 2 == 0
            for number in range(1, np.abs(segments).max(), 2):
                ours = (np.abs(segments) + 1) // 2 == (number + 1) // 2
                found.append((tokens[ours].tolist(), (segments[ours] > 0).tolist()))
                assert np.abs(segments[ours]).tolist() == sorted(np.abs(segments[ours]))
    assert sorted(found) == sorted((ids_of(x).tolist(), (x >= 0).tolist()) for x in expected)
    assert cursor["dropped"] == 60 - len(expected) > 0


def test_the_survey_counts_pairs(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", [*make_pairs(20), {"prompt": "a", "chosen": "b", "rejected": "b"}])
    found = survey(config_of(path, seq_len=400), tokenizer, {}, whole=True)
    told = "\n".join(describe(found, tokenizer, whole=True, pairs=True))
    assert "21 pairs, by all data" in told
    assert f"{found.dropped} are dropped because their answers are equal or do not fit" in told
    assert found.dropped > 0
    assert found.ends == 2 * (21 - found.dropped)


def test_data_without_a_pair_to_train_on_is_refused(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "b"}] * 12)
    config = Config(data=config_of(path, epochs=0), run=RunConfig(phases="3x1"))
    with pytest.raises(UserError, match="none of 12 pairs has two different answers that fit --seq-len 64"):
        next(BatchIterator(Loader(config, tokenizer), None))
