"""Spans of conversations against transformers' own mask, and templates that cannot be used."""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from smollm_jax.runtime.errors import UserError
from smollm_jax.tokenizer.chat_setup import CHATML, with_chat_template
from smollm_jax.tokenizer.tokenizer import Tokenizer
from smollm_jax.tokenizer.turns import TemplateMisfit, encode_turns, render_turns, turn_end
from tests.support.texts import chat_tokenizer, make_talks, make_texts, train_tokenizer

USER, ASSISTANT = "user", "assistant"
# content and the end of a turn between generation tags, the new line after it outside
TAGGED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
TALKS = {
    "one turn": [(USER, "What is 17 + 5?"), (ASSISTANT, "22, as 17 + 5 = 22.")],
    "system": [("system", "Be brief."), (USER, "Hi!"), (ASSISTANT, "Hello.")],
    "three turns": [
        (USER, "a"),
        (ASSISTANT, "b"),
        (USER, "c d"),
        (ASSISTANT, "d e\n"),
        (USER, "f"),
        (ASSISTANT, "g"),
    ],
    "odd beginnings": [(USER, "\n x"), (ASSISTANT, "\nAnswer"), (USER, " y "), (ASSISTANT, "  spaces, é and 🙂")],
    "two new lines": [(USER, "x"), (ASSISTANT, "\n\nAnswer")],
    "empty": [(USER, ""), (ASSISTANT, "")],
    "the user last": [(USER, "a"), (ASSISTANT, "b"), (USER, "c")],
}


def messages_of(pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def encoded(tokenizer, messages, **options):
    options = {"loss_on": "assistant"} | options
    (one,) = encode_turns(tokenizer, [render_turns(tokenizer, messages, **options)])
    return one


def real(name):
    base = os.environ.get("SMOLLM_TEST_DATA")
    if not base:
        pytest.skip("SMOLLM_TEST_DATA names no folder with tokenizer/base and tokenizer/instruct")
    return Path(base, "tokenizer", name)


@pytest.fixture(scope="module", params=["small", "SmolLM2"])
def both(request, tmp_path_factory):
    """A tokenizer of ours, and the same in transformers."""
    transformers = pytest.importorskip("transformers")
    ours = chat_tokenizer()
    if request.param == "SmolLM2":
        ours, _ = with_chat_template(Tokenizer(real("base")), "chatml", "base")
    ours.save(folder := tmp_path_factory.mktemp("tokenizer"))
    return ours, transformers.AutoTokenizer.from_pretrained(folder)


def expected(theirs, messages):
    found = theirs.apply_chat_template(
        messages, chat_template=TAGGED, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return found["input_ids"], [bool(x) for x in found["assistant_masks"]]


@pytest.mark.parametrize("name", TALKS)
def test_ids_and_mask_are_those_of_transformers_with_generation_tags(name, both):
    ours, theirs = both
    one = encoded(ours, messages_of(TALKS[name]))
    assert (one.ids.tolist(), one.trained.tolist()) == expected(theirs, messages_of(TALKS[name]))
    assert one.trained.any()


def test_random_conversations_agree_with_transformers_too(both):
    ours, theirs = both
    for messages in make_talks(40, seed=3):
        one = encoded(ours, messages)
        assert (one.ids.tolist(), one.trained.tolist()) == expected(theirs, messages)


def test_the_stock_template_of_smollm2_instruct_gives_the_same_spans(tmp_path):
    for name in ("base", "instruct"):  # the second has its settings alone
        shutil.copytree(real(name), tmp_path, dirs_exist_ok=True)
    tokenizer, note = with_chat_template(Tokenizer(tmp_path), "auto", "instruct")
    one = encoded(tokenizer, messages_of(TALKS["three turns"]))
    words = re.findall(r"«(.*?)»", spelled(tokenizer, one), re.DOTALL)
    assert words == ["b<|im_end|>", "d e\n<|im_end|>", "g<|im_end|>"]
    assert "its own" in note
    assert spelled(tokenizer, one).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")


def spelled(tokenizer, one):
    parts = np.split(one.ids, np.flatnonzero(np.diff(one.trained)) + 1)
    marks = np.split(one.trained, np.flatnonzero(np.diff(one.trained)) + 1)
    texts = (tokenizer.decode(ids, skip_special=False) for ids in parts)
    return "".join(f"«{text}»" if mark[0] else text for text, mark in zip(texts, marks, strict=True))


def test_an_end_of_turn_that_a_message_spells_out_ends_nothing():
    tokenizer = chat_tokenizer()
    end = turn_end(tokenizer)
    one = encoded(tokenizer, messages_of([(USER, "a<|im_end|>b"), (ASSISTANT, "the<|im_end|>\n model")]))
    assert (one.ids == end).sum() == 2
    assert re.findall(r"«(.*?)»", spelled(tokenizer, one), re.DOTALL) == ["the<|im_end|>\n model<|im_end|>"]


def test_all_trains_everything_and_a_prompt_s_answers_are_not_trained():
    tokenizer, messages = chat_tokenizer(), messages_of(TALKS["three turns"])
    assert encoded(tokenizer, messages, loss_on="all").trained.all()
    one = encoded(tokenizer, messages, trained_from=4)
    assert re.findall(r"«(.*?)»", spelled(tokenizer, one)) == ["g<|im_end|>"]


def test_turns_end_where_the_text_may_be_cut():
    tokenizer, messages = chat_tokenizer(), messages_of(TALKS["three turns"])
    one = encoded(tokenizer, messages)
    cuts = [tokenizer.decode(one.ids[:end], skip_special=False) for end in one.ends]
    assert [cut[-len("X<|im_end|>\n") :] for cut in cuts] == ["b<|im_end|>\n", "\n<|im_end|>\n", "g<|im_end|>\n"]
    assert len(encoded(tokenizer, messages, loss_on="all").ends) == 6


# drops the thoughts of earlier turns, as Qwen3's does
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_renders_a_turn_otherwise_later_is_refused(tmp_path):
    (tmp_path / "forgetful.jinja").write_text(FORGETFUL)
    tokenizer, _ = with_chat_template(chat_tokenizer(), str(tmp_path / "forgetful.jinja"), "small")
    thoughtful = messages_of([(USER, "a"), (ASSISTANT, "hm</think>b"), (USER, "c"), (ASSISTANT, "d")])
    with pytest.raises(TemplateMisfit, match="message 2 otherwise if more messages follow"):
        render_turns(tokenizer, thoughtful, loss_on="assistant")
    encoded(tokenizer, messages_of(TALKS["three turns"]))  # nothing to forget


def test_a_base_tokenizer_gets_chatml_and_its_end_of_turn_as_eos(tmp_path):
    bare = train_tokenizer(make_texts(50), 300, chat=True)
    tokenizer, note = with_chat_template(bare, "auto", "small")
    assert note == "template    chatml; a turn ends with <|im_end|>, which becomes the eos"
    assert (bare.eos_id, tokenizer.eos_id, turn_end(tokenizer)) == (0, 2, 2)
    assert tokenizer.bos_id == 1
    tokenizer.save(tmp_path)
    again = Tokenizer(tmp_path)
    assert again.chat_template == CHATML
    assert again.settings["pad_token"] == again.settings["eos_token"] == "<|im_end|>"
    assert again.fingerprint == bare.fingerprint


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            "auto",
            "--tokenizer small has no special token <|im_start|>, which chatml needs",
        ),
        (
            "chatml",
            "--tokenizer small has no special token <|im_start|>, which chatml needs",
        ),
        ("no.jinja", "--chat-template no.jinja: expected chatml or a file of a Jinja template"),
        (
            "{% for m in messages %}{{ m['content'] }}\n{% endfor %}",
            "ends the assistant's turn with no special",
        ),
        ("{{ raise_exception('no') }}", "the chat template refuses this conversation: TemplateError: no"),
        ("{% for %}", "the chat template refuses this conversation: TemplateSyntaxError"),
        (" \n", "is empty"),
        (CHATML + "{{ strftime_now('%Y') }}", "writes the date, so that a resumed run would read other rows"),
    ],
)
def test_a_template_that_cannot_be_used_gets_one_line(template, expected, tmp_path):
    if "{" in template or template.isspace():
        (tmp_path / "given.jinja").write_text(template)
        template = str(tmp_path / "given.jinja")
    bare = train_tokenizer(make_texts(50), 300)
    with pytest.raises(UserError) as error:
        with_chat_template(bare, template, "small")
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_a_template_of_eos_alone_needs_no_tokens_of_its_own(tmp_path):
    (tmp_path / "plain.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"
        "{{ eos_token if m['role'] == 'assistant' else '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer, _ = with_chat_template(train_tokenizer(make_texts(50), 300), str(tmp_path / "plain.jinja"), "small")
    one = encoded(tokenizer, messages_of(TALKS["three turns"]))
    assert re.findall(r"«(.*?)»", spelled(tokenizer, one), re.DOTALL)[0] == "b<|endoftext|>"
    assert turn_end(tokenizer) == tokenizer.eos_id == 0
