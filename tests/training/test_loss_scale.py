"""float16 learns as float32 does, and an overflow costs a step and half of the scale."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smollm_jax.model.loss import targets_of
from smollm_jax.model.transformer import init_params
from smollm_jax.planning.plan import as_dict, make_plan
from smollm_jax.planning.topology import CHIPS, AbstractDevice
from smollm_jax.runtime.devices import training_dtype
from smollm_jax.runtime.errors import UserError
from smollm_jax.training.compile import compile_step
from smollm_jax.training.loss_scale import FIRST, GOOD_STEPS, LEAST, overflowed
from smollm_jax.training.step import init_state, make_nll
from tests.training.test_step import TINY, batch_of, config_of, mesh_of

F16 = {"dtype": "float16"}


def leaves_equal(one, other):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


@pytest.fixture(scope="module")
def trained():
    """A compiled step of float16 and a copy of a fresh state, whose scale and good steps may be set."""
    config = config_of(compute=F16)
    step = compile_step(config, mesh_of(config), 4, dtype=jnp.float16, remat="none")

    def state(scale=FIRST, good_steps=0, params=None):
        fresh = init_state(config, mesh_of(config), params)
        return fresh | {"loss_scale": {"scale": jnp.float32(scale), "good_steps": jnp.int32(good_steps)}}

    return step, state


def losses_of(dtype, seed):
    config = config_of(phases="200x8", seq_len=32, learning_rate=1e-2, warmup_steps=5, compute={"dtype": dtype})
    step = compile_step(config, mesh_of(config), 8, dtype=jnp.dtype(dtype), remat="none")
    state, losses, rng = init_state(config, mesh_of(config), init_params(TINY, seed)), [], np.random.default_rng(0)
    for _ in range(200):  # half of the tokens follow a rule
        tokens = (rng.integers(0, 53, (8, 1)) + 3 * np.arange(33)) % 53
        tokens = np.where(rng.random((8, 33)) < 0.3, rng.integers(0, 53, (8, 33)), tokens).astype(np.int32)
        state, metrics = step(state, tokens, np.ones((8, 33), np.int32))
        losses.append(metrics["loss"].item())
    return np.array(losses), state


@pytest.mark.slow
def test_200_steps_in_float16_lose_as_much_as_in_float32_within_the_noise_of_seeds():
    runs = ("float16", 0), ("float32", 0), ("float32", 1)
    (ours, state), (theirs, plain), (other, _) = (losses_of(dtype, seed) for dtype, seed in runs)
    noise = np.abs(theirs - other)[20:].mean()
    assert np.abs(ours - theirs)[20:].mean() < noise / 2
    assert abs(ours[-50:].mean() - theirs[-50:].mean()) < max(abs(theirs[-50:].mean() - other[-50:].mean()), 0.02)
    assert ours[-1] < ours[0] - 0.5
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state["params"])} == {"float32"}
    assert state.keys() - plain.keys() == {"loss_scale"}, "other dtypes have no such state"


def test_an_overflow_halves_the_scale_changes_no_weight_and_training_goes_on(trained):
    step, state_of = trained
    state, batch, seen = state_of(scale=2.0**30), batch_of(4, 12), []
    for _ in range(30):
        before = jax.tree.map(np.asarray, {"params": state["params"], "opt_state": state["opt_state"]})
        state, metrics = step(state, *batch)
        after = {name: state[name] for name in before}
        assert metrics["overflow"] == ~metrics["finite"] == leaves_equal(before, after)
        assert np.isfinite(metrics["loss"])
        seen.append((bool(metrics["overflow"]), float(state["loss_scale"]["scale"])))
    skipped = sum(overflow for overflow, _ in seen)
    assert 1 < skipped < 20
    assert [scale for _, scale in seen] == [2.0 ** (30 - min(n, skipped)) for n in range(1, 31)]
    assert int(state["loss_scale"]["good_steps"]) == 30 - skipped
    assert int(state["step"]) == 30


def test_the_scale_doubles_after_good_steps_and_its_size_changes_no_update(trained):
    step, state_of = trained
    doubled, _ = step(state_of(good_steps=GOOD_STEPS - 1), *batch_of(4, 12))
    assert (doubled["loss_scale"]["scale"], doubled["loss_scale"]["good_steps"]) == (2 * FIRST, 0)
    small, _ = step(state_of(scale=FIRST / 4), *batch_of(4, 12))
    for a, b in zip(jax.tree.leaves(doubled["params"]), jax.tree.leaves(small["params"]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7)  # numbers below the normal ones of float16 round otherwise


def test_what_is_not_the_scales_fault_is_a_bad_step(trained):
    step, state_of = trained
    params = init_params(TINY, 0)
    params["embedding"] = params["embedding"].at[7, 0].set(jnp.nan)
    state, metrics = step(state_of(params=params), *batch_of(4, 12))
    assert not metrics["finite"]
    assert not metrics["overflow"]
    assert state["loss_scale"]["scale"] == FIRST
    # scale at its least: a gradient that overflows even so would do so for ever
    for scale, is_overflow in ((2 * LEAST, True), (LEAST, False)):
        assert overflowed({"scale": jnp.float32(scale)}, jnp.float32(3), jnp.float32(jnp.inf)) == is_overflow


def test_gradients_too_small_for_float16_are_there_because_of_the_scale():
    """A token that is unlikely everywhere has a gradient below 6e-8, where float16 ends."""
    config, params = config_of(compute=F16), init_params(TINY, 0)
    params["embedding"] = params["embedding"] * 4
    nll, batch = make_nll(config, mesh_of(config), dtype=jnp.float16, remat="none"), batch_of(4, 12)

    def gradient(factor):
        grads = jax.jit(jax.grad(nll))(params, *batch, targets_of(*batch)[1] * factor)
        return np.asarray(grads["blocks"]["mlp"]["down"]) / factor

    exact = np.asarray(
        jax.jit(jax.grad(make_nll(config, mesh_of(config), dtype=jnp.float32, remat="none")))(params, *batch)[
            "blocks"
        ]["mlp"]["down"]
    )
    lost, kept = (np.abs(gradient(factor) - exact).max() / np.abs(exact).max() for factor in (2.0**-24, 1.0))
    assert kept < 0.02
    assert lost > 0.3


@pytest.mark.parametrize(
    ("kind", "capability", "dtype"),
    [("Tesla T4", "7.5", "float16"), ("Tesla V100-SXM2-16GB", "7.0", "float16"),
     ("NVIDIA A100", "8.0", "bfloat16"), ("AMD", "gfx942", "bfloat16")],
)  # fmt: skip
def test_auto_is_float16_on_a_gpu_without_bfloat16(kind, capability, dtype):
    device = AbstractDevice(0, "gpu", kind, capability)
    assert training_dtype("auto", device).name == dtype
    assert training_dtype("bfloat16", device).name == "bfloat16"
    assert training_dtype("auto", jax.devices("cpu")[0]).name == "float32"
    with pytest.raises(UserError, match="a TPU computes in bfloat16"):
        training_dtype("float16", SimpleNamespace(platform="tpu"))


def test_a_t4_is_planned_in_float16_with_the_reference_functions():
    from smollm_jax.cli.arguments import parse

    found = as_dict(make_plan(parse([]), "gpu-t4:1"))
    assert (found["dtype"], found["attention"], found["fits"]) == ("float16", "plain", True)
    assert found["estimate"]["tokens_per_second"] < 65e12 / found["flops_per_token"]
    assert CHIPS["gpu-t4"].compute_capability == "7.5"
