"""The loss of pairs against the formulas, written out with whole logits, and its gradient against autodiff."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smollm_jax.config.architecture import ModelConfig
from smollm_jax.config.preference import FIGURES, PreferenceConfig
from smollm_jax.config.settings import ComputeConfig, Config, DataConfig, RunConfig
from smollm_jax.data.best_fit import SECOND, BestFitPacker, context, ids_of
from smollm_jax.distributed.sharding import make_mesh
from smollm_jax.model.preference import pair_step, pairs_per_row
from smollm_jax.model.transformer import SmolLM, init_params
from smollm_jax.runtime.errors import UserError
from smollm_jax.training.compile import PairStep, compiled_bytes
from smollm_jax.training.step import create, make_logprobs, make_nll, make_step

TINY = ModelConfig(
    vocab_size=48, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=24,
    max_seq_len=64, initializer_range=0.3,
)  # fmt: skip
T = 31
LOSSES = {
    "sigmoid": PreferenceConfig(beta=0.3),
    "smoothed": PreferenceConfig(beta=0.3, label_smoothing=0.2),
    "ipo": PreferenceConfig(pair_loss="ipo", beta=0.3),
    "apo_zero": PreferenceConfig(pair_loss="apo_zero", beta=0.3),
}


def pair_of(rng, prompt, chosen, rejected):
    """Tokens of two answers to one prompt."""
    shared = rng.integers(0, TINY.vocab_size, prompt)
    sides = [
        np.concatenate([context(shared), rng.integers(0, TINY.vocab_size, n)]).astype(np.int32)
        for n in (chosen, rejected)
    ]
    return sides


def rows_of(pairs, rows):
    packer = BestFitPacker(T)
    for number, (chosen, rejected) in enumerate(pairs):
        begins = np.concatenate([[rejected[0] + SECOND], rejected[1:]]).astype(np.int32)
        packer.add(number, np.concatenate([chosen, begins]))
    return packer.batch(rows)


def alone(params, pairs):
    """The log-prob of each answer in a row of its own, from whole logits, and its targets: (pairs, 2)."""
    rows = np.zeros((2 * len(pairs), T + 1), np.int32)
    counted, segments = np.zeros((2, *rows.shape), np.int32)
    for i, side in enumerate(side for pair in pairs for side in pair):
        rows[i, : len(side)], counted[i, : len(side)], segments[i, : len(side)] = ids_of(side), side >= 0, 1
    logits = SmolLM.from_params(TINY, params)(rows[:, :-1], segment_ids=segments[:, :-1])
    each = jnp.take_along_axis(jax.nn.log_softmax(logits), rows[:, 1:, None], axis=-1)[..., 0]
    return jnp.sum(each * counted[:, 1:], axis=1).reshape(-1, 2), counted[:, 1:].sum(1).reshape(-1, 2)


def formula(settings, ratios, lengths):
    """The losses of pairs, as their papers write them."""
    one, other = ratios[:, 0], ratios[:, 1]
    beta, smoothing = settings.beta, settings.label_smoothing
    if settings.pair_loss == "ipo":
        return (one / lengths[:, 0] - other / lengths[:, 1] - 0.5 / beta) ** 2
    if settings.pair_loss == "apo_zero":
        return 1 - 1 / (1 + jnp.exp(-beta * one)) + 1 / (1 + jnp.exp(-beta * other))
    z = beta * (one - other)
    return (1 - smoothing) * jnp.log1p(jnp.exp(-z)) + smoothing * jnp.log1p(jnp.exp(z))


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(0)
    return [pair_of(rng, *sizes) for sizes in [(3, 4, 5), (2, 6, 3), (4, 2, 7), (5, 8, 3)]]


@pytest.fixture(scope="module")
def batch(pairs):
    batch = rows_of(pairs, 4)
    assert np.abs(batch.segment_ids).max() >= 4, "no row holds two pairs"
    assert not batch.segment_ids[-1].any(), "no row is padding"
    return batch


def order_in(batch, pairs):
    """The row and place of each pair, by its tokens."""
    places = {}
    for row, (tokens, segments) in enumerate(zip(batch.tokens, batch.segment_ids, strict=True)):
        for place in range(np.abs(segments).max() // 2):
            ids = tokens[np.abs(segments) == 2 * place + 1].tolist()
            first = next(i for i, (chosen, _) in enumerate(pairs) if ids_of(chosen).tolist() == ids)
            places[first] = row, place
    return tuple(np.array([places[i] for i in range(len(pairs))]).T)


def config_of(settings=PreferenceConfig(), parts=1, mesh=""):  # noqa: B008 - frozen
    data = DataConfig(data="unread", data_kind="pairs", seq_len=T)
    compute = ComputeConfig(grad_accum=parts, mesh=mesh)
    return Config(model=TINY, run=RunConfig(phases="10x4"), data=data, preference=settings, compute=compute)


@pytest.fixture(scope="module")
def programs():
    """The sums of log-probs, and the gradient of the weighted negative log-likelihood."""
    nll = make_nll(config_of(), dtype=jnp.float32, remat="none")
    return jax.jit(make_logprobs(config_of(), dtype=jnp.float32)), jax.jit(jax.grad(nll))


def test_the_sum_of_an_answer_in_a_packed_row_is_its_sum_alone(batch, pairs, programs):
    params, order = init_params(TINY, 1), order_in(batch, pairs)
    sums = np.array(programs[0](params, batch.tokens, batch.segment_ids))
    assert sums.shape == (4, pairs_per_row(T), 2)
    expected, _ = jax.jit(lambda params: alone(params, pairs))(params)
    np.testing.assert_allclose(sums[order], expected, rtol=1e-5)
    sums[order] = 0
    assert not sums.any()


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_are_autodiff_s_of_the_formula(name, batch, pairs, programs):
    settings, params, start = LOSSES[name], init_params(TINY, 1), init_params(TINY, 2)
    logprobs, gradient_of = programs
    sums, reference = (logprobs(x, batch.tokens, batch.segment_ids) for x in (params, start))
    order = order_in(batch, pairs)

    def direct(params):
        policy, lengths = alone(params, pairs)
        return jnp.mean(formula(settings, policy - reference[order], lengths))

    expected, gradient = jax.jit(jax.value_and_grad(direct))(params)
    totals, weights = jax.jit(pair_step, static_argnums=3)(sums, reference, batch.segment_ids, settings)
    assert int(totals["pairs"]) == len(pairs)
    assert float(totals["loss"]) / len(pairs) == pytest.approx(float(expected), rel=1e-5)
    ours = gradient_of(params, batch.tokens, batch.segment_ids, weights)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a / len(pairs), b, atol=2e-6, rtol=2e-4)
    assert not np.asarray(weights)[batch.segment_ids[:, 1:] <= 0].any()
    if name == "sigmoid":
        rewards = (sums - reference)[order] * settings.beta
        assert float(totals["rewards/chosen"]) == pytest.approx(float(rewards[:, 0].sum()), rel=1e-4)
        assert float(totals["rewards/accuracies"]) == float((rewards[:, 0] > rewards[:, 1]).sum())
        assert float(totals["logps/rejected"]) == pytest.approx(float(sums[order][:, 1].sum()), rel=1e-5)


def step_of(batch, parts, mesh):
    config, params = config_of(LOSSES["sigmoid"], parts, mesh), init_params(TINY, 1)
    devices = make_mesh(config) if mesh else None
    sums = jax.jit(make_logprobs(config, devices, dtype=jnp.float32))
    reference = sums(init_params(TINY, 2), batch.tokens, batch.segment_ids)
    step = jax.jit(make_step(config, devices, dtype=jnp.float32, remat="none"))
    logprobs = sums(params, batch.tokens, batch.segment_ids)
    _, metrics = step(create(config, params), batch.tokens, batch.segment_ids, logprobs, reference)
    return {name: float(metrics[name]) for name in ("loss", "grad_norm", "pairs", *FIGURES)}


@pytest.mark.parametrize(
    ("parts", "mesh"), [(2, ""), pytest.param(1, "data=2,tensor=2", marks=pytest.mark.slow)], ids=str
)
@pytest.mark.slow
def test_a_step_has_the_mean_loss_of_its_pairs_in_parts_and_on_several_devices(
    batch, pairs, programs, parts, mesh
):
    whole = step_of(batch, 1, "")
    assert step_of(batch, parts, mesh) == pytest.approx(whole, rel=1e-4)
    sums, reference = (programs[0](init_params(TINY, n), batch.tokens, batch.segment_ids) for n in (1, 2))
    totals, _ = jax.jit(pair_step, static_argnums=3)(sums, reference, batch.segment_ids, LOSSES["sigmoid"])
    assert whole["loss"] == pytest.approx(float(totals["loss"]) / len(pairs), rel=1e-4)


def test_equal_models_have_the_loss_ln_2_and_no_reward(batch):
    sums = jnp.linspace(-90, -20, 4 * pairs_per_row(T) * 2).reshape(4, -1, 2)
    totals, _ = pair_step(sums, sums, batch.segment_ids, PreferenceConfig())
    assert float(totals["loss"] / totals["pairs"]) == pytest.approx(math.log(2), abs=1e-7)
    assert float(totals["rewards/margins"]) == float(totals["rewards/accuracies"]) == 0


def test_settings_that_no_loss_can_use_are_refused():
    with pytest.raises(UserError, match=r"label_smoothing=0.5 must be below 0.5"):
        PreferenceConfig(label_smoothing=0.5)
    with pytest.raises(UserError, match=r"label_smoothing=0.1 is for --pair-loss sigmoid; ipo came"):
        PreferenceConfig(pair_loss="ipo", label_smoothing=0.1)
    with pytest.raises(UserError, match="these are for pairs, so give --data-kind pairs"):
        Config(preference=PreferenceConfig(beta=0.1))


def test_memory_counts_the_forward_pass_beside_the_optimizer():
    def program(**sizes):
        memory = {"argument": 0, "output": 0, "alias": 0, "temp": 0} | sizes
        held = SimpleNamespace(**{f"{name}_size_in_bytes": size for name, size in memory.items()})
        return SimpleNamespace(memory_analysis=lambda: held)

    step = program(argument=300, output=300, alias=300, temp=50)
    assert compiled_bytes(PairStep(program(argument=100, output=1, temp=20), step)) == 350
    assert compiled_bytes(PairStep(program(argument=100, output=1, temp=90), step)) == 300 + 1 + 90
