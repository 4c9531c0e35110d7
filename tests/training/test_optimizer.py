"""The optimizer against optax's own parts, and the shapes of the schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from smollm_jax.config.architecture import ModelConfig
from smollm_jax.config.settings import Config, OptimizerConfig, RunConfig
from smollm_jax.model.transformer import init_params
from smollm_jax.training.optimizer import learning_rate_schedule, make_optimizer

TINY = ModelConfig(
    vocab_size=53, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=24
)


@pytest.mark.parametrize("length", [0.0, 0.3, 7.0])
def test_the_optimizer_given_sums_and_their_norm_is_that_of_optax_given_means(length):
    params, clip_norm, targets = init_params(TINY, 0), 0.5, 20
    whole = jax.jit(optax.tree.norm)(params)
    means = jax.tree.map(lambda p: np.asarray(p) * np.float32(length / whole), params)
    sums = jax.tree.map(lambda g: g * targets, means)
    optax_adamw = optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.scale_by_adam(0.9, 0.95, 1e-8),
        optax.add_decayed_weights(0.1, mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 2, tree)),
    )
    ours = make_optimizer(OptimizerConfig(clip_norm=clip_norm, weight_decay=0.1))
    given = {"scale": jnp.float32(1 / targets), "norm": jnp.float32(length)}
    _, state = jax.jit(lambda sums: ours.update(sums, ours.init(params), params, **given))(sums)
    _, expected = jax.jit(lambda means: optax_adamw.update(means, optax_adamw.init(params), params))(means)
    assert jax.tree.structure(state) == jax.tree.structure(expected)  # checkpoints hold it
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-12)


def test_norms_do_not_decay():
    params = init_params(TINY, 0)
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.9))
    zeros = jax.tree.map(np.zeros_like, params)
    given = {"scale": 1.0, "norm": jnp.float32(0)}
    updates, _ = jax.jit(lambda zeros: optimizer.update(zeros, optimizer.init(params), params, **given))(zeros)
    np.testing.assert_array_equal(updates["final_norm"]["scale"], 0)
    np.testing.assert_array_equal(updates["blocks"]["mlp_norm"]["scale"], 0)
    np.testing.assert_allclose(updates["embedding"], 0.9 * params["embedding"], rtol=1e-6)


def test_the_linear_schedule_warms_up_and_ends_at_zero_without_wasting_an_update():
    config = Config(run=RunConfig(phases="1000x2"))
    rate = learning_rate_schedule(config)
    rates = np.asarray(jax.jit(jax.vmap(rate))(np.arange(1_001)))
    assert rates[:2] == pytest.approx([6e-6, 1.2e-5], rel=1e-4)  # optax counts down from the peak, in f32
    assert rates[99:101] == pytest.approx([6e-4, 6e-4])
    assert (rates[:1_000] > 0).all()
    assert rates[1_000] == 0
    assert np.diff(rates[100:]) == pytest.approx(-6e-4 / 900, rel=1e-2)


def test_the_replica_decays_over_both_phases():
    config = Config()
    assert [config.batch_size_at(step) for step in (1, 5_000, 5_001, 5_050)] == [32, 32, 8, 8]
    rate = learning_rate_schedule(config)
    assert float(rate(4_999)) > float(rate(5_000)) > float(rate(5_049)) > 0
    assert float(rate(5_000)) == pytest.approx(6e-4 * 50 / 4_950, rel=1e-4)


@pytest.mark.parametrize(
    ("schedule", "at_half", "at_end"), [("constant", 1.0, 1.0), ("cosine", 0.5, 0.1), ("wsd", 1.0, 0.1)]
)
def test_other_schedules_have_their_shapes(schedule, at_half, at_end):
    optimizer = OptimizerConfig(
        learning_rate=1.0,
        schedule=schedule,
        warmup_steps=0,
        final_learning_rate=0.0 if schedule == "constant" else 0.1,
    )
    rate = learning_rate_schedule(Config(run=RunConfig(phases="100x2"), optimizer=optimizer))
    half = at_half if schedule != "cosine" else 0.55
    assert float(rate(50)) == pytest.approx(half, abs=1e-6)
    assert float(rate(100)) == pytest.approx(at_end, abs=1e-6)
    if schedule == "wsd":
        assert float(rate(79)) == pytest.approx(1.0)
        assert float(rate(90)) == pytest.approx(0.55, abs=1e-6)


@pytest.mark.parametrize(
    ("shape", "left"),
    [
        ("linear", lambda t: 1 - t),
        ("cosine", lambda t: (1 + np.cos(np.pi * t)) / 2),
        ("1-sqrt", lambda t: 1 - np.sqrt(t)),
    ],
)
@pytest.mark.parametrize("warmup", [0, 10])
def test_the_decay_of_wsd_follows_its_formula_after_a_stable_rate(shape, left, warmup):
    optimizer = OptimizerConfig(
        learning_rate=0.5, schedule="wsd", warmup_steps=warmup, decay_steps=40, decay_shape=shape,
        final_learning_rate=0.1,
    )  # fmt: skip
    config = Config(run=RunConfig(phases="100x2"), optimizer=optimizer)
    rates = np.asarray(jax.jit(jax.vmap(learning_rate_schedule(config)))(np.arange(101)))
    share = np.arange(41) / 40
    np.testing.assert_allclose(rates[60:], 0.1 + 0.4 * left(share), atol=1e-6)
    np.testing.assert_allclose(rates[warmup:60], 0.5, atol=1e-7)
    assert config.decay_start == 60


@pytest.mark.parametrize("schedule", ["constant", "wsd"])
def test_more_steps_leave_every_rate_and_batch_before_the_decay_as_it_was(schedule):
    optimizer = OptimizerConfig(schedule=schedule)
    before, after = (Config(run=RunConfig(phases="80x4,20x2", extend=n), optimizer=optimizer) for n in (0, 50))
    steps = before.decay_start or before.total_steps
    assert (after.total_steps, after.batch_size_at(150), after.decay_steps) == (150, 2, before.decay_steps)
    assert [after.batch_size_at(n) for n in range(1, 101)] == [before.batch_size_at(n) for n in range(1, 101)]
    one, two = (np.asarray(jax.vmap(learning_rate_schedule(x))(np.arange(steps + 1))) for x in (before, after))
    np.testing.assert_array_equal(one, two)
