"""lm-evaluation-harness scores the server over HTTP (its model `local-completions`) as it scores our engine."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import pytest

from smollm_jax.evaluation.scorer import Scorer
from smollm_jax.evaluation.tasks import load_tasks, run_tasks
from smollm_jax.generation.generator import Generator
from smollm_jax.hf.export import export_folder
from smollm_jax.model.transformer import SmolLM
from smollm_jax.runs.load import load_model
from tests.support.api_server import serving
from tests.support.gguf_files import WIDE
from tests.support.harness_tasks import make_tasks
from tests.support.hf_folders import numpy_params
from tests.support.texts import chat_tokenizer

for library in ("lm_eval", "tenacity", "aiohttp", "fastapi"):
    pytest.importorskip(library, reason=f"{library} is not installed; pip install 'lm_eval[api]'")
harness = pytest.importorskip("smollm_jax.evaluation.harness")
CONTEXT = 512


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    tokenizer = chat_tokenizer()
    tokenizer.save(place / "tokenizer")
    ids = {"eos_token_id": tokenizer.eos_id, "bos_token_id": tokenizer.eos_id}
    model = replace(WIDE, vocab_size=tokenizer.vocab_size, num_layers=1, max_seq_len=CONTEXT, **ids)
    export_folder(numpy_params(model), model, place / "hf", tokenizer_folder=place / "tokenizer", verify=False)
    return place / "hf"


def ours(folder):
    config, params, tokenizer = load_model(folder)
    generator = cache(lambda: Generator(SmolLM.from_params(config, jax.tree.map(jnp.asarray, params))))
    scorer = Scorer(config, jnp.dtype("float32"))
    return harness.HarnessModel(config, tokenizer, scorer=scorer, params=params, generator=generator)


def results_of(model, files):
    """Scores, and the answers to every request by task."""
    found = run_tasks(tasks := load_tasks(files, None), model)
    answers = {
        name: [answer for instance in task.instances for answer in instance.resps]
        for name, task in tasks["tasks"].items()
    }
    return found["results"], answers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "texts"),
    [(True, 7), *(pytest.param(tokens, 1, marks=pytest.mark.release) for tokens in (True, False))],
    ids=str,
)
def test_the_server_has_the_scores_of_the_command(folder, tmp_path, tokens, texts):
    client = pytest.importorskip("lm_eval.models.openai_completions").LocalCompletionsAPI
    files = make_tasks(tmp_path / "tasks", docs=5, longest=8)
    results, answers = results_of(ours(folder), files)
    with serving(folder, slots=4) as (url, _):
        model = client(
            model="tiny", base_url=f"{url}/v1/completions", tokenizer=str(folder), max_length=CONTEXT,
            tokenized_requests=tokens, batch_size=texts, num_concurrent=2 if texts == 1 else 1, max_gen_toks=32,
        )  # fmt: skip
        found, other = results_of(model, files)
    assert other.keys() == answers.keys()
    for task in answers:
        assert len(answers[task]) == len(other[task]) > 0
        for a, b in zip(answers[task], other[task], strict=True):
            if isinstance(a, tuple):
                assert a[0] == pytest.approx(b[0], abs=1e-3), task
                assert a[1] == b[1], task
            else:
                assert a == (b if isinstance(b, str) else pytest.approx(b, abs=1e-3)), task
        for name, value in results[task].items():
            near = isinstance(value, float) and "acc" not in name
            assert value == (pytest.approx(found[task][name], rel=1e-5) if near else found[task][name])


@pytest.mark.slow
def test_the_servers_own_tokenizer_serves_the_harness(folder):
    """Without a tokenizer of its own the harness asks /tokenizer_info and /tokenize."""
    client = pytest.importorskip("lm_eval.models.openai_completions").LocalCompletionsAPI
    own = ours(folder)
    with serving(folder) as (url, _):
        model = client(model="tiny", base_url=f"{url}/v1/completions", max_length=CONTEXT)
        assert model.tokenizer_backend == "remote"
        for text in ("the model reads", " text", "a <|im_end|>"):
            assert model.tok_encode(text) == own.tok_encode(text)
        assert (model.eot_token_id, model.prefix_token_id) == (own.eot_token_id, own.prefix_token_id)
