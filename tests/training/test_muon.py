"""Muon: against torch's, over the right parameters, and by whole layers on several devices."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smollm_jax.config.architecture import ADAPTED, ModelConfig, parameter_shapes
from smollm_jax.config.settings import ComputeConfig, Config, DataConfig, OptimizerConfig, RunConfig
from smollm_jax.distributed.sharding import BATCH_AXES, make_mesh, sharded
from smollm_jax.model.transformer import init_params
from smollm_jax.runtime.trees import flatten
from smollm_jax.training.compile import compile_step
from smollm_jax.training.muon import orthogonalized
from smollm_jax.training.optimizer import make_optimizer
from smollm_jax.training.step import init_state

TINY = ModelConfig(
    vocab_size=56, hidden_size=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=24
)
MUON = OptimizerConfig(
    optimizer="muon", learning_rate=1e-2, weight_decay=0.1, muon_weight_decay=0.3, adamw_share=0.5
)


def random_like(params, seed):
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(params))))
    return jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape), params)


def matrices_of(named):
    """Each layer's matrix as torch has it: (outputs, inputs)."""
    return {
        (path, layer): np.asarray(x).reshape(np.prod(x.shape[: ADAPTED[path]], dtype=int), -1).T
        for path in ADAPTED
        for layer, x in enumerate(named[path])
    }


def test_twenty_updates_equal_those_of_torch(monkeypatch):
    import torch

    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self)  # torch rounds to bfloat16 before it iterates
    params = init_params(TINY, 0)
    ours = make_optimizer(MUON)
    state, named = ours.init(params), flatten(params, "/")
    matrices = {key: torch.tensor(x.copy(), requires_grad=True) for key, x in matrices_of(named).items()}
    others = {
        path: torch.tensor(np.array(x), requires_grad=True) for path, x in named.items() if path not in ADAPTED
    }
    muon = torch.optim.Muon(
        matrices.values(), lr=1e-2, weight_decay=0.3, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    groups = [([x for path, x in others.items() if path.endswith("scale") == is_norm], 0.1 * (not is_norm))
              for is_norm in (False, True)]  # fmt: skip
    adamw = torch.optim.AdamW(
        [{"params": group, "weight_decay": decay} for group, decay in groups], lr=0.5e-2, betas=(0.9, 0.95)
    )
    update = jax.jit(lambda *given: ours.update(*given, scale=1.0, norm=1.0))
    for seed in range(20):
        grads = random_like(params, seed)
        updates, state = update(grads, state, params)
        params = jax.tree.map(lambda p, u: p - 1e-2 * u, params, updates)
        named = flatten(grads, "/")
        for key, grad in matrices_of(named).items():
            matrices[key].grad = torch.tensor(grad.copy())
        for path, tensor in others.items():
            tensor.grad = torch.tensor(np.array(named[path]))
        muon.step(), adamw.step()
    named = flatten(params, "/")
    for key, matrix in matrices_of(named).items():
        np.testing.assert_allclose(matrix, matrices[key].detach().numpy(), atol=1e-5)
    for path, tensor in others.items():
        np.testing.assert_allclose(named[path], tensor.detach().numpy(), atol=1e-5)


def test_an_update_is_nearly_orthogonal_and_in_bfloat16_as_exact_as_torch_s():
    from torch import tensor
    from torch.optim._muon import _zeropower_via_newtonschulz as zeropower

    x_LIO = jax.random.normal(jax.random.key(0), (2, 48, 32))
    exact_LIO = np.asarray(orthogonalized(x_LIO))
    values = jnp.linalg.svd(exact_LIO, compute_uv=False)
    assert 0.6 < values.min() < values.max() < 1.3
    np.testing.assert_array_equal(orthogonalized(jnp.zeros_like(x_LIO)), 0)
    ours_LIO = orthogonalized(x_LIO.astype(jnp.bfloat16))
    assert ours_LIO.dtype == jnp.bfloat16
    theirs_LIO = np.stack(
        [zeropower(tensor(x), (3.4445, -4.7750, 2.0315), 5, 1e-7).float().numpy() for x in np.array(x_LIO)]
    )
    ours, theirs = (np.linalg.norm(np.float32(x) - exact_LIO) for x in (ours_LIO, theirs_LIO))
    assert ours < 1.25 * theirs < 0.1 * np.linalg.norm(exact_LIO)


def test_muon_has_the_matrices_of_the_layers_and_adamw_everything_else():
    untied = replace(TINY, tie_embeddings=False)
    _, state = make_optimizer(MUON).init(init_params(untied, 0))
    held = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for kind in ("momentum", "mu", "nu"):
            if f"/{kind}/" in name:
                held.setdefault(kind, {})[name.split(f"/{kind}/")[1]] = leaf.shape
    shapes = parameter_shapes(untied)
    assert held["momentum"] == {path: shapes[path] for path in ADAPTED}
    assert held["mu"] == held["nu"] == {path: shape for path, shape in shapes.items() if path not in ADAPTED}
    assert "head" in held["mu"]


def config_of(mesh):
    return Config(
        model=TINY, run=RunConfig(phases="20x8"), data=DataConfig(seq_len=12), optimizer=MUON,
        compute=ComputeConfig(loss_chunk=16, mesh=mesh),
    )  # fmt: skip


@pytest.fixture(scope="module")
def on_one_device():
    return two_steps("data=1")[0]


def two_steps(mesh):
    """The parameters after two steps of a job, and its program."""
    config = config_of(mesh)
    mesh = make_mesh(config)
    step = compile_step(config, mesh, 8, dtype=jnp.float32, remat="none")
    state, rng = init_state(config, mesh), np.random.default_rng(0)
    for _ in range(2):
        rows = rng.integers(0, 53, (8, 13)).astype(np.int32), np.ones((8, 13), np.int32)
        state, _ = step(state, *jax.device_put(rows, sharded(mesh, BATCH_AXES)))
    return jax.device_get(state["params"]), step.as_text()


def collectives(program):
    """The kinds of messages of the orthogonalization, each as often as it is sent."""
    kinds = r" (all-to-all|all-reduce|all-gather|reduce-scatter|collective-permute)(?:-start)?\("
    lines = [line for line in program.splitlines() if "/optimizer/cond/branch_1_fun/" in line]
    return [kind for line in lines for kind in re.findall(kinds, line)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "messages"),
    [
        ("fsdp=4", 2 * ["all-to-all"]),  # three layers over four devices: one device has nothing but zeros
        pytest.param("data=2,fsdp=2,tensor=2", 4 * ["all-to-all"], marks=pytest.mark.release),
        pytest.param("data=3,fsdp=1", ["all-gather"], marks=pytest.mark.release),
        pytest.param("data=4,fsdp=1", ["all-gather"], marks=pytest.mark.release),  # more devices than layers
    ],
)
def test_each_device_has_whole_layers_and_no_product_sums_over_devices(on_one_device, mesh, messages):
    params, program = two_steps(mesh)
    assert collectives(program) == sorted(messages * len(ADAPTED))
    for ours, expected in zip(jax.tree.leaves(params), jax.tree.leaves(on_one_device), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)
