"""The decoder's kernels for GPUs against the reference, interpreted on a CPU, and lowered for their device."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import pallas as pl

from smollm_jax.config.architecture import MODELS, ModelConfig
from smollm_jax.generation import decoder
from smollm_jax.generation import generator as generation
from smollm_jax.generation.decoder import Decoder, Matrix, check_decode
from smollm_jax.generation.generator import Generator
from smollm_jax.generation.sampling import Sampling
from smollm_jax.kernels import triton_decode
from smollm_jax.model.ops import rotate
from smollm_jax.model.transformer import RMSNorm, SmolLM, init_params, rope_angles
from tests.support.lowering import KERNEL, lowered_for_cuda

TINY = ModelConfig(
    vocab_size=61, hidden_size=36, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=8, intermediate_size=50,
    rope_theta=10_000.0, max_seq_len=160, initializer_range=0.4, tie_embeddings=False,
)  # fmt: skip
# Of the largest entry
CLOSE = {"float32": 2e-6, "bfloat16": 0.01}


class Interpreted(Decoder):
    def __init__(self, model, *, kernels=None):
        assert kernels is None
        super().__init__(model, kernels=True, interpret=True)


def random(rng, *shape, dtype="float32", std=1.0):
    return jnp.asarray(std * rng.standard_normal(shape), dtype)


def assert_close(ours, plain, dtype):
    assert ours.dtype == plain.dtype
    ours, plain = np.asarray(ours, np.float32), np.asarray(plain, np.float32)
    np.testing.assert_allclose(ours, plain, rtol=0, atol=CLOSE[dtype] * np.abs(plain).max())


def assert_close_as_vectors(ours, plain, dtype):
    """For what several products come to, whose roundings add up."""
    assert ours.dtype == plain.dtype
    ours, plain = np.asarray(ours, np.float32), np.asarray(plain, np.float32)
    assert np.linalg.norm(ours - plain) < 4 * CLOSE[dtype] * np.linalg.norm(plain)


def norm_of(config, rng):
    norm = RMSNorm(config)
    norm.scale[...] += random(rng, config.hidden_size, std=0.3)
    return norm


every_shape = pytest.mark.parametrize(
    "config", [pytest.param(MODELS["135M"], id="135M", marks=pytest.mark.release), pytest.param(TINY, id="odd")]
)
# Of them all at once, and in three turns
ways = pytest.mark.parametrize(
    ("dtype", "rows", "part"), [("float32", 1, 1), ("float32", 3, 4), ("bfloat16", 3, 1)]
)


@every_shape
@ways
def test_norm_and_product_are_the_plain_ones(config, dtype, rows, part, monkeypatch):
    rng, D = np.random.default_rng(0), config.hidden_size
    monkeypatch.setattr(triton_decode, "INPUTS", pl.next_power_of_2(D) // part)
    x_BD, norm = random(rng, rows, D, dtype=dtype), norm_of(config, rng)
    outputs = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim + (3 if config is TINY else 0)
    weights_OD = random(rng, outputs, D, dtype=dtype, std=D**-0.5)
    ours = triton_decode.norm_product(x_BD, norm.scale[...], weights_OD, norm.epsilon, interpret=True)
    assert_close(ours, Matrix(weights_OD, streamed=False)(norm(x_BD[:, None])[:, 0]), dtype)


@every_shape
@ways
def test_the_gated_product_is_the_plain_one(config, dtype, rows, part, monkeypatch):
    rng, D = np.random.default_rng(1), config.hidden_size
    monkeypatch.setattr(triton_decode, "INPUTS", pl.next_power_of_2(D) // part)
    x_BD, norm = random(rng, rows, D, dtype=dtype), norm_of(config, rng)
    weights_OD = random(rng, 2 * config.intermediate_size, D, dtype=dtype, std=3 * D**-0.5)
    ours = triton_decode.gated_product(x_BD, norm.scale[...], weights_OD, norm.epsilon, interpret=True)
    gate_BF, up_BF = jnp.split(
        Matrix(weights_OD, streamed=False)(norm(x_BD[:, None])[:, 0], jnp.float32), 2, axis=-1
    )
    assert_close(ours, (jax.nn.silu(gate_BF) * up_BF).astype(dtype), dtype)


@every_shape
@ways
def test_the_product_is_added_to_what_was_there(config, dtype, rows, part, monkeypatch):
    rng, D = np.random.default_rng(2), config.hidden_size
    monkeypatch.setattr(triton_decode, "OUTPUTS", 8)  # of an odd shape the last program has fewer
    for width in (config.num_heads * config.head_dim, config.intermediate_size):
        monkeypatch.setattr(triton_decode, "INPUTS", pl.next_power_of_2(width) // part)
        x_BD, y_BI = random(rng, rows, D, dtype=dtype), random(rng, rows, width, dtype=dtype)
        weights_DI = random(rng, D, width, dtype=dtype, std=width**-0.5)
        ours = triton_decode.add_product("decode_o", x_BD, y_BI, weights_DI, interpret=True)
        assert_close(ours, x_BD + Matrix(weights_DI, streamed=False)(y_BI), dtype)


@partial(jax.jit, static_argnums=0)
def plain_attention(config, heads, rope, old, position_B1):
    N, K = config.num_heads, config.num_kv_heads
    new = decoder._write(old, rotate(heads[:, :, N : N + K], rope), heads[:, :, N + K :], position_B1)
    return decoder._attend_cache(rotate(heads[:, :, :N], rope), *new, position_B1).reshape(len(heads), -1), new


def attention_case(config, dtype, positions, length, seed=3):
    """Heads of a token a row, the angles of its place, a cache full of random numbers, and the plain outcome."""
    rng, B = np.random.default_rng(seed), len(positions)
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    heads = random(rng, B, 1, N + 2 * K, H, dtype=dtype)
    position_B1 = jnp.asarray(positions, jnp.int32)[:, None]
    rope = rope_angles(position_B1, head_dim=H, theta=config.rope_theta)
    old = random(rng, B, K, length, H, dtype=dtype), random(rng, B, K, length, H, dtype=dtype)
    seen, new = plain_attention(config, heads, rope, old, position_B1)
    angles = tuple(part.reshape(B, -1) for part in rope)
    return (heads.reshape(B, -1), angles, position_B1[:, 0], old), (seen, new)


@every_shape
@pytest.mark.parametrize(
    ("dtype", "length", "rows"),
    [
        ("float32", 200, 3),
        ("bfloat16", 256, 1),
        pytest.param("float32", 40, 1, marks=pytest.mark.slow),
        pytest.param("bfloat16", 200, 3, marks=pytest.mark.slow),
    ],
)
def test_attention_is_the_plain_one_and_writes_the_token_into_the_cache(config, dtype, length, rows):
    attend = jax.jit(partial(triton_decode.attend, interpret=True))
    for position in (0, 1, 31, 127, 128, 130, length - 1):
        if position < length:
            given, (seen, new) = attention_case(config, dtype, [position, 0, length - 1][:rows], length)
            ours, ours_new = attend(*given)
            assert_close(ours, seen, dtype)
            for a, b in zip(ours_new, new, strict=True):
                assert_close(a, b, dtype)


def test_only_the_slot_of_the_token_changes_and_nothing_from_there_on_is_read(monkeypatch):
    monkeypatch.setattr(triton_decode, "KEYS", 64)
    length = 192  # whole blocks: with padding, the interpreter would write past the end into that
    attend = jax.jit(partial(triton_decode.attend, interpret=True))
    for position in (0, 5, 63, 64, length - 1, length, length + 50):
        (qkv, angles, at, old), _ = attention_case(TINY, "float32", [position], length)
        seen, _ = attend(qkv, angles, at, old)
        unread = tuple(part.at[:, :, position:].set(jnp.nan) for part in old)
        blind, grown = attend(qkv, angles, at, unread)
        np.testing.assert_array_equal(blind, seen)
        for before, after in zip(unread, grown, strict=True):
            others = np.arange(length) != position
            np.testing.assert_array_equal(after[:, :, others], before[:, :, others])
            assert np.isfinite(after[:, :, ~others]).all()


def pair_of(config, dtype, seed=0):
    """Decoders of the same weights, by the kernels and by the plain form; their norms are not all ones."""
    params = init_params(config, seed)
    rng = np.random.default_rng(seed)
    for name in ("attention_norm", "mlp_norm"):
        params["blocks"][name]["scale"] += random(rng, config.num_layers, config.hidden_size, std=0.3)
    model = SmolLM.from_params(config, params, dtype=dtype)
    ours, plain = Interpreted(model), Interpreted(model)
    plain.kernels = False  # with the weights and activations of a GPU, not as a CPU would have them
    return ours, plain


def step_of(made):
    graphdef, state = nnx.split(made)
    return partial(jax.jit(lambda state, *given: nnx.merge(graphdef, state).features(*given)), state)


TWO_LAYERS = replace(MODELS["135M"], num_layers=2, vocab_size=61)
SMOOTH = replace(TINY, initializer_range=1 / 6)  # a softmax of large scores makes much of a rounding


@pytest.mark.parametrize(
    ("config", "dtype", "rows", "keys"),
    [
        pytest.param(TWO_LAYERS, "float32", 1, 64, marks=pytest.mark.slow),
        pytest.param(TWO_LAYERS, "bfloat16", 1, 128, marks=[pytest.mark.slow, pytest.mark.release]),
        pytest.param(SMOOTH, "float32", 1, 128, marks=pytest.mark.release),
        pytest.param(SMOOTH, "float32", 4, 64, marks=pytest.mark.slow),
        pytest.param(SMOOTH, "bfloat16", 4, 64, marks=pytest.mark.slow),
    ],
    ids=["135M", "135M in bfloat16", "odd", "rows", "rows in bfloat16"],
)
def test_a_step_is_the_plain_one_and_changes_one_slot_of_the_cache(config, dtype, rows, keys, monkeypatch):
    """At the first places, about the ends of blocks of keys, and at the last of the cache."""
    monkeypatch.setattr(triton_decode, "KEYS", keys)
    ours, plain = (step_of(made) for made in pair_of(config, dtype))
    rng, length = np.random.default_rng(4), 200
    shape = (rows, config.num_kv_heads, length, config.head_dim)
    cache = plain_cache = tuple(
        (random(rng, *shape, dtype=dtype), random(rng, *shape, dtype=dtype)) for _ in range(config.num_layers)
    )
    for position in (0, 1, 63, 64, 130, length - 1):
        # rows after the first are elsewhere
        at = (position + 37 * np.arange(rows)) % length
        tokens = jnp.asarray(rng.integers(0, config.vocab_size, (rows, 1)))
        before = cache
        x, cache = ours(tokens, jnp.asarray(at)[:, None], cache)
        plain_x, plain_cache = plain(tokens, jnp.asarray(at)[:, None], plain_cache)
        assert_close_as_vectors(x[:, 0], plain_x[:, 0], dtype)
        others = np.arange(length) != at[:, None]
        for old, new, expected in zip(*map(jax.tree.leaves, (before, cache, plain_cache)), strict=True):
            new, old, expected = (np.swapaxes(part, 1, 2) for part in (new, old, expected))  # noqa: PLW2901
            np.testing.assert_array_equal(new[others], old[others])
            assert_close_as_vectors(new[~others].reshape(rows, -1), expected[~others].reshape(rows, -1), dtype)


@pytest.mark.parametrize(
    "prompts",
    [pytest.param([[3, 14, 15, 9, 2]], marks=pytest.mark.slow), [[7], list(range(1, 40)), [5, 6]]],
)
def test_greedy_text_is_the_same_token_for_token(prompts, monkeypatch):
    model = SmolLM.from_params(TINY, init_params(TINY, 1))
    expected = Generator(model).generate(prompts, Sampling(max_new_tokens=60))
    monkeypatch.setattr(generation, "Decoder", Interpreted)
    assert Generator(model).generate(prompts, Sampling(max_new_tokens=60)) == expected
    assert len(set(expected[0])) > 4


@pytest.mark.slow
def test_a_row_that_goes_on_past_the_end_of_the_cache_does_no_harm(monkeypatch):
    model = SmolLM.from_params(replace(TINY, max_seq_len=40), init_params(TINY, 1))
    prompts, sampling = [[5] * 38, [9, 2, 4]], Sampling(max_new_tokens=30)
    expected = Generator(model).generate(prompts, sampling)
    monkeypatch.setattr(generation, "Decoder", Interpreted)
    ours = Generator(model)
    assert ours.generate(prompts, sampling) == expected
    assert ours.generate(prompts[:1], sampling) == expected[:1]


@pytest.mark.parametrize(
    "name", ["135M", *(pytest.param(name, marks=pytest.mark.release) for name in sorted(set(MODELS) - {"135M"}))]
)
@pytest.mark.parametrize("rows", [1, 4, 5])
def test_a_layer_lowers_for_cuda_to_five_kernels(name, rows):
    config = replace(MODELS[name], num_layers=2)
    model = nnx.eval_shape(lambda: SmolLM(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    made = nnx.eval_shape(lambda model: Decoder(model, kernels=True), model)
    graphdef, state = nnx.split(made)
    cache = jax.eval_shape(lambda: made.init_cache(rows, 200))
    number = jax.ShapeDtypeStruct((rows, 1), jnp.int32)
    features = jax.jit(lambda state, *given: nnx.merge(graphdef, state).features(*given))
    program = lowered_for_cuda(features, state, number, number, cache)
    kernels = config.num_layers * (rows <= triton_decode.MOST_ROWS)
    assert program.count(KERNEL) == 5 * kernels
    for kernel in ("qkv", "attention", "o", "gated", "down"):
        assert program.count(f'name = "decode_{kernel}"') == kernels


@pytest.mark.parametrize("dtype", [pytest.param(jnp.bfloat16, marks=pytest.mark.slow), jnp.float32])
def test_the_check_is_content_with_the_kernels_where_they_run(dtype):
    assert check_decode(TINY, dtype, interpret=True) == ""
    assert check_decode(TINY, dtype).startswith("decoding: does not run here: ValueError")


def never_written(qkv_BO, rope, position_B, layer_cache, *, interpret, real=triton_decode.attend):
    return real(qkv_BO, rope, position_B, layer_cache, interpret=interpret)[0], layer_cache


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("LOG2_E", 1.0, "the output differs from the reference by"),
        ("_turned", lambda x_ref, *_: x_ref[...], "the output differs from the reference by"),
        (
            "_normed",
            lambda x_ref, b, _, D, __: triton_decode._vector(x_ref, D, b),
            "the output differs from the reference by",
        ),
        ("attend", never_written, "the cache of keys differs from the reference by"),
    ],
)
def test_the_check_finds_a_wrong_kernel(name, wrong, said, monkeypatch):
    monkeypatch.setattr(triton_decode, name, wrong)
    assert check_decode(TINY, jnp.bfloat16, interpret=True).startswith(f"decoding: {said}")


@pytest.fixture
def on_a_gpu(monkeypatch):
    """This CPU taken for one, but for the kernels, which do not run on it."""
    monkeypatch.setattr(decoder, "select_attention", lambda *_: ("pallas", ""))
    decoder._kernels_agree.cache_clear()
    yield
    decoder._kernels_agree.cache_clear()


@pytest.mark.usefixtures("on_a_gpu")
def test_a_decoder_goes_the_plain_way_where_the_kernels_fail_and_says_so_once(capsys):
    model = SmolLM.from_params(TINY, init_params(TINY, 1))
    assert not Decoder(model).kernels
    assert not Decoder(model).kernels
    said = capsys.readouterr().err
    assert said.startswith(
        "decoding    plain: the kernels failed their check, decoding: does not run here: ValueError"
    )
    assert said.count("\n") == 1


@pytest.mark.usefixtures("on_a_gpu")
def test_a_decoder_takes_the_kernels_where_they_agree(monkeypatch, capsys):
    monkeypatch.setattr(decoder, "check_decode", partial(check_decode, interpret=True))
    assert Decoder(SmolLM.from_params(TINY, init_params(TINY, 1))).kernels
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("on_a_gpu")
def test_a_decoder_made_inside_a_traced_program_tries_nothing(capsys):
    made = nnx.eval_shape(lambda: Decoder(SmolLM(TINY, rngs=nnx.Rngs(0))))
    assert not made.kernels
    assert capsys.readouterr().err == ""


def test_the_device_is_the_one_that_has_the_weights(monkeypatch):
    """A model on the CPU of a machine with a GPU."""
    gpu = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100", compute_capability="9.0")
    model = SmolLM.from_params(TINY, init_params(TINY, 1), dtype=jnp.bfloat16)
    monkeypatch.setattr(decoder, "check_decode", lambda *_: "")
    monkeypatch.setattr(jax, "devices", lambda *_: [gpu])
    assert not Decoder(model).kernels


def test_a_generator_does_without_kernels_where_it_is_told_to(monkeypatch):
    monkeypatch.setattr(decoder, "_wants_kernels", lambda _: True)
    model = SmolLM.from_params(TINY, init_params(TINY, 1))
    assert Generator(model, kernels=False).generate([[1, 2]], Sampling(max_new_tokens=3))[0]


def test_on_a_cpu_a_decoder_tries_no_kernels(capsys):
    decoder._kernels_agree.cache_clear()
    model = SmolLM.from_params(TINY, init_params(TINY, 1), dtype=jnp.bfloat16)
    assert not Decoder(model).kernels
    assert capsys.readouterr().err == ""
