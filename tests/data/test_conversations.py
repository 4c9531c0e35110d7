"""Conversations in every format, and a line for each one that cannot be used."""

import json

import numpy as np
import pytest

from smollm_jax.config.settings import DataConfig
from smollm_jax.data.chat import encode_conversations, fitted
from smollm_jax.data.conversations import conversation_of
from smollm_jax.data.documents import Document
from smollm_jax.data.shuffle import tokenize
from smollm_jax.data.sources import open_source
from smollm_jax.data.survey import describe, survey
from smollm_jax.runtime.errors import UserError
from smollm_jax.tokenizer.chat_setup import with_chat_template
from tests.support.texts import chat_tokenizer, make_talks, write_parquet, write_rows

TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SAME = {
    "messages": {"messages": TALK, "source": "x"},
    "conversations": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "texts": {"prompt": "a", "completion": "b"},
    "lists": {"prompt": TALK[:1], "completion": TALK[1:]},
    "messages spelled otherwise": {"messages": [{"from": "user", "value": "a"}, {"from": "gpt", "value": "b"}]},
}


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer()


def config_of(path, **changes):
    return DataConfig(**({"data": str(path), "data_kind": "chat", "seq_len": 64} | changes))


def documents_of(path, **changes):
    config = config_of(path, **changes)
    return list(open_source(config.data, config).documents())


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_every_format_gives_the_same_conversation(name, suffix, tmp_path):
    rows = [SAME[name], SAME[name]]
    if suffix == ".jsonl":
        path = write_rows(tmp_path / "a.jsonl", rows)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path := tmp_path / "a.parquet")
    found = documents_of(path)
    assert [(list(d.conversation.messages), d.row) for d in found] == [(TALK, 0), (TALK, 1)]
    assert json.loads(found[0].text) == TALK


def test_only_the_completion_of_a_prompt_is_for_training():
    row = {"prompt": [*TALK, TALK[0]], "completion": [TALK[1]]}
    assert conversation_of(row).trained_from == 3


WRONG = {
    "message 1 has the role 'tool'; known are system, user, human, assistant, gpt": [
        {"role": "tool", "content": ""}
    ],
    "messages holds no message": [],
    "messages is str, not a list of messages": "a",
    "message 1 is of the assistant where the user's is due": TALK[::-1],
    "message 2 is of the user where the assistant's is due": [TALK[0], TALK[0]],
    "message 3 is of the system where the user's is due": [*TALK, {"role": "system", "content": ""}],
    "it holds a system message alone": [{"role": "system", "content": ""}],
    "message 1 is str, not an object": ["a"],
    "message 1 has no 'content' but role, text": [{"role": "user", "text": "a"}],
    "message 1: content is NoneType, not text": [{"role": "user", "content": None}],
    "a message is not Unicode text: a lone surrogate": [{"role": "user", "content": "\ud800"}],
}


@pytest.mark.parametrize("expected", WRONG)
def test_a_conversation_that_cannot_be_used_is_named_by_file_and_row(expected, tmp_path):
    path = write_rows(
        tmp_path / "a.jsonl", [{"messages": TALK}, {"messages": WRONG[expected]}, {"messages": TALK}]
    )
    with pytest.raises(UserError) as error:
        documents_of(path)
    line = f"{path}, row 1, cannot be read: {expected}; skip it with --on-bad-data skip, or repair it"
    assert str(error.value) == line
    skipped = []
    config = config_of(path, on_bad_data="skip")
    assert len(list(open_source(config.data, config).documents(skipped=skipped))) == 2
    assert len(skipped) == 1


def test_a_file_without_the_columns_and_a_row_without_them_get_a_line(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"question": "a", "answer": "b"}])
    columns = "none of the columns 'messages', 'conversations', 'prompt' and 'completion', 'text'"
    with pytest.raises(UserError, match=f"has {columns} but question, answer; give --text-column"):
        documents_of(path)
    with pytest.raises(UserError, match=columns):
        documents_of(write_parquet(tmp_path / "a.parquet", ["x"], column="words"))
    with pytest.raises(UserError, match=r"row 1, cannot be read: no conversation but messagse"):
        documents_of(write_rows(tmp_path / "b.jsonl", [{"messages": TALK}, {"messagse": TALK}]))


def test_plain_text_stays_text_and_a_run_on_text_reads_no_conversation(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "the cat"}, {"messages": TALK}])
    assert [d.conversation is None for d in documents_of(path)] == [True, False]
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert [d.text for d in documents_of(tmp_path / "a.txt")] == ["one", "two"]
    with pytest.raises(UserError, match="no 'text' but messages"):
        documents_of(path, data_kind="text")


def test_a_text_ends_as_the_base_model_s_texts_do_and_not_as_a_turn(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "the cat"}, {"messages": TALK}])
    (_, text), (_, talk) = tokenize(iter(documents_of(path)), tokenizer, config_of(path))
    assert text[-1] == tokenizer.special_tokens["<|endoftext|>"] != tokenizer.eos_id
    assert tokenizer.special_tokens["<|endoftext|>"] not in np.where(talk < 0, ~talk, talk)


def encoded(talk, tokenizer, size, **changes):
    config = config_of("unread", seq_len=size - 1, **changes)
    (one,) = encode_conversations([fake(talk)], tokenizer, config)
    return one, fitted(one, size)


def fake(talk):
    conversation = conversation_of({"messages": talk})
    return Document(conversation.text, "s", "f.jsonl", 7, {}, conversation=conversation)


def test_what_is_too_long_is_cut_after_the_last_whole_turn_that_fits(tokenizer):
    talk = [*TALK, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d " * 40}]
    whole, tokens = encoded(talk, tokenizer, 1_000)
    assert len(tokens) == len(whole.ids)
    first = int(whole.ends[0])
    for size in (first, first + 1, len(whole.ids) - 1):
        assert len(encoded(talk, tokenizer, size)[1]) == first
    assert len(encoded(talk, tokenizer, first - 1)[1]) == 0
    ids = np.where(tokens < 0, ~tokens, tokens)
    assert ids.tolist() == whole.ids.tolist()
    assert (tokens >= 0).tolist() == whole.trained.tolist()
    assert tokens[whole.ends[0] - 1] < 0, "the new line after the end of a turn is not trained"


def test_a_user_s_words_alone_are_dropped_unless_all_is_trained(tokenizer):
    talk = [TALK[0], {"role": "assistant", "content": "b " * 40}]
    assert len(encoded(talk, tokenizer, 20)[1]) == 0
    assert len(encoded(talk, tokenizer, 20, loss_on="all")[1]) > 0
    assert len(encoded(TALK[:1], tokenizer, 200)[1]) == 0


def test_a_template_that_raises_names_the_row_and_one_that_does_not_fit_itself(tmp_path, tokenizer, caplog):
    (tmp_path / "strict.jinja").write_text(
        "{% if messages[0]['content'] == 'bad' %}{{ raise_exception('no bad words') }}{% endif %}"
        + tokenizer.chat_template
    )
    strict, _ = with_chat_template(tokenizer, str(tmp_path / "strict.jinja"), "small")
    bad = fake([{"role": "user", "content": "bad"}, TALK[1]])
    with pytest.raises(UserError, match=r"f\.jsonl, row 7: the chat template refuses .*no bad words; skip"):
        encode_conversations([bad], strict, config_of("x"))
    (one,) = encode_conversations([bad], strict, config_of("x", on_bad_data="skip"))
    assert len(one.ids) == 0
    assert "skipped: f.jsonl, row 7" in caplog.text
    forgets = "(message['content'] if loop.last else message['content'].split('</think>')[-1])"
    (tmp_path / "forgets.jinja").write_text(tokenizer.chat_template.replace("message['content']", forgets))
    unfit, _ = with_chat_template(tokenizer, str(tmp_path / "forgets.jinja"), "small")
    config = config_of("x", chat_template="forgets.jinja", on_bad_data="skip")
    encode_conversations([fake([*TALK, *TALK])], unfit, config)
    thoughts = fake([TALK[0], {"role": "assistant", "content": "hm</think>b"}, *TALK])
    place = r"\(f\.jsonl, row 7\); give"
    with pytest.raises(UserError, match=rf"the chat template of forgets\.jinja cannot be used.*{place}"):
        encode_conversations([thoughts], unfit, config)


def test_the_survey_counts_what_is_trained_cut_and_dropped(tmp_path, tokenizer):
    talks = make_talks(30)
    long = [TALK[0], {"role": "assistant", "content": "text " * 900}]
    rows = [{"messages": talk} for talk in [*talks, long, [*TALK, *long]]] + [{"text": "the cat"}]
    config = config_of(write_rows(tmp_path / "a.jsonl", rows), seq_len=400)
    found = survey(config, tokenizer, {}, whole=True)
    assert (found.conversations, found.texts, found.dropped, found.cut) == (32, 1, 1, 1)
    assert found.longest > 900
    assert found.ends == sum(len([m for m in talk if m["role"] == "assistant"]) for talk in talks) + 1
    assert found.rows >= found.tokens / 401
    assert found.rows < 1.3 * found.tokens / 401
    lines = "\n".join(describe(found, tokenizer, whole=True))
    answer = talks[0][-1]["content"]
    assert f"<|im_start|>assistant\n[[{answer}<|im_end|>]]" in lines
    assert "<|im_end|> ends a turn and is trained" in lines


def test_a_mixture_lasts_as_long_as_it_has_its_shares(tmp_path, tokenizer):
    talks = write_rows(tmp_path / "talks.jsonl", [{"messages": TALK}] * 30)
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": "the cat sat on the mat"}] * 90)
    alone = survey(config_of(talks), tokenizer, {}, whole=True)
    assert alone.rows_of(3, [(str(talks), 1.0)]) == 3 * alone.rows
    found = survey(config_of(f"{talks}=0.5,{texts}=0.5"), tokenizer, {}, whole=True)
    fewest = min(found.tokens_of.values())
    assert found.rows_of(2, [(str(talks), 0.5), (str(texts), 0.5)]) == int(found.rows * 4 * fewest / found.tokens)
    assert sum(found.tokens_of.values()) == found.tokens


def test_a_run_on_text_takes_no_object_in_the_place_of_a_text_for_a_row(tmp_path):
    for value in ({"messages": TALK}, {}):
        path = write_rows(tmp_path / "a.jsonl", [{"text": value}])
        with pytest.raises(UserError, match="row 0, cannot be read: text is dict, not text"):
            documents_of(path, data_kind="text")
