"""Tokenizers that are no byte-level BPE: streamed text, counted bytes, and the ids that transformers makes."""

import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smollm_jax.data.heldout import pack_to_score
from smollm_jax.data.shuffle import tokenize
from smollm_jax.tokenizer.chat_template import encode_chat
from smollm_jax.tokenizer.streaming import TextOfIds
from smollm_jax.tokenizer.tokenizer import Tokenizer
from tests.support.families import FAMILIES, tokenizer_folder

WORDS = st.sampled_from(["the", " cat", "sat ", "5€", "中文", "😀", "\n", "  ", "é", "isn't", " .", "�", "The"])
ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
TEXT = st.lists(WORDS | ANY, max_size=12).map("".join)
EACH = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("families")
    return {family: tokenizer_folder(family, base / family) for family in FAMILIES}


@pytest.fixture(scope="module")
def opened(folders):
    return {family: Tokenizer(folder) for family, folder in folders.items()}


def streamed(tokenizer, prompt, ids, step):
    text = TextOfIds(tokenizer, prompt)
    return "".join(text.feed(ids[i : i + step]) for i in range(0, len(ids), step)) + text.rest()


@EACH
@given(texts=st.tuples(TEXT, TEXT), numbers=st.lists(st.integers(0, 10_000), max_size=30), step=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_streamed_text_is_the_text_of_all_ids_at_once(opened, family, texts, numbers, step):
    tokenizer = opened[family]
    prompt = tokenizer.encode(texts[0]).tolist()
    whole = tokenizer.encode_part(texts[1], "text")
    random = [number % tokenizer.vocab_size for number in numbers]
    for ids in (whole, random):
        begun, all_of_it = tokenizer.decode(prompt), tokenizer.decode([*prompt, *ids])
        if all_of_it.startswith(begun):  # else an id has changed what the prompt decodes to
            assert streamed(tokenizer, prompt, ids, step) == all_of_it[len(begun) :]
        assert streamed(tokenizer, [], ids, step) == tokenizer.decode(ids)


def test_a_character_that_a_prompt_began_is_finished(opened):
    for family in ("byte level", "byte fallback"):
        ids = opened[family].encode_part("a😀 the", "text")
        cut = next(
            i for i in range(len(ids)) if opened[family].decode(ids[:i]).endswith("\N{REPLACEMENT CHARACTER}")
        )
        assert streamed(opened[family], ids[:cut], ids[cut:], 1) == "😀 the"


def test_spaces_survive_a_row_of_special_tokens(opened):
    tokenizer = opened["byte fallback"]
    word = tokenizer.encode_part("the", "text")
    assert streamed(tokenizer, [*word, *[3] * 9], word, 1) == " the"


@EACH
@given(texts=st.lists(TEXT, min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_the_bytes_of_the_ids_are_the_bytes_of_the_text(opened, family, texts):
    tokenizer = opened[family]
    for document, ids in tokenize([SimpleNamespace(text=text) for text in texts], tokenizer):
        assert tokenizer.byte_counts(document.text, ids).sum() == len(document.text.encode())
        assert (tokenizer.byte_counts(document.text, ids) >= 0).all()


def test_the_bytes_of_an_id_are_those_inside_of_a_text(opened):
    text = "cat sat on 5€ mat"  # from the second token on, and alone, as a table must
    for family in ("byte fallback", "metaspace"):
        tokenizer = opened[family]
        assert tokenizer.token_bytes[tokenizer.encode(text)].sum() == len(text.encode()) + 1, family
    tokenizer = opened["word piece"]
    ids = tokenizer.encode_part("the cat sat", "text")
    assert tokenizer.token_bytes[ids].sum() == len(" the cat sat")


def test_an_added_token_counts_its_own_bytes(folders, tmp_path):
    told = json.loads((folders["byte level"] / "tokenizer.json").read_text())
    size = len(told["model"]["vocab"])
    told["added_tokens"].append({"id": size, "content": "日本", "single_word": False, "lstrip": False,
                                 "rstrip": False, "normalized": True, "special": False})  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(told))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert Tokenizer(tmp_path).token_bytes[size] == 6


@EACH
def test_scored_batches_know_the_bytes_of_their_documents(opened, family):
    tokenizer, texts = opened[family], ["The Cat sat.  ", "5€ in 中文", "a", "the thing isn't naïve"]
    documents = list(tokenize([SimpleNamespace(text=text) for text in texts], tokenizer))
    batches = list(pack_to_score(documents, tokenizer, 8, 2))
    first = sum(int(tokenizer.byte_counts(d.text, ids)[0]) for d, ids in documents)
    found = 0
    for batch in batches:
        same = (batch.segment_ids[:, :-1] == batch.segment_ids[:, 1:]) & (batch.segment_ids[:, 1:] != 0)
        found += int(batch.text_bytes[:, 1:][same].sum())
    assert found == sum(len(text.encode()) for text in texts) - first


@EACH
def test_ids_are_those_of_transformers(folders, opened, family):
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folders[family])
    for text in ("the cat", "  5€ 中文 isn't", "The"):
        assert opened[family].encode(text).tolist() == theirs(text).input_ids
    assert opened[family].bos_id == theirs.bos_token_id
    parsing, text = Tokenizer(folders[family], special_tokens="parse"), "<|im_start|>user\nHi</s> <|im_end|>\n"
    assert parsing.encode(text).tolist() == theirs(text).input_ids
    special = {opened[family].special_tokens[token] for token in ("<|im_start|>", "<|im_end|>")}
    spelled = opened[family].encode(text)  # a Unigram model has them in its own vocabulary
    assert not special & set(spelled.tolist())
    assert not special & set(opened[family].encode_part(text, "text"))


def test_a_document_ends_once(opened):
    for family in ("byte fallback", "word piece"):  # the second one's own post-processor ends it
        ((_, ids),) = tokenize([SimpleNamespace(text="the cat")], opened[family])
        assert (ids[0], ids[-1], (ids == 2).sum()) == (1, 2, 1)


def test_a_run_begun_without_bos_goes_on_without_it(folders):
    tokenizer = Tokenizer(folders["byte fallback"])
    ids, now = tokenizer.encode("the cat"), tokenizer.fingerprint
    tokenizer.encode_as_of(now[:16])
    assert np.array_equal(tokenizer.encode("the cat"), ids)
    tokenizer.encode_as_of("0" * 16)  # what a run of before has: the hash of tokenizer.json alone
    assert np.array_equal(tokenizer.encode("the cat"), ids[1:])
    assert tokenizer.fingerprint != now
    plain = Tokenizer(folders["byte level"])
    before = plain.fingerprint
    plain.encode_as_of("0" * 16)
    assert plain.fingerprint == before


TALK = [{"role": "user", "content": "hi the cat"}, {"role": "assistant", "content": "a mat"},
        {"role": "user", "content": "why"}]  # fmt: skip
LOOP = "{% for m in messages %}"
TEMPLATES = {
    "generation": LOOP + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}User: {{ m.content }}\n{% endif %}{% endfor %}",
    "generation, trimmed": LOOP + "{%- generation -%} {% set x = 1 %}\n {{ m.content }} {%- endgeneration %}\n"
    "{{ x is defined }}{% endfor %}",
    "tools are none": "{% if tools is not none %}{{ tools | length }}{% endif %}{{ bos_token }}"
    "{{ messages[0].content }}",
    "names that are not": "{{ pad_token is defined }}{{ cls_token is defined }}{{ unk_token }}",
    "json with an indent": "{{ messages | tojson(indent=2) }}{{ messages | tojson(false) }}",
    "loop controls": LOOP + "{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}",
    "a date": "{{ strftime_now('%Y-%f') | length }}{{ messages[0].content }}",
    "special": LOOP + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("family", ["byte level", "byte fallback", "metaspace"])
def test_a_template_means_what_it_means_to_transformers(tmp_path, family, name):
    theirs = pytest.importorskip("transformers").AutoTokenizer
    folder = tokenizer_folder(family, tmp_path, chat_template=TEMPLATES[name])
    expected = theirs.from_pretrained(folder).apply_chat_template(TALK, add_generation_prompt=True)
    assert encode_chat(Tokenizer(folder), TALK) == expected["input_ids"]


def test_messages_are_parsed_only_if_asked(tmp_path):
    folder = tokenizer_folder("byte level", tmp_path, chat_template=TEMPLATES["special"])
    talk = [{"role": "user", "content": "hi<|im_end|>"}]
    assert encode_chat(Tokenizer(folder), talk).count(4) == 1
    assert encode_chat(Tokenizer(folder, special_tokens="parse"), talk).count(4) == 2
    assert encode_chat(Tokenizer(folder), talk, "parse").count(4) == 2
    assert encode_chat(Tokenizer(folder, special_tokens="parse"), talk, "text").count(4) == 1


def test_what_happens_to_special_tokens_is_said_with_a_count(folders):
    tokenizer = Tokenizer(folders["byte level"])
    tokenizer.encode_batch(["the cat", "<|im_start|>user", "a </s>"])
    assert tokenizer.describe_special() == (
        "special tokens in a text stay text (other: --special-tokens parse); 2 of 3 texts so far spell one out"
    )
    assert "become ids" in Tokenizer(folders["byte level"], special_tokens="parse").describe_special()


def test_a_run_begun_with_a_unigram_model_s_special_ids_goes_on_with_them(folders):
    tokenizer, text = Tokenizer(folders["unigram"]), "Hi</s> <|im_end|>"
    before = hashlib.sha256(tokenizer.files["tokenizer.json"]).hexdigest()
    assert tokenizer.fingerprint != before
    tokenizer.encode_as_of(before[:16])
    assert tokenizer.special_tokens["<|im_end|>"] in tokenizer.encode(text)
    tokenizer = Tokenizer(folders["unigram"])
    tokenizer.encode_as_of(tokenizer.fingerprint[:16])
    assert tokenizer.special_tokens["<|im_end|>"] not in tokenizer.encode(text)
