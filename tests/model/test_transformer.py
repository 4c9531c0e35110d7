"""The model against Hugging Face's Llama, and against each fault that other replicas have had."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from smollm_jax.config.architecture import MODELS, ModelConfig
from smollm_jax.generation.decoder import Decoder
from smollm_jax.model.attention import BLOCKS, SMALLEST_BLOCK
from smollm_jax.model.ops import REFERENCE, Ops, rotate
from smollm_jax.model.transformer import SmolLM, init_params, params_of, rope_angles

TINY = ModelConfig(
    vocab_size=61,
    hidden_size=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=40,
    rope_theta=10_000.0,
)


def llama_with(params, config):
    """HF's Llama with our parameters: the layouts are written out here, apart from convert.py's table."""
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            intermediate_size=config.intermediate_size,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=True,
            max_position_embeddings=config.max_seq_len,
        )
    ).eval()
    blocks, D = params["blocks"], config.hidden_size
    weights = {
        "model.embed_tokens.weight": params["embedding"],
        "model.norm.weight": params["final_norm"]["scale"],
    }
    for i in range(config.num_layers):
        layer = f"model.layers.{i}."
        weights[layer + "input_layernorm.weight"] = blocks["attention_norm"]["scale"][i]
        weights[layer + "post_attention_layernorm.weight"] = blocks["mlp_norm"]["scale"][i]
        for name in "qkv":
            weights[layer + f"self_attn.{name}_proj.weight"] = blocks["attention"][name][i].reshape(D, -1).T
        weights[layer + "self_attn.o_proj.weight"] = blocks["attention"]["o"][i].reshape(-1, D).T
        for name in ("gate", "up", "down"):
            weights[layer + f"mlp.{name}_proj.weight"] = blocks["mlp"][name][i].T
    tensors = {name: torch.tensor(np.array(value)) for name, value in weights.items()}
    missing, unexpected = llama.load_state_dict(tensors, strict=False)
    assert missing == ["lm_head.weight"]  # tied
    assert not unexpected
    return llama


def scattered(config, seed=0):
    """Parameters whose norms are not all one, so that a forgotten or misplaced norm shows."""
    params = init_params(config, seed)
    key = jax.random.key(seed)
    return jax.tree.map(
        lambda p: (
            p + 0.2 * jax.random.normal(key, p.shape) if p.shape[-1] == config.hidden_size and p.ndim < 3 else p
        ),
        params,
    )


@partial(jax.jit, static_argnums=0)
def logits_of(config, params, tokens, segment_ids=None):
    return SmolLM.from_params(config, params)(tokens, segment_ids=segment_ids)


def tokens_of(config, *shape, seed=1):
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape).astype(np.int32)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "theta"),
    [
        (6, 2, 100_000.0),
        pytest.param(6, 1, 10_000.0, marks=pytest.mark.slow),
        pytest.param(3, 3, 10_000.0, marks=pytest.mark.slow),
        pytest.param(4, 2, 10_000.0, marks=pytest.mark.slow),
        pytest.param(4, 2, 100_000.0, marks=pytest.mark.release),
        pytest.param(6, 1, 100_000.0, marks=pytest.mark.release),
        pytest.param(3, 3, 100_000.0, marks=pytest.mark.release),
    ],
)
def test_logits_equal_hugging_face_on_odd_shapes(heads, kv_heads, theta):
    config = ModelConfig(
        vocab_size=97,
        hidden_size=12 * heads,
        num_layers=2,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=16,
        intermediate_size=56,
        rope_theta=theta,
    )
    params = scattered(config)
    llama, model = llama_with(params, config), SmolLM.from_params(config, params)
    forward = jax.jit(model)
    for length in (1, 2, 37, SMALLEST_BLOCK, BLOCKS * SMALLEST_BLOCK + 5):
        tokens = tokens_of(config, 2, length)
        with torch.no_grad():
            expected = llama(torch.tensor(tokens).long()).logits.numpy()
        np.testing.assert_allclose(forward(tokens), expected, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_logits_equal_hugging_face_on_the_full_135m_shape():
    config = MODELS["135M"]
    params = init_params(config, 0)
    tokens = tokens_of(config, 1, 600)
    with torch.no_grad():
        expected = llama_with(params, config)(torch.tensor(tokens).long()).logits.numpy()
    model = SmolLM.from_params(config, params)
    np.testing.assert_allclose(jax.jit(model)(tokens), expected, atol=1e-4, rtol=0)


def test_parameter_counts_are_the_published_ones():
    assert MODELS["135M"].num_parameters == 134_515_008
    assert MODELS["360M"].num_parameters == 361_821_120
    assert MODELS["1.7B"].num_parameters == 1_711_376_384
    for config in (TINY, MODELS["quickstart"]):
        counted = sum(leaf.size for leaf in jax.tree.leaves(init_params(config, 0)))
        assert counted == config.num_parameters


def test_an_untied_head_is_counted_and_used():
    config = ModelConfig(**vars(TINY) | {"tie_embeddings": False})
    params = init_params(config, 0)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == config.num_parameters
    tokens = tokens_of(config, 1, 5)
    before = logits_of(config, params, tokens)
    after = logits_of(config, params | {"head": 2 * params["head"]}, tokens)
    np.testing.assert_allclose(after, 2 * before, rtol=1e-5)


def test_future_tokens_cannot_change_the_past():
    """The gradient of an output by every later input is exactly zero, and by every earlier one is not."""
    config, length = TINY, 9
    params = init_params(config, 0)
    tokens = tokens_of(config, 1, length)

    def features_from(embedded):
        model = SmolLM.from_params(config, params, ops=Ops(embed=lambda *_: embedded))
        return model.features(jnp.asarray(tokens))

    jacobian = jax.jit(jax.jacobian(features_from))(params["embedding"][tokens])  # (1, T, D, 1, T, D)
    reach_TT = np.abs(np.asarray(jacobian)).sum(axis=(0, 2, 3, 5))
    assert (np.triu(reach_TT, 1) == 0).all()
    assert (reach_TT[np.tril_indices(length)] > 0).all()


def test_every_product_of_a_layer_is_the_linear_of_its_ops():
    seen = []

    def linear(letters, x, weights):
        seen.append(letters)
        return REFERENCE.linear(letters, x, weights)

    model = SmolLM.from_params(TINY, init_params(TINY, 0), ops=Ops(linear=linear))
    jax.eval_shape(model.features, tokens_of(TINY, 1, 9))
    heads, mlp = ["BTD,DNH->BTNH", *["BTD,DKH->BTKH"] * 2, "BTNH,NHD->BTD"], [*["BTD,DF->BTF"] * 2, "BTF,FD->BTD"]
    assert seen == [*heads, *mlp]


def test_rope_depends_on_distance_only():
    key_q, key_k = jax.random.split(jax.random.key(0))
    q, k = jax.random.normal(key_q, (1, 1, 1, 64)), jax.random.normal(key_k, (1, 1, 1, 64))

    def product(q_position, k_position):
        turned_q = rotate(q, rope_angles(jnp.array([[q_position]]), head_dim=64, theta=1e5))
        turned_k = rotate(k, rope_angles(jnp.array([[k_position]]), head_dim=64, theta=1e5))
        return float(jnp.sum(turned_q * turned_k))

    assert product(9, 4) == pytest.approx(product(1_005, 1_000), abs=1e-3)
    assert abs(product(9, 4) - product(9, 5)) > 0.05


@pytest.mark.parametrize("theta", [1e4, 1e5, 2e6])
def test_no_device_computes_the_frequencies_of_rope(theta):
    """They are constants of the program, rounded once from float64: a device's own power may be off by 1e-6."""
    angles = partial(rope_angles, head_dim=64, theta=theta)
    program = jax.make_jaxpr(angles)(jnp.array([[8191]]))
    assert {"pow", "exp", "exp2", "log"}.isdisjoint(str(equation.primitive) for equation in program.eqns)
    exact_H = 8191 * theta ** (-np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(angles(jnp.array([[8191]]))[0][0, 0, 0], np.cos(exact_H), rtol=0, atol=6e-4)


def test_heads_share_positions_and_differ_only_by_their_weights():
    """Catches RoPE by head index: two heads with equal weights must attend alike."""
    params = init_params(TINY, 0)
    q = params["blocks"]["attention"]["q"]
    params["blocks"]["attention"]["q"] = q.at[:, :, 1].set(q[:, :, 0])
    o = params["blocks"]["attention"]["o"]
    tokens = tokens_of(TINY, 1, 7)
    swapped = o.at[:, 0].set(o[:, 1]).at[:, 1].set(o[:, 0])
    straight = logits_of(TINY, params, tokens)
    params["blocks"]["attention"]["o"] = swapped
    np.testing.assert_allclose(logits_of(TINY, params, tokens), straight, atol=1e-5)


@pytest.mark.parametrize("lengths", [(3, 1, 8), (5, 7), (SMALLEST_BLOCK - 2, 9, 60)])
def test_a_packed_row_equals_its_documents_run_alone(lengths):
    params = scattered(TINY)
    documents = [tokens_of(TINY, 1, n, seed=n) for n in lengths]
    segment_ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)[None]
    packed = logits_of(TINY, params, np.concatenate(documents, axis=1), segment_ids)
    alone = np.concatenate([logits_of(TINY, params, document) for document in documents], axis=1)
    np.testing.assert_allclose(packed, alone, atol=2e-5, rtol=0)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("unroll", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_remat_and_unroll_do_not_change_gradients(remat, unroll):
    params, tokens = init_params(TINY, 0), tokens_of(TINY, 2, 11)

    def gradient(**compute):
        return jax.jit(jax.grad(lambda p: SmolLM.from_params(TINY, p, **compute)(tokens).var()))(params)

    for ours, plain in zip(
        jax.tree.leaves(gradient(remat=remat, unroll=unroll)), jax.tree.leaves(gradient()), strict=True
    ):
        np.testing.assert_allclose(ours, plain, atol=1e-6)


def test_what_is_cheap_is_not_kept():
    """Of the feed-forward the two products that enter it, of attention no scores, of norms what enters them."""
    params, tokens = init_params(TINY, 0), tokens_of(TINY, 2, 11)

    def residuals(p):
        return jax.vjp(lambda p: SmolLM.from_params(TINY, p)(tokens), p)[1]

    shapes = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(residuals, params))]
    rows = (TINY.num_layers, *tokens.shape)
    assert shapes.count((*rows, TINY.intermediate_size)) == 2
    assert shapes.count((*rows, TINY.hidden_size)) == 4
    assert not [shape for shape in shapes if shape[:1] == (TINY.num_layers,) and shape[-2:] == (11, 11)]


@pytest.mark.slow
def test_remat_saves_memory():
    config = ModelConfig(**vars(TINY) | {"num_layers": 8})
    params, tokens = init_params(config, 0), tokens_of(config, 4, 128)

    def temporary_bytes(remat):
        def loss(p):
            return SmolLM.from_params(config, p, remat=remat)(tokens).mean()

        return jax.jit(jax.grad(loss)).lower(params).compile().memory_analysis().temp_size_in_bytes

    none, dots, full = (temporary_bytes(remat) for remat in ("none", "dots", "full"))
    assert full < dots < none


def test_bf16_computes_in_bf16_and_gives_f32_logits_near_those_of_f32():
    params, tokens = init_params(TINY, 0), tokens_of(TINY, 2, 16)
    model = SmolLM.from_params(TINY, params, dtype=jnp.bfloat16)
    assert jax.eval_shape(model.features, tokens).dtype == jnp.bfloat16
    logits, expected = jax.jit(model)(tokens), logits_of(TINY, params, tokens)
    assert logits.dtype == jnp.float32
    assert 0 < float(jnp.abs(logits - expected).max()) < 0.05
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params_of(model)))


def test_decoding_with_a_cache_equals_the_full_forward():
    """Two rows of different lengths, the shorter padded on its right, then five steps each at its own place."""
    params = scattered(TINY)
    decoder, lengths, steps = Decoder(SmolLM.from_params(TINY, params)), np.array([6, 3]), 5
    decode = jax.jit(decoder.features)
    rows = tokens_of(TINY, 2, 16)
    prompt = np.where(np.arange(6) < lengths[:, None], rows[:, :6], 0)
    positions = np.broadcast_to(np.arange(6), (2, 6))
    _, cache = decode(prompt, positions, decoder.init_cache(2, 16))
    for i in range(steps):
        at = (lengths + i)[:, None]
        features, cache = decode(np.take_along_axis(rows, at, axis=1), at, cache)
        for row in range(2):
            full = logits_of(TINY, params, rows[row : row + 1, : at[row, 0] + 1])[0, -1]
            np.testing.assert_allclose(decoder.logits(features)[row, 0], full, atol=2e-5)


def test_parameters_that_do_not_fit_are_named():
    params = init_params(TINY, 0)
    params["blocks"]["mlp"]["up"] = params["blocks"]["mlp"]["up"][:, :, :-1]
    with pytest.raises(ValueError, match=r"blocks/mlp/up: expected shape \(3, 24, 40\)"):
        SmolLM.from_params(TINY, params)
    del params["blocks"]["mlp"]["up"]
    with pytest.raises(ValueError, match="blocks/mlp/up is missing"):
        SmolLM.from_params(TINY, params)


def test_fresh_weights_have_the_configured_spread():
    config = MODELS["quickstart"]
    params = init_params(config, 3)
    for leaf in (params["embedding"], params["blocks"]["attention"]["q"], params["blocks"]["mlp"]["down"]):
        assert float(leaf.std()) == pytest.approx(config.initializer_range, rel=0.01)
    layers = params["blocks"]["mlp"]["up"]
    assert float(jnp.abs(layers[0] - layers[1]).max()) > 0.01  # not one layer copied


def test_a_scaled_residual_init_changes_what_a_block_adds_and_nothing_else():
    """nanotron's StandardParametrizator: o_proj and down_proj by sqrt(2 L), here of three layers."""
    plain, scaled = (init_params(MODELS["quickstart"], 3, scale_residual=scale) for scale in (False, True))
    for group, name in (("attention", "o"), ("mlp", "down")):
        expected = plain["blocks"][group].pop(name) / 6**0.5
        np.testing.assert_allclose(scaled["blocks"][group].pop(name), expected, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, scaled, plain)
