"""The rules of sampling against their plain definitions in numpy and against transformers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smollm_jax.generation.sampling import (
    Past,
    Sampling,
    SamplingArrays,
    choose_token,
    draw,
    filtered,
    penalised,
)
from smollm_jax.model.attention import MASKED


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_new_tokens", 0), ("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")),
     ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1), ("top_p", float("nan")), ("min_p", -0.1), ("min_p", 1.1),
     ("repetition_penalty", 0.0), ("repetition_penalty", float("inf")), ("seed", -1), ("seed", 2**32)],
)  # fmt: skip
def test_a_setting_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name}="):
        Sampling(**{name: value})


def reference(logits_V, seen_V, sampling):
    """Probabilities by the plain definitions, in f64, with a sort."""
    x = logits_V.astype(np.float64)
    penalty = sampling.repetition_penalty
    x = np.where(seen_V, np.where(x > 0, x / penalty, x * penalty), x) / sampling.temperature
    order = np.argsort(-x, kind="stable")
    p = np.exp(x[order] - x.max())
    if sampling.top_k:
        p[sampling.top_k :] = 0
    p /= p.sum()
    if sampling.top_p < 1:
        p[np.cumsum(p) - p >= sampling.top_p] = 0
    p /= p.sum()
    p[p < sampling.min_p * p[0]] = 0
    out = np.zeros_like(p)
    out[order] = p / p.sum()
    return out


RULES = [
    {}, {"top_k": 1}, {"top_k": 7}, {"top_k": 10**9}, {"top_p": 0.9}, {"top_p": 0.3}, {"top_p": 1e-6},
    {"min_p": 0.05}, {"min_p": 1.0}, {"repetition_penalty": 1.5}, {"temperature": 3.0}, {"temperature": 0.05},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 0.8},
]  # fmt: skip


def nothing_yet(rows, vocab_size):
    return Past(jnp.zeros((rows, vocab_size), bool), jnp.zeros((rows, vocab_size), jnp.int32))


def scores_of(logits_BV, seen_BV, sampling):
    arrays = SamplingArrays.from_sampling(sampling)
    return np.asarray(jax.jit(filtered)(penalised(logits_BV, seen_BV, arrays.repetition_penalty), arrays))


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("vocab_size", [61, 1_000])
def test_the_distribution_is_that_of_the_plain_definitions(rule, vocab_size):
    rng = np.random.default_rng(0)
    logits_BV = rng.normal(0, 3, (5, vocab_size)).astype(np.float32)
    seen_BV = rng.random((5, vocab_size)) < 0.2
    sampling = Sampling(**{"temperature": 1.0, **rule})
    scores_BV = scores_of(jnp.asarray(logits_BV), jnp.asarray(seen_BV), sampling)
    ours = np.exp(scores_BV.astype(np.float64))
    ours /= ours.sum(axis=1, keepdims=True)
    for row in range(5):
        expected = reference(logits_BV[row], seen_BV[row], sampling)
        np.testing.assert_array_equal(ours[row] > 0, expected > 0)
        np.testing.assert_allclose(ours[row], expected, rtol=2e-5, atol=1e-12)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_rules_are_those_of_transformers(rule):
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers.generation.logits_process")
    rng = np.random.default_rng(1)
    logits_BV = rng.normal(0, 3, (4, 500)).astype(np.float32)
    ids = rng.integers(0, 500, (4, 30))
    sampling = Sampling(**{"temperature": 1.0, **rule})
    processors = [
        hf.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
        hf.TemperatureLogitsWarper(sampling.temperature),
    ]
    if sampling.top_k:
        processors.append(hf.TopKLogitsWarper(min(sampling.top_k, 500)))
    if sampling.top_p < 1:
        processors.append(hf.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        processors.append(hf.MinPLogitsWarper(sampling.min_p))
    scores = torch.tensor(logits_BV)
    for processor in processors:
        scores = processor(torch.tensor(ids), scores)
    expected = torch.softmax(scores, dim=-1).numpy()
    seen_BV = np.zeros((4, 500), bool)
    np.put_along_axis(seen_BV, ids, True, axis=1)
    ours = jax.nn.softmax(scores_of(jnp.asarray(logits_BV), jnp.asarray(seen_BV), sampling))
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-9)


def test_tokens_that_tie_with_the_last_kept_are_kept_as_in_transformers():
    logits = jnp.asarray([[2.0, 1.0, 1.0, 1.0, 0.0, -0.0]])
    none = jnp.zeros((1, 6), bool)
    kept = scores_of(logits, none, Sampling(temperature=1.0, top_k=2))[0] > MASKED
    assert kept.tolist() == [True] * 4 + [False] * 2
    kept = scores_of(logits, none, Sampling(temperature=1.0, top_k=5))[0] > MASKED
    assert kept.all()  # 0 and -0 are one score


@pytest.mark.parametrize("rule", [
    {"top_k": 2}, {"top_p": 0.3}, {"top_p": 0.9}, {"top_p": 1e-6}, {"min_p": 0.5}, {"top_k": 50, "top_p": 0.9},
    {"top_k": 50, "top_p": 0.8, "min_p": 0.1, "temperature": 0.7},
], ids=str)  # fmt: skip
def test_both_back_ends_keep_the_tokens_of_transformers_where_scores_tie(rule, monkeypatch):
    """Logits in bfloat16 tie often. Of two tokens that tie, transformers' sort puts either first."""
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers.generation.logits_process")
    from smollm_jax.serving.torch_backend import sampling_rules

    rng = np.random.default_rng(5)
    logits_BV = jnp.asarray(rng.normal(0, 3, (60, 300)), jnp.bfloat16).astype(jnp.float32)
    logits_BV = logits_BV.at[0].set(0).at[1, :4].set(50)
    sampling = Sampling(**{"temperature": 1.0, **rule})
    kept_BV = scores_of(logits_BV, jnp.zeros(logits_BV.shape, bool), sampling) > MASKED
    scores = torch.tensor(np.asarray(logits_BV))
    np.testing.assert_array_equal(kept_BV, np.isfinite(sampling_rules(sampling)(None, scores).numpy()))
    monkeypatch.setattr(torch, "sort", partial(torch.sort, stable=True))
    kinds = {
        "temperature": hf.TemperatureLogitsWarper, "top_k": hf.TopKLogitsWarper, "top_p": hf.TopPLogitsWarper,
        "min_p": hf.MinPLogitsWarper,
    }  # fmt: skip
    for name, kind in kinds.items():
        scores = kind(rule[name])(None, scores) if name in rule else scores
    np.testing.assert_array_equal(kept_BV, np.isfinite(scores.numpy()))


def test_draws_follow_the_distribution_and_never_leave_it():
    rng = np.random.default_rng(2)
    logits_V = rng.normal(0, 2, 300).astype(np.float32)
    sampling = Sampling(temperature=0.9, top_k=30, top_p=0.95)
    expected = reference(logits_V, np.zeros(300, bool), sampling)
    n = 40_000
    tokens = jax.jit(choose_token, static_argnums=4)(
        jnp.broadcast_to(logits_V, (n, 300)),
        nothing_yet(n, 300),
        jnp.arange(n),
        SamplingArrays.from_sampling(sampling),
        False,
    )
    counts = np.bincount(np.asarray(tokens), minlength=300)
    assert (counts[expected == 0] == 0).all()
    likely = expected * n > 5
    chi = ((counts - expected * n) ** 2)[likely] / (expected * n)[likely]
    degrees = likely.sum() - 1
    assert chi.sum() < degrees + 5 * np.sqrt(2 * degrees)


@pytest.mark.parametrize("vocab_size", [1, 5, 128, 129, 49_152])
def test_a_draw_is_where_the_number_falls_in_the_running_sum(vocab_size):
    rng = np.random.default_rng(3)
    scores_V = rng.normal(0, 2, vocab_size).astype(np.float32)
    scores_V[rng.random(vocab_size) < 0.3] = MASKED
    scores_V[vocab_size // 2] = 0.0
    uniform = np.concatenate([[0.0, np.nextafter(np.float32(1), np.float32(0))], rng.random(50)]).astype(
        np.float32
    )
    tokens = np.asarray(draw(jnp.broadcast_to(scores_V, (52, vocab_size)), jnp.asarray(uniform)))
    p = np.exp(scores_V.astype(np.float64))
    assert (p[tokens] > 0).all()
    ends = np.cumsum(p) / p.sum()
    assert (uniform <= ends[tokens] + 2e-5).all()
    assert (uniform >= ends[tokens] - p[tokens] / p.sum() - 2e-5).all()


@pytest.mark.parametrize("temperature", [1e-40, 1e-6, pytest.param(1e-30, marks=pytest.mark.slow)])
def test_a_temperature_near_zero_is_greedy(temperature):
    logits = jnp.asarray(np.random.default_rng(4).normal(0, 3, (8, 200)).astype(np.float32))
    for rule in ({}, {"top_p": 0.5}, {"top_k": 3}):
        arrays = SamplingArrays.from_sampling(Sampling(temperature=temperature, **rule))
        tokens = choose_token(logits, nothing_yet(8, 200), jnp.arange(8), arrays, False)
        np.testing.assert_array_equal(tokens, logits.argmax(axis=1))
