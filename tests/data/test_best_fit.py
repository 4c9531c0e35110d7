"""Whole documents in rows, from a bounded buffer, and the same rows from any cursor."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smollm_jax.config.settings import Config, DataConfig, RunConfig
from smollm_jax.data import best_fit
from smollm_jax.data.best_fit import BestFitPacker, context
from smollm_jax.data.heldout import held_out, pack_to_score
from smollm_jax.data.loader import BatchIterator, Loader, merge_cursors
from smollm_jax.data.packing import num_targets, pack
from smollm_jax.data.shuffle import tokenize
from smollm_jax.data.sources import open_source
from smollm_jax.runtime.errors import UserError
from tests.support.texts import chat_tokenizer, make_talks, make_texts, write_jsonl, write_rows

SEQ_LEN = 23


def pieces_of(batch):
    """The documents in the rows, with context as `context` gives it."""
    found = []
    for tokens, segments in zip(batch.tokens, batch.segment_ids, strict=True):
        filled = segments != 0
        assert not filled[np.argmin(filled) :].any() or filled.all(), "padding inside a row"
        for segment in range(1, np.abs(segments).max(initial=0) + 1):
            inside = np.abs(segments) == segment
            found.append(np.where(segments[inside] > 0, tokens[inside], context(tokens[inside])).tolist())
    return found


documents = st.lists(st.integers(2, SEQ_LEN + 1), max_size=40).map(
    lambda lengths: [np.where(np.arange(n) % 3, 100 * i + np.arange(n), ~(100 * i + np.arange(n))).astype(np.int32)
                     for i, n in enumerate(lengths)]
)  # fmt: skip


@given(documents=documents, rows=st.integers(1, 4), buffer=st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_every_document_is_in_one_row_whole(documents, rows, buffer):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(best_fit, "BUFFER", buffer)
        batches = list(pack(enumerate(documents), SEQ_LEN, rows, BestFitPacker(SEQ_LEN)))
    found = [piece for batch in batches for piece in pieces_of(batch)]
    assert sorted(found) == sorted(d.tolist() for d in documents)
    assert sum(map(num_targets, batches)) == sum(int((d[1:] >= 0).sum()) for d in documents)


def test_a_row_begins_with_the_oldest_and_takes_the_longest_that_fits():
    packer = BestFitPacker(9)
    for number, length in enumerate([4, 9, 3, 6, 6, 2]):
        packer.add(number, np.full(length, number, np.int32))
    batch = packer.batch(3)
    assert [row[row != 0].tolist() for row in batch.segment_ids] == [[1] * 4 + [2] * 6, [1] * 9, [1] * 3 + [2] * 6]
    assert batch.tokens[0].tolist() == [0] * 4 + [3] * 6
    assert packer.documents == [0, 3, 1, 2, 4]


def test_a_text_longer_than_a_row_is_divided_and_every_token_is_a_target_once():
    ids = np.arange(1, 3 * SEQ_LEN + 5, dtype=np.int32)
    batches = list(pack([(0, ids)], SEQ_LEN, 2, BestFitPacker(SEQ_LEN)))
    targets = [t for b in batches for piece in pieces_of(b) for t in piece[1:]]
    assert sorted(targets) == ids[1:].tolist()


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("talks")
    for name, seed in (("a1", 0), ("a2", 1), ("b", 2)):
        write_rows(path / f"{name}.jsonl", [{"messages": talk} for talk in make_talks(60, seed=seed)])
    long = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "text " * 300}]
    write_rows(path / "c.jsonl", [{"prompt": "a", "completion": "b"}, {"messages": long}])
    write_jsonl(path / "texts.jsonl", make_texts(30, longest=200))
    return path


def config_of(folder, data="a*.jsonl", **changes):
    data = ",".join(str(folder / part) for part in data.split(","))
    fields = {"data": data, "data_kind": "chat", "seq_len": 96, "shuffle_window": 16, "epochs": 2} | changes
    return Config(data=DataConfig(**fields), run=RunConfig(seed=3, phases="1000000x4"))


def batches_of(config, tokenizer, cursor=None, shards=None):
    cursor = None if cursor is None else json.loads(json.dumps(cursor))
    return BatchIterator(Loader(config, tokenizer, shards=shards), cursor)


def drained(batches):
    return [(b.tokens.tolist(), b.segment_ids.tolist(), cursor) for b, cursor in batches_until_end(batches)]


def batches_until_end(batches):
    while True:
        try:
            yield next(batches)
        except StopIteration:
            return


@pytest.mark.parametrize(
    "data",
    [
        "a*.jsonl",
        pytest.param("a*.jsonl=0.6,texts.jsonl=0.3,b.jsonl=0.1", marks=pytest.mark.slow),
        "a1.jsonl,c.jsonl",
    ],
)
def test_the_batches_after_any_cursor_are_the_same(folder, tokenizer, data, monkeypatch):
    monkeypatch.setattr(best_fit, "BUFFER", 12)
    config = config_of(folder, data)
    straight = drained(batches_of(config, tokenizer))
    assert len(straight) > 6
    for at in range(0, len(straight), 3):
        resumed = drained(batches_of(config, tokenizer, straight[at][2]))
        assert resumed == straight[at + 1 :], f"after batch {at + 1}"


def test_every_conversation_comes_once_an_epoch(folder, tokenizer):
    config = config_of(folder)
    source = open_source(config.data.data, config.data)
    expected = [ids.tolist() for _, ids in tokenize(source.documents(), tokenizer, config.data)]
    found = [piece for batch, _ in batches_until_end(batches_of(config, tokenizer)) for piece in pieces_of(batch)]
    assert sorted(found) == sorted(2 * expected)


def test_the_batches_do_not_depend_on_the_number_of_processes(folder, tokenizer, monkeypatch):
    monkeypatch.setattr(best_fit, "BUFFER", 12)
    config = config_of(folder, shards=4, epochs=0)
    whole = batches_of(config, tokenizer)
    parts = [batches_of(config, tokenizer, shards=[2 * i, 2 * i + 1]) for i in range(2)]
    for _ in range(5):
        batch, cursor = next(whole)
        made = [next(part) for part in parts]
        assert np.concatenate([b.tokens for b, _ in made]).tolist() == batch.tokens.tolist()
        assert merge_cursors([c for _, c in made]) == cursor
    # two processes stop and four go on
    more = [batches_of(config, tokenizer, cursor, shards=[i]) for i in range(4)]
    rows = np.concatenate([next(part)[0].segment_ids for part in more])
    assert rows.tolist() == next(whole)[0].segment_ids.tolist()


def test_dropped_conversations_are_counted_and_nothing_but_such_is_one_line(folder, tokenizer):
    config = config_of(folder, "c.jsonl", epochs=2)
    *_, (_, cursor) = batches_until_end(batches_of(config, tokenizer))
    assert (cursor["dropped"], cursor["skipped"]) == (2, 0)
    with pytest.raises(UserError, match="none of 2 conversations has an answer that fits --seq-len 4"):
        next(batches_of(config_of(folder, "c.jsonl", seq_len=4, epochs=0), tokenizer))


def test_a_damaged_cursor_or_another_template_is_refused(folder, tokenizer):
    config = config_of(folder)
    batches = batches_of(config, tokenizer)
    _, cursor = next(batches)
    kept = cursor["lanes"]["0"]["kept"]
    for wrong in ([*kept, [9]], [[3], *kept[1:]], "x", [["y"]], None, [[0]] * 9_999):
        bad = json.loads(json.dumps(cursor))
        bad["lanes"]["0"]["kept"] = wrong
        with pytest.raises(UserError, match="the data cursor is damaged"):
            next(batches_of(config, tokenizer, bad))
    bad = json.loads(json.dumps(cursor)) | {"template": "0"}
    with pytest.raises(UserError, match="the template changed since the checkpoint"):
        batches_of(config, tokenizer, bad)


def test_held_out_conversations_are_not_trained_on_and_are_scored_on_the_answers(folder, tokenizer):
    config = config_of(folder, eval_documents=4, seq_len=400)
    held = held_out(config.data, tokenizer)
    assert len(held) == 4
    texts = {document.text for document, _ in held}
    loader = Loader(config, tokenizer, held)
    batches, seen = BatchIterator(loader, None), set()
    for _ in batches_until_end(batches):
        seen |= {document["text"] for document in batches.documents()}
    assert not texts & seen
    (batch,) = pack_to_score(held, tokenizer, 400, 2, chat=True)
    targets = batch.segment_ids[:, 1:] > 0
    answers = [m["content"] for d, _ in held for m in d.conversation.messages if m["role"] == "assistant"]
    assert int(batch.text_bytes[:, 1:][targets].sum()) == sum(len(a.encode()) for a in answers)
