"""Rows of prefix trees hold every request, each token once, and their attention sees ancestors alone."""

import jax.numpy as jnp
import numpy as np
import pytest

from smollm_jax.evaluation.prefix_tree import Request, pack
from smollm_jax.evaluation.scorer import Scorer
from smollm_jax.generation.generator import generate
from smollm_jax.model.transformer import SmolLM
from tests.support.hf_folders import TINY, numpy_params


def questions(count, *, seed=0, choices=4):
    """Requests with a common beginning in groups of `choices`, some with one target, some all targets."""
    rng, made = np.random.default_rng(seed), []
    for i in range(count):
        question = rng.integers(0, TINY.vocab_size, rng.integers(1, 20)).tolist()
        for _ in range(choices):
            answer = rng.integers(0, TINY.vocab_size, rng.integers(1, 6)).tolist()
            ids = question + answer
            made.append(Request(ids[:-1], ids[1:] if i == 1 else answer))
    return made


def ancestors(row, node):
    return [i for i in range(node + 1) if node < row.ends[i]]


def test_a_node_and_its_ancestors_spell_out_each_request():
    requests = questions(9)
    rows = pack(requests, range(len(requests)), 64)
    found = []
    for row in rows:
        at = 0
        for number in row.requests:
            ids, targets = requests[number]
            nodes = row.nodes[at : at + len(targets)]
            assert row.targets[at : at + len(targets)] == targets
            at += len(targets)
            path = ancestors(row, nodes[-1])
            assert row.tokens[path].tolist() == ids
            assert row.depths[path].tolist() == list(range(len(ids)))
            assert path[len(path) - len(nodes) :] == nodes
            found.append(number)
        assert at == len(row.nodes)
        assert (row.ends[row.used :] == np.arange(row.used, 64) + 1).all(), "padding sees only itself"
    assert sorted(found) == list(range(len(requests)))


def test_a_question_is_computed_once_for_all_its_answers_and_rows_are_full():
    requests = questions(60)
    rows = pack(requests, range(len(requests)), 64)
    alone = sum(len(request.ids) for request in requests)
    used = sum(row.used for row in rows)
    assert used < 0.6 * alone
    assert used > 0.93 * 64 * (len(rows) - 1), "the last row may be part empty"


def test_a_group_longer_than_a_row_is_divided():
    question = list(range(30))
    requests = [Request([*question, 100 + i, 7, 8], [i, 7, 8]) for i in range(20)]
    rows = pack(requests, range(20), 40)
    assert sorted(number for row in rows for number in row.requests) == list(range(20))
    assert all(row.used <= 40 for row in rows)


@pytest.mark.parametrize("row_length", [32, 512])
def test_scores_are_those_of_each_text_alone(monkeypatch, row_length):
    """Long requests go to rows of a second length."""
    monkeypatch.setattr("smollm_jax.evaluation.scorer.ROW", row_length)
    monkeypatch.setattr("smollm_jax.evaluation.scorer.TOKENS_ON_CPU", row_length)
    rng = np.random.default_rng(1)
    long = [rng.integers(0, TINY.vocab_size, n).tolist() for n in (40, 70)]
    requests = questions(5) + [Request(ids[:-1], ids[1:]) for ids in long]
    params = numpy_params(TINY)
    seen = []
    results = Scorer(TINY, jnp.dtype("float32")).score(params, requests, lambda *counts: seen.append(counts))
    assert seen[-1] == (len(requests), len(requests))
    model = SmolLM.from_params(TINY, params)
    width = 80
    padded = np.zeros((len(requests), width), np.int32)
    for row, request in enumerate(requests):
        padded[row, : len(request.ids)] = request.ids
    logits_BTV = np.asarray(model(jnp.asarray(padded)), np.float64)
    logprobs_BTV = logits_BTV - np.log(np.exp(logits_BTV).sum(-1, keepdims=True))
    for row, (request, (total, greedy)) in enumerate(zip(requests, results, strict=True)):
        places = np.arange(len(request.ids) - len(request.targets), len(request.ids))
        assert total == pytest.approx(logprobs_BTV[row, places, request.targets].sum(), abs=1e-3)
        assert greedy == (logprobs_BTV[row, places].argmax(-1) == request.targets).all()


def test_a_greedy_continuation_is_told():
    params = numpy_params(TINY)
    model = SmolLM.from_params(TINY, params)
    ids = generate(model, [[5, 6, 7]], max_new_tokens=3, stop_ids=())[0]
    ids = [5, 6, 7, *ids]
    other = [*ids[:-1], (ids[-1] + 1) % TINY.vocab_size]
    requests = [Request(text[:-1], text[3:]) for text in (ids, other)]
    found = Scorer(TINY, jnp.dtype("float32")).score(params, requests)
    assert [greedy for _, greedy in found] == [True, False]
