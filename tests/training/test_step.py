"""The train step: loss, accumulation, updates, and the program it compiles to."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from smollm_jax.config.architecture import ModelConfig
from smollm_jax.config.recipes import RECIPES
from smollm_jax.config.settings import ComputeConfig, Config, DataConfig, OptimizerConfig, RunConfig
from smollm_jax.data.batch_hash import batch_hash
from smollm_jax.distributed.sharding import make_mesh
from smollm_jax.model.transformer import SmolLM, init_params
from smollm_jax.training.compile import compile_step, compile_steps
from smollm_jax.training.step import Vote, create, init_state, make_nll, make_step

GO, STOP, ENDED, VOID = Vote

TINY = ModelConfig(
    vocab_size=53, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=24
)


def config_of(*, phases="20x4", seq_len=12, compute=None, **optimizer):
    return Config(
        model=TINY,
        run=RunConfig(phases=phases),
        data=DataConfig(seq_len=seq_len),
        optimizer=OptimizerConfig(**optimizer),
        compute=ComputeConfig(**({"loss_chunk": 16} | (compute or {}))),
    )


def mesh_of(config):
    return make_mesh(config, jax.devices()[:1])


def batch_of(rows, length, *, vocab=TINY.vocab_size, seed=0):
    """Rows of random tokens and documents, the last with padding at its end."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, (rows, length + 1)).astype(np.int32)
    segment_ids = 1 + np.cumsum(rng.random((rows, length + 1)) < 0.2, axis=1).astype(np.int32)
    segment_ids[-1, length // 2 :] = 0
    return tokens, segment_ids


def is_target(segment_ids):
    """The tokens that have a successor of their own, found in the plainest way: a Python loop."""
    found = np.zeros(segment_ids[:, 1:].shape, bool)
    for row in range(found.shape[0]):
        for t in range(found.shape[1]):
            found[row, t] = segment_ids[row, t] == segment_ids[row, t + 1] != 0
    return found


def whole_loss(params, tokens, segment_ids, counted):
    """The sum of -log p over the next tokens that are `counted`."""
    logits = SmolLM.from_params(TINY, params)(tokens[:, :-1], segment_ids=segment_ids[:, :-1])
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)[..., 0]
    return -(picked * counted).sum()


def run_steps(config, batches, params=None):
    mesh = mesh_of(config)
    compiled = {}
    state, metrics = init_state(config, mesh, params), []
    for tokens, segment_ids in batches:
        if len(tokens) not in compiled:
            compiled[len(tokens)] = compile_step(config, mesh, len(tokens), dtype=jnp.float32, remat="none")
        state, values = compiled[len(tokens)](state, tokens, segment_ids)
        metrics.append({name: value.item() for name, value in values.items() if value.ndim == 0})
    return state, metrics


@pytest.fixture(scope="module")
def jitted_step():
    return jax.jit(make_step(config_of(), dtype=jnp.float32, remat="none"))


def test_the_loss_is_summed_nll_over_the_targets_of_the_whole_step():
    tokens, segment_ids = batch_of(4, 12)
    state, metrics = run_steps(config_of(), [(tokens, segment_ids)])
    del state
    counted = is_target(segment_ids)
    nll = jax.jit(whole_loss)(init_params(TINY, 0), tokens, segment_ids, counted)
    assert metrics[0]["targets"] == counted.sum()
    assert metrics[0]["loss"] == pytest.approx(float(nll) / counted.sum(), rel=1e-5)


@pytest.mark.parametrize("parts", [4, pytest.param(2, marks=pytest.mark.slow)])
def test_accumulation_equals_one_big_batch(parts):
    batch = batch_of(8, 12)
    whole, whole_metrics = run_steps(config_of(phases="20x8"), [batch])
    state, metrics = run_steps(config_of(phases="20x8", compute={"grad_accum": parts}), [batch])
    assert metrics[0]["loss"] == pytest.approx(whole_metrics[0]["loss"], rel=1e-6)
    assert metrics[0]["grad_norm"] == pytest.approx(whole_metrics[0]["grad_norm"], rel=1e-5)
    moments = zip(jax.tree.leaves(state["opt_state"]), jax.tree.leaves(whole["opt_state"]), strict=True)
    for a, b in moments:
        np.testing.assert_allclose(a, b, atol=1e-7)


@pytest.mark.parametrize(
    "parts", [pytest.param(2, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.release)]
)
def test_the_z_loss_is_trained_on_and_logged_apart(parts):
    config = config_of(z_loss=0.1, compute={"grad_accum": parts})
    params, (tokens, segment_ids) = init_params(TINY, 0), batch_of(4, 12)
    counted = is_target(segment_ids)

    def squares(params):
        logits = SmolLM.from_params(TINY, params)(tokens[:, :-1], segment_ids=segment_ids[:, :-1])
        return (jax.nn.logsumexp(logits, axis=-1) ** 2 * counted).sum() / counted.sum()

    def loss(params):
        return whole_loss(params, tokens, segment_ids, counted) / counted.sum() + 0.1 * squares(params)

    _, metrics = run_steps(config, [(tokens, segment_ids)], params)
    total, gradients = jax.jit(jax.value_and_grad(loss))(params)
    assert metrics[0]["z_loss"] == pytest.approx(0.1 * float(jax.jit(squares)(params)), rel=1e-5)
    assert metrics[0]["loss"] + metrics[0]["z_loss"] == pytest.approx(float(total), rel=1e-5)
    assert metrics[0]["grad_norm"] == pytest.approx(float(optax.tree.norm(gradients)), rel=1e-4)


def test_the_moving_average_follows_the_weights_and_skips_a_step_without_finite_gradients():
    config = config_of(ema=0.5, learning_rate=1e-2)
    step, state = jax.jit(make_step(config, dtype=jnp.float32, remat="none")), init_state(config, mesh_of(config))
    average = state["params"]
    for count in range(1, 9):
        state, _ = step(state, *batch_of(4, 12, seed=count))
        keep = min(0.5, count / (9 + count))  # shorter at first
        average = jax.tree.map(lambda a, p, keep=keep: keep * a + (1 - keep) * p, average, state["params"])
    for ours, expected in zip(jax.tree.leaves(state["ema"]), jax.tree.leaves(average), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-6)
    state["params"]["embedding"] = state["params"]["embedding"].at[7, 0].set(jnp.nan)
    after, metrics = step(state, *batch_of(4, 12))
    assert not metrics["finite"]
    for ours, expected in zip(jax.tree.leaves(after["ema"]), jax.tree.leaves(state["ema"]), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_adamw_updates_equal_those_of_torch():
    import torch

    config = config_of(learning_rate=1e-2, weight_decay=0.1, clip_norm=0.5, phases="10x4")
    params = init_params(TINY, 0)
    batches = [batch_of(4, 12, seed=i) for i in range(4)]
    state, metrics = run_steps(config, batches, params)
    tensors = {jax.tree_util.keystr(path): torch.tensor(np.array(leaf), requires_grad=True)
               for path, leaf in jax.tree_util.tree_leaves_with_path(params)}  # fmt: skip
    groups = [
        {"params": [t for name, t in tensors.items() if "scale" not in name], "weight_decay": 0.1},
        {"params": [t for name, t in tensors.items() if "scale" in name], "weight_decay": 0.0},
    ]
    torch_adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    gradients_of = jax.jit(jax.grad(whole_loss))
    for i, (tokens, segment_ids) in enumerate(batches):
        current = jax.tree.unflatten(jax.tree.structure(params), [t.detach().numpy() for t in tensors.values()])
        counted = is_target(segment_ids)
        gradients = gradients_of(current, tokens, segment_ids, counted)
        for tensor, gradient in zip(tensors.values(), jax.tree.leaves(gradients), strict=True):
            tensor.grad = torch.tensor(np.array(gradient)) / counted.sum()
        torch.nn.utils.clip_grad_norm_(tensors.values(), 0.5)
        for group in torch_adamw.param_groups:
            group["lr"] = metrics[i]["learning_rate"]
        torch_adamw.step()
    for ours, theirs in zip(jax.tree.leaves(state["params"]), tensors.values(), strict=True):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=2e-5)


@pytest.mark.parametrize(
    ("votes", "targets", "counts"),
    [
        ([GO, STOP], True, True),
        ([GO, ENDED], True, True),
        ([STOP, ENDED], True, True),
        ([ENDED, ENDED], False, False),
        ([STOP, ENDED], False, False),
        ([GO, VOID], True, False),
        ([VOID, STOP], True, False),
    ],
)
def test_a_step_is_void_when_a_process_has_no_part_or_the_data_has_ended(jitted_step, votes, targets, counts):
    state, (tokens, segment_ids) = init_state(config_of(), mesh_of(config_of())), batch_of(4, 12)
    after, metrics = jitted_step(state, tokens, segment_ids * targets, np.array(votes))
    assert metrics["votes"].tolist() == [votes.count(kind) for kind in (GO, STOP, ENDED, VOID)]
    assert int(after["step"]) == metrics["counts"] == counts
    assert (after["params"]["embedding"] != state["params"]["embedding"]).any() == counts


def test_the_step_hashes_the_batch_it_was_given(jitted_step):
    config, batches = config_of(), [batch_of(4, 12, seed=seed) for seed in range(3)]
    state = init_state(config, mesh_of(config))
    for tokens, segment_ids in batches:
        words = jitted_step(state, tokens, segment_ids, np.array([GO, GO]))[1]["batch_hash"]
        np.testing.assert_array_equal(words, batch_hash(tokens, segment_ids))


def test_a_step_without_finite_gradients_changes_nothing_but_the_count():
    config = config_of()
    params = init_params(TINY, 0)
    params["embedding"] = params["embedding"].at[7, 0].set(jnp.inf)
    batch = batch_of(4, 12)
    state, metrics = run_steps(config, [batch], params)
    assert not metrics[0]["finite"]
    assert int(state["step"]) == 1
    for after, before in zip(jax.tree.leaves(state["params"]), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(after, before)
    fresh = init_state(config, mesh_of(config), params)
    for after, before in zip(
        jax.tree.leaves(state["opt_state"]), jax.tree.leaves(fresh["opt_state"]), strict=True
    ):
        np.testing.assert_array_equal(after, before)


@pytest.mark.slow
def test_random_tokens_cannot_be_learned_below_the_logarithm_of_the_vocabulary():
    """The canary for a leak of targets into inputs: fresh random tokens each step, yet plenty of training."""
    config = config_of(phases="200x8", seq_len=32, learning_rate=3e-2, warmup_steps=5)
    batches = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        batches.append((rng.integers(0, 53, (8, 33)).astype(np.int32), np.ones((8, 33), np.int32)))
    _, metrics = run_steps(config, batches)
    last = np.mean([values["loss"] for values in metrics[-50:]])
    assert np.log(53) - 0.02 < last < np.log(53) + 0.1


def test_a_pattern_is_learned():
    """The other side of the canary: what can be predicted is."""
    config = config_of(phases="150x8", seq_len=32, learning_rate=1e-2, warmup_steps=5)
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(150):
        tokens = (rng.integers(0, 53, (8, 1)) + 3 * np.arange(33)) % 53
        batches.append((tokens.astype(np.int32), np.ones((8, 33), np.int32)))
    _, metrics = run_steps(config, batches)
    assert metrics[-1]["loss"] < 0.5


def test_bf16_training_keeps_f32_masters():
    config = config_of()
    step = compile_step(config, mesh_of(config), 4, dtype=jnp.bfloat16, remat="none")
    state, _ = step(init_state(config, mesh_of(config)), *batch_of(4, 12))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state["params"])} == {"float32"}
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state["params"], init_params(TINY, 0))
    # the first warm-up update is far below what a bf16 weight of 1.0 could show
    assert 0 < moved["final_norm"]["scale"] < 2**-9


@pytest.mark.parametrize(("dtype", "stacks"), [(jnp.bfloat16, True), (jnp.float32, False)])
def test_a_cpu_stacks_the_bits_of_bf16(dtype, stacks):
    config = config_of()
    program = compile_step(config, mesh_of(config), 4, dtype=dtype, remat="none").as_text()
    assert (f"u16[{config.model.num_layers}," in program) == stacks


def test_a_cpu_does_not_stack_short_copies_of_weights():
    config = config_of()
    program = compile_step(config, mesh_of(config), 4, dtype=jnp.bfloat16, remat="none").as_text()
    L, D, F = TINY.num_layers, TINY.hidden_size, TINY.intermediate_size
    assert f"f32[{L},{D},{F}]" in program
    assert f"u16[{L},{D},{F}]" not in program
    assert f"bf16[{L},{D},{F}]" not in program


def test_a_cpu_multiplies_bf16_with_results_in_f32():
    """What is multiplied with weights and head, forward and backward; attention has arrays of five dims."""

    def products(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                yield *(var.aval for var in equation.invars), equation.outvars[0].aval
            for inner in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
                if hasattr(inner, "eqns"):
                    yield from products(inner)

    config, rows = config_of(), jnp.ones((4, 13), jnp.int32)
    nll = make_nll(config, mesh_of(config), dtype=jnp.bfloat16, remat="none")
    gradient = jax.make_jaxpr(jax.grad(nll))(init_params(config.model, 0), rows, rows)
    found = [arrays for arrays in products(gradient) if arrays[0].ndim < 5 and arrays[1].ndim < 5]
    assert len(found) >= 3 * len("q k v o gate up down head".split())
    assert {tuple(str(array.dtype) for array in arrays) for arrays in found} == {
        ("bfloat16", "bfloat16", "float32")
    }


def test_smollm2_begins_with_the_published_spread_and_the_replica_with_its_own():
    """nanotron divides the std of o_proj and down_proj by sqrt(2 L)."""
    small = {"vocab_size": 53, "hidden_size": 72, "num_kv_heads": 9, "head_dim": 8, "intermediate_size": 72}
    for recipe, smaller in (("smollm2", (2 * 30) ** 0.5), ("replica", 1.0)):
        config = replace(RECIPES[recipe], model=replace(RECIPES[recipe].model, **small))
        assert config.model.initializer_range == 1 / 24
        blocks = jax.jit(partial(create, config))(None)["params"]["blocks"]
        for weights in (blocks["attention"]["o"], blocks["mlp"]["down"]):
            assert float(weights.std()) == pytest.approx(1 / 24 / smaller, rel=0.01)
        for weights in (blocks["attention"]["q"], blocks["mlp"]["gate"]):
            assert float(weights.std()) == pytest.approx(1 / 24, rel=0.01)


@pytest.mark.slow
def test_remat_auto_takes_the_first_policy_that_fits():
    config = config_of(seq_len=64, phases="20x8")
    mesh = mesh_of(config)
    assert compile_steps(config, mesh, dtype=jnp.float32, memory_bytes=10**12)[1] == "none"
    assert compile_steps(config, mesh, dtype=jnp.float32, memory_bytes=1)[1] == "full"
    forced = replace(config, compute=replace(config.compute, remat="dots"))
    assert compile_steps(forced, mesh, dtype=jnp.float32, memory_bytes=1)[1] == "dots"
