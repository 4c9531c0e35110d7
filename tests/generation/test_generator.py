"""Generation against the uncached model, against numpy and against transformers' own sampling rules."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smollm_jax.config.architecture import ModelConfig
from smollm_jax.generation import generator as generation
from smollm_jax.generation.decoder import Matrix
from smollm_jax.generation.generator import Generator, generate
from smollm_jax.generation.sampling import MASKED, Sampling, SamplingArrays, choose, draw, filtered, penalised
from smollm_jax.model.transformer import SmolLM, init_params, params_of

CONFIG = ModelConfig(
    vocab_size=61, hidden_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=40,
    rope_theta=10_000.0, max_seq_len=160, initializer_range=0.4, tie_embeddings=False,
)  # fmt: skip
PROMPT = [3, 14, 15, 9, 2]


@pytest.fixture(scope="module")
def model():
    return SmolLM.from_params(CONFIG, init_params(CONFIG, 1))


@pytest.fixture(scope="module")
def generator(model):
    return Generator(model)


@jax.jit
def full_forward(params, tokens_BT):
    return SmolLM.from_params(config_of(params), params)(tokens_BT)


def config_of(params):
    return replace(CONFIG, tie_embeddings="head" not in params)


def logits_at_end(model, ids):
    """Of the full forward; what stands to the right of a token cannot change it, so one length is compiled."""
    padded = np.zeros((1, CONFIG.max_seq_len), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(full_forward(params_of(model), padded)[0, len(ids) - 1])


def uncached(model, prompt, sampling):
    """Each token by the full forward over all before it."""
    ids = list(prompt)
    for _ in range(sampling.max_new_tokens):
        seen = np.zeros((1, CONFIG.vocab_size), bool)
        seen[0, ids] = True
        token = choose(
            jnp.asarray(logits_at_end(model, ids))[None], jnp.asarray(seen), jnp.asarray([len(ids)]),
            SamplingArrays.from_sampling(sampling), sampling.temperature == 0,
        )  # fmt: skip
        ids.append(int(token[0]))
    return ids[len(prompt) :]


def joined(pieces):
    return [token for piece in pieces for token in piece]


SAMPLINGS = {
    "greedy": Sampling(max_new_tokens=40),
    "penalty": Sampling(max_new_tokens=40, repetition_penalty=1.4),
    "drawn": Sampling(max_new_tokens=40, temperature=0.8, seed=5),
    "all rules": Sampling(
        max_new_tokens=40, temperature=0.9, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.1, seed=3
    ),
}


@pytest.mark.parametrize("name", SAMPLINGS)
def test_with_and_without_a_cache_the_text_is_the_same(model, generator, name):
    expected = uncached(model, PROMPT, SAMPLINGS[name])
    assert generator.generate([PROMPT], SAMPLINGS[name]) == [expected]
    assert len(set(expected)) > 4  # a text worth comparing


def test_a_prompt_of_several_query_blocks_gives_the_uncached_text(model, monkeypatch):
    monkeypatch.setattr("smollm_jax.generation.decoder.QUERY_BLOCK", 16)
    prompt = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 50).tolist()
    sampling = Sampling(max_new_tokens=12)
    assert Generator(model).generate([prompt], sampling) == [uncached(model, prompt, sampling)]


def test_a_tied_head_is_the_embedding():
    config = replace(CONFIG, tie_embeddings=True)
    model = SmolLM.from_params(config, init_params(config, 2))
    text = generate(model, [PROMPT], max_new_tokens=6, repetition_penalty=2.0)
    assert text == [uncached(model, PROMPT, Sampling(max_new_tokens=6, repetition_penalty=2.0))]


def test_bf16_computes_what_the_bf16_model_does():
    half = SmolLM.from_params(CONFIG, init_params(CONFIG, 1), dtype=jnp.bfloat16)
    decoder, tokens = half.decoder(), jnp.asarray([PROMPT])
    cache, features = decoder.init_cache(1, 32), []
    for i in range(len(PROMPT)):  # one row, one token at a time: the path of a single vector
        x, cache = decoder.features(tokens[:, i : i + 1], jnp.asarray([[i]]), cache)
        features.append(decoder.logits(x[:, 0]))
    expected, scale = half(tokens)[0], float(jnp.abs(half(tokens)).max())
    np.testing.assert_allclose(jnp.concatenate(features), expected, atol=0.03 * scale)


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("inputs", [7, 40, 48])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_matrix_of_bf16_is_multiplied_in_f32_whatever_its_layout(rows, inputs, streamed, monkeypatch):
    monkeypatch.setattr("smollm_jax.kernels.cpu.STREAM_OUTPUTS", 16)  # the last part is not whole
    rng = np.random.default_rng(0)
    weights_OI = jnp.asarray(rng.normal(size=(70, inputs)), jnp.bfloat16)
    x_1MI = jnp.asarray(rng.normal(size=(1, rows, inputs)), jnp.bfloat16)
    product = jax.jit(Matrix(weights_OI, streamed=streamed).__call__, static_argnums=1)(x_1MI, jnp.float32)
    expected = np.asarray(x_1MI, np.float64) @ np.asarray(weights_OI, np.float64).T
    np.testing.assert_allclose(product, expected, atol=1e-5)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_rows_of_a_batch_do_not_change_each_other(generator, name):
    prompts = [PROMPT, [7], list(range(1, 40))]
    together = generator.generate(prompts, SAMPLINGS[name])
    assert together == [generator.generate([prompt], SAMPLINGS[name])[0] for prompt in prompts]


def test_a_long_row_at_the_end_of_the_context_does_not_cut_a_short_one(generator):
    long = [5] * (CONFIG.max_seq_len - 3)
    texts = generator.generate([long, PROMPT], SAMPLINGS["greedy"])
    assert [len(text) for text in texts] == [3, 40]
    assert texts == [generator.generate([prompt], SAMPLINGS["greedy"])[0] for prompt in (long, PROMPT)]


@pytest.mark.parametrize("chunk", [1, 3, 50])
def test_the_size_of_chunks_does_not_show(model, generator, chunk, monkeypatch):
    expected = generator.generate([PROMPT], SAMPLINGS["all rules"])
    monkeypatch.setattr(generation, "CHUNK", chunk)
    assert Generator(model).generate([PROMPT], SAMPLINGS["all rules"]) == expected


def test_a_stream_is_the_text_in_pieces(generator):
    for sampling in SAMPLINGS.values():
        pieces = list(generator.stream(PROMPT, sampling))
        assert len(pieces[0]) == 1  # the first token does not wait for a chunk
        assert len(pieces) > 3
        assert [joined(pieces)] == generator.generate([PROMPT], sampling)
        assert generator.stop_reason == "length"


def test_a_seed_gives_the_same_text_and_another_seed_another(model, generator):
    drawn = SAMPLINGS["drawn"]
    assert generator.generate([PROMPT], drawn) == Generator(model).generate([PROMPT], drawn)
    assert generator.generate([PROMPT], drawn) != generator.generate([PROMPT], replace(drawn, seed=6))


def test_a_shorter_text_is_the_beginning_of_a_longer_one(generator):
    drawn = SAMPLINGS["drawn"]
    for length in (1, 2, 9, 10):
        short = generator.generate([PROMPT], replace(drawn, max_new_tokens=length))[0]
        assert short == generator.generate([PROMPT], drawn)[0][:length]


def test_a_stop_id_ends_the_text_and_is_not_part_of_it(generator):
    whole = generator.generate([PROMPT], SAMPLINGS["greedy"])[0]
    for at in (0, 1, 12):
        stop = whole[at]
        expected = whole[: whole.index(stop)]
        sampling = replace(SAMPLINGS["greedy"], stop_ids=(stop, 60))
        assert generator.generate([PROMPT], sampling) == [expected]
        assert joined(generator.stream(PROMPT, sampling)) == expected
        assert generator.stop_reason == "eos"


def test_one_row_that_stops_lets_the_others_finish(generator):
    first, second = generator.generate([PROMPT, [7]], SAMPLINGS["greedy"])
    stop = next(token for token in first if token not in second)
    sampling = replace(SAMPLINGS["greedy"], stop_ids=(stop,))
    assert generator.generate([PROMPT, [7]], sampling) == [first[: first.index(stop)], second]


def test_the_context_ends_a_text_and_a_prompt_that_fills_it_is_refused(model):
    small = Generator(model, context=40)
    pieces = list(small.stream([5] * 30, Sampling(max_new_tokens=99)))
    assert sum(map(len, pieces)) == 10
    assert small.stop_reason == "context"
    assert joined(pieces) == uncached(model, [5] * 30, Sampling(max_new_tokens=10))
    for length in (40, 41, 5_000):
        with pytest.raises(ValueError, match=f"the prompt has {length:,} tokens, the context 40; shorten"):
            small.generate([[5] * length], Sampling())


def test_prompts_that_are_none_are_named(generator):
    assert generator.generate([], Sampling()) == []
    with pytest.raises(ValueError, match="the prompt is empty"):
        generator.generate([PROMPT, []], Sampling())
    with pytest.raises(ValueError, match="token id 61 lies outside"):
        generator.generate([[0, 61]], Sampling())
    with pytest.raises(ValueError, match="token id -1 lies outside"):
        generator.generate([[-1, 60]], Sampling())


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_new_tokens", 0), ("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")),
     ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1), ("top_p", float("nan")), ("min_p", -0.1), ("min_p", 1.1),
     ("repetition_penalty", 0.0), ("repetition_penalty", float("inf")), ("seed", -1), ("seed", 2**32)],
)  # fmt: skip
def test_a_setting_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name}="):
        Sampling(**{name: value})


def test_new_prompt_lengths_and_settings_compile_nothing_within_a_bucket(model):
    fresh = Generator(model)
    for new in (20, 37):  # texts of up to 32 tokens, and of up to 64
        list(fresh.stream([5] * 3, Sampling(max_new_tokens=new, temperature=0.5)))
    compiled = []

    def count(event, _seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        for length, settings in (
            (1, {}), (17, {"top_k": 5}), (32, {"top_p": 0.5}), (9, {"min_p": 0.1, "seed": 9}),
            (30, {"repetition_penalty": 1.3, "temperature": 1.5}),
        ):  # fmt: skip
            sampling = Sampling(**{"max_new_tokens": 24, "temperature": 0.5, **settings})
            # a text of 33 to 64 tokens shares a cache, whatever part of it is prompt
            list(fresh.stream([5] * length, replace(sampling, max_new_tokens=max(1, 40 - length))))
        assert compiled == []
        list(fresh.stream([5] * 70, Sampling(max_new_tokens=20, temperature=0.5)))
        assert compiled  # the counter does count
    finally:
        jax.monitoring.clear_event_listeners()


# --- the rules of sampling ---


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


def scores_of(logits_BV, seen_BV, sampling):
    knobs = SamplingArrays.from_sampling(sampling)
    return np.asarray(jax.jit(filtered)(penalised(logits_BV, seen_BV, knobs.repetition_penalty), knobs))


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


def test_draws_follow_the_distribution_and_never_leave_it():
    rng = np.random.default_rng(2)
    logits_V = rng.normal(0, 2, 300).astype(np.float32)
    sampling = Sampling(temperature=0.9, top_k=30, top_p=0.95)
    expected = reference(logits_V, np.zeros(300, bool), sampling)
    n = 40_000
    tokens = choose(
        jnp.broadcast_to(logits_V, (n, 300)),
        jnp.zeros((n, 300), bool),
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


@pytest.mark.parametrize("temperature", [1e-40, 1e-30, 1e-6])
def test_a_temperature_near_zero_is_greedy(temperature):
    logits = jnp.asarray(np.random.default_rng(4).normal(0, 3, (8, 200)).astype(np.float32))
    for rule in ({}, {"top_p": 0.5}, {"top_k": 3}):
        knobs = SamplingArrays.from_sampling(Sampling(temperature=temperature, **rule))
        tokens = choose(logits, jnp.zeros((8, 200), bool), jnp.arange(8), knobs, False)
        np.testing.assert_array_equal(tokens, logits.argmax(axis=1))
