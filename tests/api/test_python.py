"""Train, load, generate, score and serve from Python, without a process of its own."""

# ruff: noqa: ARG005

import logging
import os
import re
import signal
import sys
import threading
import time

import httpx
import jax
import numpy as np
import pytest

import smollm_jax as s
from smollm_jax.api.process import OF_JAX
from smollm_jax.api.training import settings_of
from smollm_jax.config.defaults import default_settings
from smollm_jax.generation.generator import SCORED
from smollm_jax.runs.records import read_metrics
from smollm_jax.runtime.signals import AGAIN_SECONDS, Interrupt
from tests.support.paths import ROOT

SMALL = {
    "tokenizer": "train:300", "hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1,
    "head_dim": 16, "intermediate_size": 32, "seq_len": 32, "batch_size": 2, "shuffle_window": 16,
    "eval_documents": 5, "sample_tokens": 0, "max_seq_len": 640, "log_every": 1,
}  # fmt: skip

OF_LIBRARIES = ("CRC32C_SW_MODE", "TORCHINDUCTOR_CACHE_DIR")  # set by tensorstore and torch, once


def surroundings():
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    settings = {name: getattr(jax.config, f"jax_{name}") for name in OF_JAX}
    root = logging.getLogger()
    ours = {name: value for name, value in os.environ.items() if name not in OF_LIBRARIES}
    return handlers, settings, root.level, list(root.handlers), ours, sys.unraisablehook


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("api") / "run"


@pytest.fixture(scope="module")
def small(corpus):
    return SMALL | {"data": f"{corpus}/*.jsonl"}


@pytest.fixture(scope="module")
def run(folder, small):
    kept = logging.FileHandler(folder.parent / "log", "w")
    logging.getLogger().addHandler(kept)
    before = surroundings()
    run = s.train("quickstart", 4, run_dir=folder, checkpoint_every=2, **small)
    assert surroundings() == before
    logging.getLogger().error("still here")
    logging.getLogger().removeHandler(kept)
    kept.close()
    assert "still here" in (folder.parent / "log").read_text()
    return run


@pytest.fixture(scope="module")
def model(run):
    return run.load()


def test_a_run_has_its_folder_metrics_curve_export_and_models(run, folder, small):
    assert (run.folder, run.step, run.finished, run.stopped) == (folder, 4, True, False)
    assert [line["step"] for line in run.metrics if "loss" in line] == [1, 2, 3, 4]
    assert run.export == folder / "export"
    assert run.plot()._repr_png_().startswith(b"\x89PNG")
    assert "finished at step 4 of 4" in repr(s.Run(folder))
    words = "the cat sat on a mat"
    first, last = (run.load(step=step).logprobs(words) for step in (2, None))
    assert first != last
    assert s.load(run.export).logprobs(words) == last
    again = s.train("quickstart", 4, run_dir=folder, checkpoint_every=2, **small)  # it has ended already
    assert again.metrics == run.metrics


def test_text_comes_in_and_text_goes_out(model):
    options = {"temperature": 0.8, "top_p": 0.9, "seed": 3, "max_new_tokens": 12}
    one = model.generate("the cat", **options)
    assert one == "".join(model.stream("the cat", **options))
    assert model.generate(["the cat", "a mat", "the cat"], **options)[::2] == [one, one]
    assert model.generate([]) == []
    assert model.generate("the cat", **options | {"seed": None}) != model.generate(
        "the cat", **options | {"seed": None}
    )
    middle = one[len(one) // 2]
    cut = one[: one.index(middle)]
    assert model.generate("the cat", **options, stop=middle) == cut
    assert model.generate(["the cat"], **options, stop=[middle]) == [cut]
    assert "".join(model.stream("the cat", **options, stop=middle)) == cut


def test_logprobs_in_chunks_are_those_of_whole_logits(run, model):
    text = "the cat sat on a mat and saw one bird 🦀 fly over tall grey hills. " * 12
    tokens = model.logprobs(text)
    assert SCORED < len(tokens) <= model.context
    assert "".join(token.text for token in tokens) == text
    assert (tokens[0].logprob, tokens[0].is_argmax) == (None, None)
    ids = np.array([token.id for token in tokens])
    logits = np.asarray(s.load_hf(run.export)(ids[None])[0, :-1])
    expected = jax.nn.log_softmax(logits)[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose([token.logprob for token in tokens[1:]], expected, atol=1e-4)
    assert [token.is_argmax for token in tokens[1:]] == (logits.argmax(-1) == ids[1:]).tolist()
    assert model.logprobs([text, text]) == [tokens, tokens]
    assert model.logprobs("t") == [model.logprobs("to")[0]]


def test_no_chunk_of_a_long_text_is_longer_than_the_others(model, monkeypatch):
    seen, engine = [], model.completer.engine
    score = engine._score
    monkeypatch.setattr(engine, "_score", lambda *args: seen.append(args[1][0].shape) or score(*args))
    engine.logprobs([1, 2, 3] * 200)
    assert seen == [(1, engine.scored)] * -(-599 // engine.scored)


MISTAKES = {
    "generate takes texts, a list with int came": lambda m, run: m.generate([1, 2]),
    "generate takes texts, a list with int64 came": lambda m, run: m.generate(np.array([1, 2])),
    "generate takes a text or a list of texts; int came": lambda m, run: m.generate(1),
    "stream takes one text; list came": lambda m, run: m.stream(["a"]),
    "the prompt is empty": lambda m, run: m.generate(""),
    "did you mean temperature?": lambda m, run: m.generate("a", temperatur=1),
    "top_k=1.5 must be a whole number": lambda m, run: m.generate("a", top_k=1.5),
    "temperature='hot' must be a number": lambda m, run: m.generate("a", temperature="hot"),
    "stop=3 must be a text": lambda m, run: m.generate("a", stop=3),
    "logprobs takes texts": lambda m, run: m.logprobs([1]),
    "the text is empty": lambda m, run: m.logprobs(""),
    "the model reads 1 to 640": lambda m, run: m.logprobs("x " * 1_000),
    "takes a SmolLM": lambda m, run: s.generate(m, [[1]]),
    "takes lists of token ids": lambda m, run: s.generate(s.load_hf(run.export), "the cat"),
    "give [ids] for a single prompt": lambda m, run: s.generate(s.load_hf(run.export), np.array([1, 2])),
    "token ids are whole numbers; 1.5 came": lambda m, run: s.generate(s.load_hf(run.export), [[1.5]]),
    "is a run; smollm_jax.load(": lambda m, run: s.load_hf(run.folder),
    "load takes a run, a path or a Hub id": lambda m, run: s.load(3),
    "dtype='f16' must be one of": lambda m, run: s.load(run, dtype="f16"),
    "is not a run": lambda m, run: s.Run(run.folder.parent),
    "did you mean steps?": lambda m, run: s.train("quickstart", stepz=3),
    "steps must be int, 'x' came": lambda m, run: s.train("quickstart", "x"),
    "started by smollm train": lambda m, run: s.train("quickstart", coordinator="a:1"),
    "past steps 2; ask for more, or use new_run": lambda m, run: s.train("quickstart", 2, run_dir=run, **SMALL),
    "there is none": lambda m, run: s.serve(m, inline=True),
    "auth must be (user, password)": lambda m, run: s.serve(m, auth="user:password"),
}  # fmt: skip


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line(model, run, words, monkeypatch, small):
    monkeypatch.setitem(SMALL, "data", small["data"])
    with pytest.raises(s.UserError, match=re.escape(words)) as caught:
        MISTAKES[words](model, run)
    assert "\n" not in str(caught.value)
    assert caught.value._render_traceback_() == [f"UserError: {caught.value}"]  # all that a notebook shows


@pytest.mark.slow
def test_an_interrupt_saves_and_the_same_call_goes_on(tmp_path, small):
    before, asked = surroundings(), {"run_dir": tmp_path / "run", **small, "eval_every": 0, "export": False}

    def interrupt():
        deadline = time.monotonic() + 120
        while not read_metrics(tmp_path / "run"):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=interrupt)
    sender.start()
    stopped = s.train("quickstart", 4_000, **asked)
    sender.join()
    assert (stopped.stopped, stopped.finished) == (True, False)
    assert "stopped at step" in repr(stopped)
    assert surroundings() == before
    assert stopped.load().generate("the cat", max_new_tokens=2) is not None
    asked["stop_after"] = last = stopped.step + 2
    assert s.train("quickstart", 4_000, **asked).step == last


def test_a_second_interrupt_gets_through_and_a_hasty_one_does_not():
    with Interrupt() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        stop._first -= AGAIN_SECONDS
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.slow
def test_training_works_in_a_thread_that_has_no_signals(tmp_path, small):
    runs = []
    work = threading.Thread(
        target=lambda: runs.append(s.train("quickstart", 1, run_dir=tmp_path / "run", **small))
    )
    work.start()
    work.join()
    assert runs[0].finished


@pytest.mark.slow
def test_a_server_runs_beside_the_model_and_ends(model, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    threads = set(threading.enumerate())
    with s.serve(model) as server:
        page = httpx.get(server.url, timeout=30)
        assert page.status_code == 200
        assert "http://localhost:*" in page.headers["content-security-policy"].partition("frame-ancestors")[2]
        asked = {"prompt": "the cat", "max_tokens": 3, "temperature": 0}
        answer = httpx.post(f"{server.url}/v1/completions", json=asked, timeout=60).json()
        assert answer["choices"][0]["text"] == model.generate("the cat", max_new_tokens=3)
        assert server.share_url is None
    assert os.environ["HTTPS_PROXY"] == "http://127.0.0.1:9"
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url)
    assert not [t for t in set(threading.enumerate()) - threads if t.name in ("server", "model")]


def test_import_waits_for_nothing_and_the_blocks_of_the_page_are_listed():
    assert set(s.__all__) <= set(dir(s))
    assert (ROOT / "docs/python.md").read_text().count("```python") == 6


def test_every_group_of_settings_has_keywords():
    default = default_settings(recipe="replica")
    settings = settings_of(default, {"init_from": "base", "lora_rank": 4, "steps": 10, "beta1": 0.8})
    assert (settings.adapter.lora_rank, settings.run.steps, settings.optimizer.beta1) == (4, 10, 0.8)
    with pytest.raises(s.UserError, match="did you mean lora_rank"):
        settings_of(default, {"lora_rnk": 4})
