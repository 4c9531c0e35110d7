"""A folder of ours, and two tokenizers for it."""

import json

import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, pre_tokenizers, trainers

from smollm_jax.hf.export import TEXT, export_folder
from smollm_jax.tokenizer.load import train_tokenizer
from tests.support.gguf_files import CHATML
from tests.support.hf_folders import TINY, numpy_params


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([TEXT], TINY.vocab_size).save(folder)
    return folder


@pytest.fixture
def folder(tmp_path, tokenizer_folder):
    """An export of ours to damage."""
    out = tmp_path / "folder"
    export_folder(numpy_params(TINY), TINY, out, tokenizer_folder=tokenizer_folder, verify=False)
    return out


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A folder with a tokenizer of SmolLM2's kind: single digits, special tokens, one added token that is text."""
    fast = Fast(models.BPE())
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    special, alphabet = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=296, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    fast.train_from_iterator([TEXT], trainer)
    fast.add_tokens(["<think>"])
    folder = tmp_path_factory.mktemp("digits")
    fast.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": CHATML}))
    return folder
