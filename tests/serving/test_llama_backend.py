"""The llama.cpp back end beside JAX: with the library itself if it is installed, and with a stand-in for it."""

import ctypes
import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smollm_jax.config.architecture import ModelConfig
from smollm_jax.generation.sampling import Sampling
from smollm_jax.hf.export import export_folder
from smollm_jax.hf.gguf_export import export_gguf
from smollm_jax.hf.gguf_model import read_gguf
from smollm_jax.model.transformer import SmolLM, init_params
from smollm_jax.runs.load import load_model
from smollm_jax.runtime.errors import UserError
from smollm_jax.serving import app
from smollm_jax.serving.completion import open_completer
from smollm_jax.tokenizer.load import train_tokenizer
from tests.support.server import TEXTS

CONFIG = ModelConfig(
    vocab_size=320, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16,
    intermediate_size=64, max_seq_len=48, rope_theta=10_000.0, initializer_range=0.2,
)  # fmt: skip
OURS = ("smollm_jax.serving.llama_backend", "smollm_jax.serving.llama_library")
PROMPT = "the cat sat on"
COUNTED = {"presence_penalty": 0.3, "frequency_penalty": 0.4, "logit_bias": ((40, 2.0), (50, -3.0))}
DRAWN = {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "seed": 5}


def stand_in():
    """A module like llama_cpp that computes with our model, and refuses what llama.cpp would crash on."""

    def load(path, _):
        if not path.endswith(b".gguf"):
            return None
        config, params, _ = read_gguf(Path(path.decode()))
        model = SmolLM.from_params(config, jax.tree.map(jnp.asarray, params))
        logits_of = jax.jit(lambda ids_1T: model.features(ids_1T)[0] @ model.head_VD.T)
        return SimpleNamespace(logits_of=logits_of, entries=config.vocab_size)

    def context_of(model, params):
        exact = params.type_k == params.type_v == module.GGML_TYPE_F32
        assert exact == (getattr(params, "flash_attn_type", None) == 0), "flash attention computes in f16"
        return SimpleNamespace(logits_of=model.logits_of, ids=[], most=params.n_batch, size=params.n_ctx)

    def init(most, *_):
        return SimpleNamespace(
            n_tokens=0, token=[0] * most, pos=[0] * most, n_seq_id=[0] * most,
            seq_id=[[None] for _ in range(most)], logits=[False] * most,
        )  # fmt: skip

    def remove(memory, _sequence, start, _end):
        del memory.ids[start:]
        return True

    def decode(context, batch):
        n = batch.n_tokens
        assert 0 < n <= context.most
        assert batch.pos[:n] == list(range(len(context.ids), len(context.ids) + n))
        assert batch.n_seq_id[:n] == [1] * n
        assert [ids[0] for ids in batch.seq_id[:n]] == [0] * n
        context.ids += batch.token[:n]
        if len(context.ids) > context.size:
            return 1
        padded = np.pad(context.ids, (0, context.size - len(context.ids)))  # one program
        logits_TV = np.asarray(context.logits_of(padded[None]), np.float32)[
            len(context.ids) - n : len(context.ids)
        ]
        context.logits = np.ascontiguousarray(logits_TV[np.array(batch.logits[:n])])
        return 0

    module = ModuleType("llama_cpp")
    module.GGML_TYPE_F16, module.GGML_TYPE_F32 = 1, 0
    module.LLAMA_FLASH_ATTN_TYPE_DISABLED = 0
    module.llama_log_callback = lambda function: function
    module.llama_log_set = module.llama_backend_init = lambda *_: None
    module.llama_model_free = module.llama_free = lambda _: None
    module.llama_model_default_params = module.llama_context_default_params = SimpleNamespace
    module.llama_model_load_from_file, module.llama_init_from_model = load, context_of
    module.llama_model_get_vocab, module.llama_vocab_n_tokens = lambda model: model, lambda vocab: vocab.entries
    module.llama_batch_init, module.llama_batch_free = init, lambda _: None
    module.llama_get_memory, module.llama_memory_seq_rm = lambda context: context, remove
    module.llama_decode = decode
    module.llama_get_logits = lambda context: context.logits.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return module


@pytest.fixture(scope="module", params=["stand-in", "llama.cpp"])
def library(request):
    if request.param == "llama.cpp":
        pytest.importorskip("llama_cpp")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "stand-in":
            patch.setitem(sys.modules, "llama_cpp", stand_in())
        for name in OURS:
            patch.delitem(sys.modules, name, raising=False)
        yield request.param
        for name in OURS:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("model")
    train_tokenizer(TEXTS, CONFIG.vocab_size).save(base / "tokenizer")
    params = init_params(CONFIG, 3)
    export_folder(params, CONFIG, base / "export", tokenizer_folder=base / "tokenizer", verify=False)
    return base / "export"


@pytest.fixture(scope="module")
def engines(folder, library):  # noqa: ARG001 - the module of the back end is imported anew
    opened = {name: open_completer(folder, backend=name, dtype="float32") for name in ("jax", "llama")}
    assert opened["llama"].about == "llama.cpp, f32"
    return opened


def text_of(completer, prompt=PROMPT, **settings):
    chunks = list(completer.stream(prompt, Sampling(**settings)))
    return "".join(chunk.text for chunk in chunks), chunks[-1].reason, chunks[-1].tokens


@pytest.mark.parametrize(
    "settings",
    [{}, {"repetition_penalty": 1.3}, DRAWN | {"min_p": 0.05, "repetition_penalty": 1.2} | COUNTED],
    ids=["greedy", "penalty", "all"],
)
def test_a_text_is_the_one_of_jax(engines, settings):
    found, expected = (text_of(engines[name], max_new_tokens=20, **settings) for name in ("llama", "jax"))
    assert found == expected
    assert text_of(engines["llama"], max_new_tokens=20, **settings) == expected, "the cache of the first is gone"


def test_texts_end_at_the_length_the_context_and_a_stop_id(engines):
    llama, jax = engines["llama"], engines["jax"]
    ids = llama.encode(PROMPT)
    assert text_of(llama, max_new_tokens=3)[1:] == ("length", 3)
    assert text_of(llama, max_new_tokens=500)[1:] == ("context", CONFIG.max_seq_len - len(ids))
    [first, *_] = next(iter(jax.engine.stream(ids, Sampling(max_new_tokens=1))))
    assert list(llama.engine.stream(ids, Sampling(max_new_tokens=5, stop_ids=(first,)))) == []
    assert llama.engine.stop_reason == "eos"
    again = Sampling(max_new_tokens=5, stop_ids=(first,), min_new_tokens=1)
    assert list(llama.engine.stream(ids, again)) == [[x] for [*xs] in jax.engine.stream(ids, again) for x in xs]


def test_a_long_prompt_is_read_in_parts_and_can_be_cancelled(engines, monkeypatch):
    llama = engines["llama"]
    module = importlib.import_module("smollm_jax.serving.llama_backend")
    expected = text_of(llama, max_new_tokens=8)
    monkeypatch.setattr(module, "PART", 2)
    assert text_of(llama, max_new_tokens=8)[0] == expected[0]
    asked = iter([False, True])
    monkeypatch.setattr(llama.engine, "cancelled", lambda: next(asked))
    assert list(llama.engine.stream(llama.encode(PROMPT), Sampling(max_new_tokens=8))) == []
    assert llama.engine.stop_reason == "cancelled"


def test_scores_are_those_of_jax(engines, monkeypatch):
    ids = engines["jax"].encode(PROMPT * 3)
    monkeypatch.setattr(importlib.import_module("smollm_jax.serving.llama_backend"), "SCORED", 5)
    found, expected = ([score for part in engines[name].score(ids) for score in part] for name in ("llama", "jax"))
    assert len(found) == len(ids) - 1
    made = list(
        engines["llama"].engine.stream_scored(ids[:5], Sampling(max_new_tokens=4, seed=3, temperature=0.8))
    )
    text = ids[:5] + [token for [(token, _)] in made]
    found += [score for [(_, score)] in made]
    expected += [score for part in engines["jax"].score(text) for score in part][4:]
    for one, other in zip(found, expected, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert one.is_likeliest == other.is_likeliest
        assert [i for i, _ in one.likeliest] == [i for i, _ in other.likeliest]


def test_a_gguf_file_keeps_its_format_and_a_new_checkpoint_is_another_engine(folder, library, tmp_path):  # noqa: ARG001
    config, params, tokenizer = load_model(folder)
    file, _ = export_gguf(params, config, tokenizer, tmp_path / "out", dtype="q8_0")
    completer = open_completer(file, backend="llama")
    assert completer.about == "llama.cpp, F32 and Q8_0, 8.63 bits per weight"
    assert text_of(completer, max_new_tokens=4)[2] == 4
    other = completer.rebuild(config, init_params(CONFIG, 4))
    ids = completer.encode(PROMPT)
    texts = [list(engine.stream(ids, Sampling(max_new_tokens=12))) for engine in (completer.engine, other)]
    assert texts[0] != texts[1]
    other.unload()


def test_what_cannot_be_loaded_is_a_line(folder, library, monkeypatch):
    module = importlib.import_module("smollm_jax.serving.llama_backend")
    with pytest.raises(UserError, match=r"llama\.cpp cannot load .*/nothing"):
        module.LlamaEngine(folder / "nothing", CONFIG)
    if library == "stand-in":
        monkeypatch.setitem(sys.modules, "llama_cpp", None)
        for name in OURS:
            monkeypatch.delitem(sys.modules, name)
        with pytest.raises(UserError, match="--backend llama needs llama-cpp-python: pip install"):
            open_completer(folder, backend="llama")


def test_a_gguf_file_is_served_by_llama_cpp_if_it_is_installed(folder, tmp_path, monkeypatch):
    config, params, tokenizer = load_model(folder)
    file, _ = export_gguf(params, config, tokenizer, tmp_path / "out", dtype="f16", verify=False)
    monkeypatch.setitem(sys.modules, "llama_cpp", stand_in())
    for installed, expected in (((), "jax"), (("llama_cpp",), "llama"), (("torch", "transformers"), "jax")):
        monkeypatch.setattr(app, "find_spec", lambda name, there=installed: name in there or None)
        assert app.default_backend(str(file)) == expected
    monkeypatch.setattr(app, "find_spec", lambda _: True)
    assert app.default_backend(str(folder)) == "torch"
    monkeypatch.setitem(sys.modules, "llama_cpp", None)  # its library does not load
    assert app.default_backend(str(file)) == "jax"
