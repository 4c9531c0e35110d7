"""Low-rank adapters: their formula, their gradients, and a step that trains them alone."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smollm_jax.cli.arguments import parse
from smollm_jax.config.adapters import AdapterConfig, adapter_shapes, apply_adapters
from smollm_jax.config.architecture import MODELS, PARAMETER_DIMS
from smollm_jax.config.settings import ComputeConfig, Config, DataConfig, RunConfig
from smollm_jax.distributed.sharding import make_mesh
from smollm_jax.runtime.errors import UserError
from smollm_jax.runtime.trees import flatten, unflatten
from smollm_jax.training.adapters import whole_weights
from smollm_jax.training.step import abstract_state, init_state, make_nll, make_step, trained_part
from tests.support.hf_folders import TINY, numpy_params

LETTERS = {  # of A·B, an independent statement of which dims are inputs
    "q": "ldr,lrnh->ldnh", "k": "ldr,lrkh->ldkh", "v": "ldr,lrkh->ldkh", "o": "lnhr,lrd->lnhd",
    "gate": "ldr,lrf->ldf", "up": "ldr,lrf->ldf", "down": "lfr,lrd->lfd",
}  # fmt: skip


def config_of(rank=3, mesh="data=1", **adapter):
    return Config(
        model=TINY,
        run=RunConfig(phases="20x4", init_from="base"),
        data=DataConfig(seq_len=12),
        compute=ComputeConfig(loss_chunk=16, dtype="float32", mesh=mesh, attention="plain"),
        adapter=AdapterConfig(lora_rank=rank, **adapter),
    )


def batch(rows=4, length=12):
    tokens = np.random.default_rng(0).integers(0, TINY.vocab_size, (rows, length + 1)).astype(np.int32)
    return tokens, np.ones_like(tokens)


def random_adapters(config, seed=1):
    """Adapters that change the weights: at the start of a run B is zero."""
    rng, shapes = np.random.default_rng(seed), adapter_shapes(config.adapter, TINY)
    return {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def products(config, adapters):
    """s·A·B by path, in the shape of the matrix."""
    return {
        path: config.adapter.scale
        * np.einsum(LETTERS[path.split("/")[-1]], adapters[f"{path}_A"], adapters[f"{path}_B"])
        for path in config.adapter.targets
    }


def lengths(W):
    """The length over the inputs: all dims between layer and output. `o` and `down` have one output dim."""
    return np.sqrt(np.sum(W**2, axis=tuple(range(1, W.ndim - 1)), keepdims=True))


def test_lora_adds_the_scaled_product_and_leaves_other_weights_alone():
    config, base = config_of(lora_alpha=5.0, lora_targets="o,v,down,gate"), flatten(numpy_params(TINY), "/")
    adapters = random_adapters(config)
    merged, added = apply_adapters(base, adapters, config.adapter.scale), products(config, adapters)
    assert config.adapter.scale == 5.0 / 3
    assert set(added) == {f"blocks/{x}" for x in ("attention/v", "attention/o", "mlp/gate", "mlp/down")}
    for name, leaf in base.items():
        np.testing.assert_allclose(merged[name], leaf + added.get(name, 0), rtol=1e-5, atol=1e-5)


def test_dora_gives_each_output_its_learned_length():
    config, base = config_of(dora=True, lora_targets="o,down"), flatten(numpy_params(TINY), "/")
    adapters = random_adapters(config)
    merged = apply_adapters(base, adapters, config.adapter.scale)
    for path, product in products(config, adapters).items():
        whole = base[path] + product
        magnitude = adapters[f"{path}_m"].reshape(len(whole), *(1 for _ in whole.shape[1:-1]), -1)
        np.testing.assert_allclose(merged[path], magnitude * whole / lengths(whole), rtol=1e-4, atol=1e-5)


def test_the_norm_of_dora_is_a_constant_of_the_gradient():
    """Liu et al. 2024, section 4.3: with G the gradient of the matrix and n constant, W + s·A·B has G·m/n."""
    config, base = config_of(dora=True, lora_targets="down"), flatten(numpy_params(TINY), "/")
    path, adapters = "blocks/mlp/down", random_adapters(config)
    G = np.random.default_rng(3).normal(size=base[path].shape).astype(np.float32)

    def weighted(adapters):
        return jnp.sum(G * apply_adapters(base, adapters, config.adapter.scale, jax.lax.stop_gradient)[path])

    found = jax.jit(jax.grad(weighted))({name: jnp.asarray(x) for name, x in adapters.items()})
    whole = base[path] + products(config, adapters)[path]
    inner = config.adapter.scale * G * adapters[f"{path}_m"][:, None] / lengths(whole)
    expected = {
        "A": np.einsum("lfd,lrd->lfr", inner, adapters[f"{path}_B"]),
        "B": np.einsum("lfd,lfr->lrd", inner, adapters[f"{path}_A"]),
        "m": np.sum(G * whole / lengths(whole), axis=1),
    }
    for part, value in expected.items():
        np.testing.assert_allclose(found[f"{path}_{part}"], value, rtol=1e-3, atol=1e-4)


def test_the_model_computes_with_merged_weights_forward_and_backward():
    """With G the gradient of W + s·A·B: dA = s·G·Bᵀ and dB = s·Aᵀ·G. At the start adapters change nothing."""
    config = config_of(lora_targets="q,o,down")
    base, nll = numpy_params(TINY), make_nll(config, dtype=jnp.float32, remat="none")
    apart = jax.jit(jax.value_and_grad(lambda adapters: nll(adapters, *batch(), base=base)))
    whole = jax.jit(jax.value_and_grad(lambda params: nll(params, *batch())))
    start = init_state(config, make_mesh(config), base)["params"]
    np.testing.assert_allclose(apart(start)[0], whole(base)[0], rtol=1e-6)
    named = random_adapters(config)
    merged = flatten(base, "/") | {
        path: flatten(base, "/")[path] + product for path, product in products(config, named).items()
    }
    loss, found = apart(unflatten(named, "/"))
    expected_loss, of_merged = whole(unflatten(merged, "/"))
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    found, of_merged, scale = flatten(found, "/"), flatten(of_merged, "/"), config.adapter.scale
    for path in config.adapter.targets:
        of_A, of_B, of_W = LETTERS[path.split("/")[-1]].replace("->", ",").split(",")
        A, B, G = named[f"{path}_A"], named[f"{path}_B"], np.asarray(of_merged[path])
        expected = np.einsum(f"{of_W},{of_B}->{of_A}", G, B), np.einsum(f"{of_W},{of_A}->{of_B}", G, A)
        for part, value in zip("AB", expected, strict=True):
            value = scale * value  # noqa: PLW2901
            np.testing.assert_allclose(found[f"{path}_{part}"], value, rtol=2e-3, atol=1e-4 * np.abs(value).max())


def test_a_step_trains_adapters_alone_over_a_base_in_the_compute_dtype():
    config = config_of(rank=2, dora=True, lora_targets="q,down")
    config = replace(config, compute=replace(config.compute, dtype="bfloat16"))
    mesh, base = make_mesh(config), numpy_params(TINY)
    state = init_state(config, mesh, base)
    rounded = {n: x if n.endswith("scale") else x.astype(jnp.bfloat16) for n, x in flatten(base, "/").items()}
    for name, leaf in flatten(state["base"], "/").items():
        assert leaf.dtype == rounded[name].dtype
        np.testing.assert_array_equal(leaf, rounded[name])
    step = jax.jit(make_step(config, mesh, dtype=jnp.bfloat16, remat="none"))
    after, _ = step(state, *batch())
    after, metrics = step(after, *batch())  # A has no gradient while B is zero
    assert np.isfinite(metrics["grad_norm"])
    for name, leaf in flatten(after["base"], "/").items():
        np.testing.assert_array_equal(leaf, rounded[name])
    trained = flatten(after["params"], "/")
    assert {name.split("/")[-1] for name in trained} == {"q_A", "q_B", "q_m", "down_A", "down_B", "down_m"}
    assert all(leaf.dtype == jnp.float32 for leaf in trained.values())
    for before, now in zip(jax.tree.leaves(state["params"]), jax.tree.leaves(after["params"]), strict=True):
        assert not np.array_equal(before, now)
    whole = flatten(whole_weights(config, after, mesh), "/")
    merged = apply_adapters(rounded, {name: np.asarray(x) for name, x in trained.items()}, config.adapter.scale)
    for name, leaf in whole.items():
        assert leaf.dtype == rounded[name].dtype
        np.testing.assert_allclose(np.float32(leaf), np.float32(merged[name]), rtol=1e-2, atol=1e-6)


def test_optimizer_and_checkpoint_hold_adapters_alone():
    """LoRA of rank 16 on every matrix of 1.7B: 18 M parameters and two moments each, no copy of the base."""
    config = Config(
        preset="1.7B", model=MODELS["1.7B"], run=RunConfig(init_from="base"), adapter=AdapterConfig(lora_rank=16)
    )
    state = abstract_state(config, make_mesh(config, jax.devices()[:1]))
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in state.items()}
    D, F, L = 2_048, 8_192, 24
    assert (
        config.adapter.trained_parameters(config.model) == sizes["params"] == 16 * L * (4 * (D + D) + 3 * (D + F))
    )
    assert 2 * sizes["params"] <= sizes["opt_state"] < 2 * sizes["params"] + 10
    assert sizes["base"] == config.model.num_parameters == 1_711_376_384
    assert set(trained_part(state)) == {"params", "opt_state", "step"}
    assert set(flatten(state["base"], "/")) == set(PARAMETER_DIMS) - {"head"}


@pytest.mark.slow
def test_the_result_does_not_depend_on_the_mesh():
    def after_a_step(mesh):
        config = config_of(rank=2, dora=True, mesh=mesh, lora_targets="q,o,down")
        devices = make_mesh(config)
        state = init_state(config, devices, numpy_params(TINY))
        like, moved = state["params"], unflatten(random_adapters(config), "/")
        state["params"] = jax.tree.map(lambda x, new: jax.device_put(new, x.sharding), like, moved)
        step = jax.jit(make_step(config, devices, dtype=jnp.float32, remat="full"))
        state, metrics = step(state, *batch())
        whole = flatten(whole_weights(config, state, devices), "/")
        layouts = {name: leaf.sharding.spec for name, leaf in flatten(like, "/").items()}
        return float(metrics["loss"]), {name: np.asarray(leaf) for name, leaf in whole.items()}, layouts

    loss, weights, layouts = after_a_step("data=1,fsdp=2,tensor=2")
    one_loss, of_one, _ = after_a_step("data=1")
    np.testing.assert_allclose(loss, one_loss, rtol=1e-5)
    for name, leaf in weights.items():
        np.testing.assert_allclose(leaf, of_one[name], rtol=2e-3, atol=2e-5)
    assert {axis for spec in layouts.values() for axis in spec} == {None, "fsdp", "tensor"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--lora-rank 4 --lora-targets q,embedding", "lora_targets='embedding': expected some of q, k, v"),
        ("--lora-rank 4 --lora-targets q,q", "names a matrix twice"),
        ("--lora-rank -1", "lora_rank=-1"),
        ("--lora-rank 4 --lora-alpha 0", "lora_alpha=0"),
        ("--dora", "dora=True is for adapters: give --lora-rank"),
        ("--lora-alpha 4", "lora_alpha=4.0 is for adapters: give --lora-rank"),
        ("--lora-targets q", "lora_targets=q is for adapters: give --lora-rank"),
        ("--recipe quickstart --lora-rank 4", "lora_rank=4 needs the weights of a base: give --init-from"),
    ],
)
def test_flags_that_cannot_be_are_refused(flags, message):
    base = [] if "quickstart" in flags else ["--init-from", "base"]
    with pytest.raises(UserError, match=message):
        parse([*flags.split(), *base])
