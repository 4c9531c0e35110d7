"""The generator against the uncached model: chunks, batches, stop ids, context, compilation."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smollm_jax.config.architecture import ModelConfig
from smollm_jax.generation import generator as generation
from smollm_jax.generation.decoder import Decoder, Matrix
from smollm_jax.generation.generator import Generator, generate
from smollm_jax.generation.sampling import Past, Sampling, SamplingArrays, choose_token
from smollm_jax.model.transformer import SmolLM, init_params, params_of
from tests.support.lowering import lowered_for_cuda

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


choose_next = jax.jit(choose_token, static_argnums=4)


def uncached(model, prompt, sampling):
    """Each token by the full forward over all before it."""
    ids = list(prompt)
    for _ in range(sampling.max_new_tokens):
        seen = np.zeros((1, CONFIG.vocab_size), bool)
        seen[0, ids] = True
        token = choose_next(
            logits_at_end(model, ids)[None], Past(seen, np.zeros(seen.shape, np.int32)), np.asarray([len(ids)]),
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


@pytest.mark.parametrize(
    "name",
    [name if name == "greedy" else pytest.param(name, marks=pytest.mark.slow) for name in SAMPLINGS],
)
def test_with_and_without_a_cache_the_text_is_the_same(model, generator, name):
    expected = uncached(model, PROMPT, SAMPLINGS[name])
    assert generator.generate([PROMPT], SAMPLINGS[name]) == [expected]
    assert len(set(expected)) > 4  # a text worth comparing


@pytest.mark.parametrize(
    "length", [71, pytest.param(64, marks=pytest.mark.slow)]
)  # 71: the last block of keys overlaps the one before it
def test_a_part_of_a_prompt_attends_to_a_long_cache_block_by_block(model, length, monkeypatch):
    decoder, rng = Decoder(model), np.random.default_rng(0)
    cache = jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)), decoder.init_cache(2, length)
    )
    tokens_BT = jnp.asarray(rng.integers(0, CONFIG.vocab_size, (2, 8)))

    def features(start):
        positions_BT = start + jnp.broadcast_to(jnp.arange(8), (2, 8))
        return jax.jit(lambda cache: decoder.features(tokens_BT, positions_BT, cache)[0])(cache)

    starts = (0, 11, length - 8)
    whole = [features(start) for start in starts]
    monkeypatch.setattr("smollm_jax.generation.decoder.KEY_BLOCK", 16)
    for start, expected in zip(starts, whole, strict=True):
        np.testing.assert_allclose(features(start), expected, rtol=0, atol=2e-5)


def test_a_part_of_a_prompt_reads_the_cache_as_far_as_it_is_filled(model, monkeypatch):
    """What lies past the filled blocks is never read, not even a NaN."""
    monkeypatch.setattr("smollm_jax.generation.decoder.KEY_BLOCK", 16)
    decoder, tokens_1T = Decoder(model), jnp.asarray([list(PROMPT)[:8]])
    positions_1T = jnp.arange(tokens_1T.shape[1])[None]
    clean = decoder.init_cache(1, 64)
    dirty = jax.tree.map(lambda x: x.at[:, :, 16:].set(jnp.nan), clean)
    features = jax.jit(lambda cache: decoder.features(tokens_1T, positions_1T, cache)[0])
    np.testing.assert_array_equal(features(dirty), features(clean))


def test_a_tied_head_is_the_embedding():
    config = replace(CONFIG, tie_embeddings=True)
    model = SmolLM.from_params(config, init_params(config, 2))
    text = generate(model, [PROMPT], max_new_tokens=6, repetition_penalty=2.0)
    assert text == [uncached(model, PROMPT, Sampling(max_new_tokens=6, repetition_penalty=2.0))]


def test_bf16_computes_what_the_bf16_model_does():
    half = SmolLM.from_params(CONFIG, init_params(CONFIG, 1), dtype=jnp.bfloat16)
    decoder, tokens = Decoder(half), jnp.asarray([PROMPT])
    cache, features = decoder.init_cache(1, 32), []

    @jax.jit
    def step(token_11, position_11, cache):
        x_BTD, cache = decoder.features(token_11, position_11, cache)
        return decoder.logits(x_BTD[:, 0]), cache

    for i in range(len(PROMPT)):  # one row, one token at a time: the path of a single vector
        logits_BV, cache = step(tokens[:, i : i + 1], jnp.asarray([[i]]), cache)
        features.append(logits_BV)
    expected = np.asarray(jax.jit(half)(tokens)[0])
    scale = np.abs(expected).max()
    np.testing.assert_allclose(jnp.concatenate(features), expected, atol=0.03 * scale)


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("inputs", [7, 40, 48])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_matrix_of_bf16_is_multiplied_in_f32_whatever_its_layout(rows, inputs, streamed, monkeypatch):
    monkeypatch.setattr("smollm_jax.generation.decoder.STREAM_OUTPUTS", 16)  # the last part is not whole
    rng = np.random.default_rng(0)
    weights_OI = jnp.asarray(rng.normal(size=(70, inputs)), jnp.bfloat16)
    x_1MI = jnp.asarray(rng.normal(size=(1, rows, inputs)), jnp.bfloat16)
    product = jax.jit(Matrix(weights_OI, streamed=streamed).__call__, static_argnums=1)(x_1MI, jnp.float32)
    expected = np.asarray(x_1MI, np.float64) @ np.asarray(weights_OI, np.float64).T
    np.testing.assert_allclose(product, expected, atol=1e-5)


@pytest.mark.usefixtures("optimized")
def test_of_a_product_for_several_rows_the_weights_come_first():
    """XLA:CPU turned it round, at half the speed, where nothing kept it from that."""
    rng = np.random.default_rng(0)
    x_MI, weights_OI = rng.standard_normal((3, 40), np.float32), rng.standard_normal((48, 40), np.float32)
    program = jax.jit(Matrix(jnp.asarray(weights_OI), streamed=False, comes_first=True).__call__)
    np.testing.assert_allclose(program(x_MI), x_MI @ weights_OI.T, atol=1e-5)
    np.testing.assert_allclose(program(x_MI[:1]), x_MI[:1] @ weights_OI.T, atol=1e-5)
    assert re.findall(r"= f32\[(\d+,\d+)\]\S* dot\(", program.lower(x_MI).compile().as_text()) == ["48,3"]


@pytest.mark.parametrize(
    "name", [name if name == "all rules" else pytest.param(name, marks=pytest.mark.slow) for name in SAMPLINGS]
)
def test_rows_of_a_batch_do_not_change_each_other(generator, name):
    prompts = [PROMPT, [7], list(range(1, 40))]
    together = generator.generate(prompts, SAMPLINGS[name])
    assert together == [generator.generate([prompt], SAMPLINGS[name])[0] for prompt in prompts]


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("context", [160, 41])  # 41: the last part begins inside the one before it
def test_a_prompt_in_parts_is_the_prompt_at_once(model, context, monkeypatch):
    model = SmolLM.from_params(replace(CONFIG, max_seq_len=context), params_of(model))
    ragged = [[7] * 35, PROMPT, list(range(1, 40)), [9] * 17]
    expected = Generator(model).generate(ragged, SAMPLINGS["all rules"])
    monkeypatch.setattr(generation, "PART_ON_CPU", 16)
    assert Generator(model).generate(ragged, SAMPLINGS["all rules"]) == expected
    assert [Generator(model).generate([one], SAMPLINGS["all rules"])[0] for one in ragged] == expected


def test_a_long_prompt_that_nobody_waits_for_is_not_read_to_its_end(model, monkeypatch):
    monkeypatch.setattr(generation, "PART_ON_CPU", 16)
    generator, asked = Generator(model), []
    generator.cancelled = lambda: asked.append(1) or len(asked) >= 2
    assert list(generator.stream([5] * 100, Sampling(max_new_tokens=9))) == []
    assert (generator.stop_reason, len(asked)) == ("cancelled", 3)


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


def test_generate_ends_at_every_eos_of_the_model_unless_told_otherwise(generator, model):
    whole = generator.generate([PROMPT], SAMPLINGS["greedy"])[0]
    length = {"max_new_tokens": len(whole)}
    for at, ends in ((3, [whole[3]]), (5, [60, whole[5]])):
        ending = SmolLM.from_params(CONFIG.ending_at(ends), params_of(model))
        assert generate(ending, [PROMPT], **length) == [whole[: whole.index(whole[at])]]
        assert generate(ending, [PROMPT], stop_ids=(), **length) == [whole]


def test_one_row_that_stops_lets_the_others_finish(generator):
    first, second = generator.generate([PROMPT, [7]], SAMPLINGS["greedy"])
    stop = next(token for token in first if token not in second)
    sampling = replace(SAMPLINGS["greedy"], stop_ids=(stop,))
    assert generator.generate([PROMPT, [7]], sampling) == [first[: first.index(stop)], second]


def test_the_context_ends_a_text_and_a_prompt_that_fills_it_is_refused(model):
    small = Generator(SmolLM.from_params(replace(CONFIG, max_seq_len=40), params_of(model)))
    pieces = list(small.stream([5] * 30, Sampling(max_new_tokens=99)))
    assert sum(map(len, pieces)) == 10
    assert small.stop_reason == "context"
    assert joined(pieces) == uncached(model, [5] * 30, Sampling(max_new_tokens=10))
    for length in (40, 41, 5_000):
        with pytest.raises(ValueError, match=f"the prompt has {length:,} tokens; the model reads 1 to 39"):
            small.generate([[5] * length], Sampling())


def test_prompts_that_are_none_are_named(generator):
    assert generator.generate([], Sampling()) == []
    with pytest.raises(ValueError, match="the prompt has 0 tokens"):
        generator.generate([PROMPT, []], Sampling())
    with pytest.raises(ValueError, match="token id 61 is outside"):
        generator.generate([[0, 61]], Sampling())
    with pytest.raises(ValueError, match="token id -1 is outside"):
        generator.generate([[-1, 60]], Sampling())


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


def test_products_of_float32_are_float32_on_a_gpu_as_in_training(model):
    """Whatever the process has set: nobody sets it for `load_hf` or a server."""
    tokens_BT = jnp.zeros((1, 32), jnp.int32)
    generator = Generator(model)
    given = generator._weights, tokens_BT, jnp.array([5]), SamplingArrays.from_sampling(Sampling())
    prefill = partial(generator._prefill.__wrapped__, length=32, greedy=True)
    decode = partial(generator._decode.__wrapped__, greedy=True)
    rows, _ = jax.eval_shape(prefill, *given)
    for function, arguments in (
        (prefill, given),
        (decode, (generator._weights, rows, given[-1])),
        (lambda params, x: SmolLM.from_params(CONFIG, params)(x), (params_of(model), tokens_BT)),
    ):
        with jax.default_matmul_precision("default"):
            program = lowered_for_cuda(jax.jit(function), *arguments)
        products = [line for line in program.splitlines() if "dot_general" in line]
        assert products
        assert all("HIGHEST" in line for line in products), products
