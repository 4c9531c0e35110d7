"""Tokenizers trained on texts or read from folders, and errors in one line."""

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smollm_jax.runtime.errors import UserError
from smollm_jax.tokenizer.chat_template import encode_chat
from smollm_jax.tokenizer.load import load_tokenizer, train_tokenizer
from smollm_jax.tokenizer.tokenizer import EOS, Tokenizer
from tests.support.families import tokenizer_folder
from tests.support.paths import ROOT
from tests.support.texts import make_texts

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(make_texts(50), 300)


@given(TEXT)
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back_from_its_ids(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special=False) == text
    assert int(tokenizer.token_bytes[ids].sum()) == len(text.encode())


@given(st.lists(TEXT, max_size=5))
@settings(max_examples=50, deadline=None)
def test_a_batch_gives_the_same_ids_as_each_text_alone(tokenizer, texts):
    batch = tokenizer.encode_batch(texts)
    assert all(np.array_equal(ids, tokenizer.encode(text)) for ids, text in zip(batch, texts, strict=True))


def test_a_document_that_spells_out_the_end_of_text_does_not_end_itself(tokenizer):
    ids = tokenizer.encode(f"before {EOS} after")
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == f"before {EOS} after"


def test_training_gives_the_same_tokenizer_in_every_process():
    # another hash seed, and another number of threads
    script = (
        "from smollm_jax.tokenizer.load import train_tokenizer\nfrom tests.support.texts import make_texts\n"
        "print(train_tokenizer(make_texts(400, longest=200), 700).fingerprint)"
    )
    prints = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": seed, "PYTHONPATH": str(ROOT), "PATH": ""},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2", "5")
    }  # fmt: skip
    assert len(prints) == 1


def test_saving_and_loading_keep_every_file_and_every_id(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "kept")
    again = load_tokenizer(str(tmp_path / "kept"))
    assert again.files == tokenizer.files
    assert again.fingerprint == tokenizer.fingerprint
    assert again.eos_id == tokenizer.eos_id == 0
    text = " ".join(make_texts(5)) + EOS
    assert np.array_equal(again.encode(text), tokenizer.encode(text))


def test_truncation_and_padding_in_a_file_are_ignored(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
        "pad_type_id": 0, "pad_token": EOS,
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    for text in ("a", " ".join(make_texts(3))):
        assert np.array_equal(Tokenizer(tmp_path).encode(text), tokenizer.encode(text))


def test_the_vocabulary_has_the_size_asked_for_and_eos_first(tokenizer):
    assert tokenizer.vocab_size == 300
    assert tokenizer.decode([0], skip_special=False) == EOS
    assert tokenizer.token_bytes[0] == 0
    assert (tokenizer.token_bytes[1:] > 0).all()


@pytest.mark.parametrize("name", ["train:", "train:many", "train:-5", "train:256", "train:1.5"])
def test_an_impossible_vocabulary_size_is_refused(name):
    with pytest.raises(ValueError, match=f"--tokenizer {name}"):
        load_tokenizer(name, documents=["a"])


def test_a_folder_without_a_usable_tokenizer_is_refused_in_one_line(tokenizer, tmp_path):
    def refused(match):
        with pytest.raises(ValueError, match=match) as caught:
            load_tokenizer(str(tmp_path))
        assert "\n" not in str(caught.value)

    refused("no tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    refused("tokenizer.json cannot be read")
    (tmp_path / "tokenizer.json").write_bytes(b"\xff")
    refused("tokenizer.json cannot be read")
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</nothing>"}')
    refused("no end-of-text token '</nothing>'")
    (tmp_path / "tokenizer_config.json").write_text("{broken")
    refused("tokenizer_config.json cannot be read")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|endoftext|>"}}')
    assert load_tokenizer(str(tmp_path)).eos_id == 0
    with pytest.raises(ValueError, match="no tokenizer folder"):
        load_tokenizer(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("long", ["GATTACA" * 60_000, " " * 300_000, "".join(map(chr, range(0x4E00, 0x9000))) * 4])
def test_a_very_long_word_does_not_take_the_square_of_its_length(long):
    began = time.process_time()
    tokenizer = train_tokenizer([*make_texts(50), long], 400)
    assert time.process_time() - began < 20
    assert tokenizer.decode(tokenizer.encode(long[:9_000])) == long[:9_000]


def test_words_of_common_length_train_the_tokenizer_of_before():
    texts = [*make_texts(50), "中文 \u2028 é"]
    assert train_tokenizer(texts, 300).fingerprint.startswith("68509bc7e3fda5cf")


def test_a_panic_of_the_library_is_an_ordinary_error(tmp_path):
    train_tokenizer(["plain text"] * 4, 300).save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer.json").read_text())
    # a pattern that gives up on long rows of dashes, in which case the library panics
    replace = {"type": "Replace", "pattern": {"Regex": "(-+-+)+y"}, "content": ""}
    settings["decoder"] = {"type": "Sequence", "decoders": [settings["decoder"], replace]}
    settings["normalizer"] = replace
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer(tmp_path)
    with pytest.raises(UserError, match="the tokenizer fails"):
        tokenizer.encode("-" * 200)
    with pytest.raises(UserError, match="the tokenizer fails"):
        tokenizer.decode([tokenizer.encode("-")[0]] * 200)


def test_half_a_character_in_the_settings_is_no_token_and_in_a_template_no_traceback(tokenizer, tmp_path):
    """JSON can hold a lone surrogate, and a template can write one; the library takes neither."""
    tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"eos_token": "\ud800"}))
    with pytest.raises(UserError, match="has no end-of-text token"):
        Tokenizer(tmp_path)
    file.write_text(json.dumps(settings | {"bos_token": "\ud800", "chat_template": "{{ '\ud800' }}a"}))
    hostile = Tokenizer(tmp_path)
    assert hostile.bos_id is None
    with pytest.raises(UserError, match="the chat template refuses this conversation"):
        encode_chat(hostile, [{"role": "user", "content": "Hi"}])


def damaged(family, folder, change):
    """A tokenizer of the family, with `change` made in its tokenizer.json."""
    file = tokenizer_folder(family, folder) / "tokenizer.json"
    settings = json.loads(file.read_text())
    change(settings)
    file.write_text(json.dumps(settings))
    return Tokenizer(folder)


def test_a_tokenizer_without_its_unknown_token_fails_in_one_line(tmp_path):
    tokenizer = damaged("words", tmp_path, lambda settings: settings["model"].update(unk_token="nix"))
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_part(text, "text")):
        with pytest.raises(UserError, match=r"the tokenizer fails .*\[UNK\]"):
            encode("zebra")


def test_an_id_of_no_entry_is_refused_as_no_embedding_has_it(tmp_path):
    def change(settings):
        settings["post_processor"]["special_tokens"]["<s>"]["ids"] = [9_999]

    with pytest.raises(UserError, match="gives id 9999, and has entries up to"):
        damaged("byte fallback", tmp_path, change).encode("a text")


def test_a_text_that_a_tokenizer_drops_has_no_counts(tokenizer):
    assert tokenizer.byte_counts("dropped", np.zeros(0, np.int32)).shape == (0,)


def test_offsets_beyond_a_text_do_not_matter_to_its_counts(tokenizer, monkeypatch):
    ids = tokenizer.encode("some text")
    beyond = SimpleNamespace(encode=lambda *_, **__: SimpleNamespace(offsets=[(0, 99)] * len(ids)))
    monkeypatch.setattr(tokenizer, "_fast", beyond)
    monkeypatch.setitem(vars(tokenizer), "token_bytes", np.zeros(tokenizer.vocab_size, np.int32))
    assert tokenizer.byte_counts("some text", ids).sum() == len("some text")
