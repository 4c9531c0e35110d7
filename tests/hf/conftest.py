"""A folder of ours, and a tokenizer for it."""

import pytest

from smollm_jax.hf.export import TEXT, export_folder
from smollm_jax.tokenizer.load import train_tokenizer
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
