"""The arithmetic of a plan: FLOPs, bytes and seconds by formula."""

import jax
import jax.numpy as jnp
import pytest

from smollm_jax.cli.arguments import parse
from smollm_jax.config.architecture import MODELS
from smollm_jax.kernels.cpu import wide_linear
from smollm_jax.model.ops import Ops, reference_linear
from smollm_jax.model.transformer import SmolLM, init_params
from smollm_jax.planning.estimate import (
    COMPUTE_SHARE,
    estimate,
    flops_per_token,
    memory_bytes,
    newton_schulz_flops,
    residual_bytes,
    sent_bytes,
)
from smollm_jax.planning.plan import POLICIES, as_dict, make_plan, step_of
from smollm_jax.planning.topology import CHIPS, topology_of
from smollm_jax.runtime.devices import peak_flops

WEIGHTS = MODELS["135M"].num_parameters


def step(*flags, remat="none", topology="gpu:8"):
    return step_of(parse(["--phases", "1000x32", *flags]), topology_of(topology), remat)


def test_data_parallelism_sends_the_gradients_twice_around_a_ring():
    # gradients: 2 bytes each, and 4 more for the embedding, which is used at both ends
    gradients = WEIGHTS * 2 + 49_152 * 576 * 4
    assert sent_bytes(step()) == {"data": 2 * gradients * 7 / 8, "fsdp": 0, "tensor": 0}
    accumulated = sent_bytes(step("--grad-accum", "2"))
    assert accumulated["data"] == 2 * sent_bytes(step())["data"]


def test_fsdp_gathers_the_weights_for_each_pass_and_scatters_the_gradients():
    gradients = WEIGHTS * 2 + 49_152 * 576 * 4
    sent = {remat: sent_bytes(step("--mesh", "fsdp=8", remat=remat)) for remat in ("none", "full")}
    assert sent["none"] == {"data": 0, "fsdp": (WEIGHTS * 2 * 2 + gradients) * 7 / 8, "tensor": 0}
    assert sent["full"]["fsdp"] - sent["none"]["fsdp"] == WEIGHTS * 2 * 7 / 8


def test_tensor_parallelism_sends_activations():
    model, tokens = MODELS["360M"], 32 * 2_048
    sent = sent_bytes(step("--preset", "360M", "--mesh", "data=1,tensor=5", topology="gpu:5"))
    assert sent["tensor"] == 2 * 6 * model.num_layers * tokens * model.hidden_size * 2 * 4 / 5


def test_muon_costs_newton_schulz_and_messages_and_saves_a_moment():
    model, matrices = MODELS["135M"], 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1_536)
    assert newton_schulz_flops(model) * model.num_layers == pytest.approx(1.46e12, rel=0.01)
    adamw, muon = (step("--optimizer", name) for name in ("adamw", "muon"))
    assert adamw.optimizer_bytes - muon.optimizer_bytes == 4 * matrices
    assert memory_bytes(adamw) - memory_bytes(muon) == 4 * matrices
    assert memory_bytes(step("--ema", "0.999")) - memory_bytes(adamw) == 4 * WEIGHTS
    assert muon.whole_layers == 4, "thirty layers over eight devices"
    assert sent_bytes(muon)["data"] - sent_bytes(adamw)["data"] == 2 * matrices * 7 / 8
    by_layer, whole = (step("--optimizer", name, "--mesh", "fsdp=8") for name in ("muon", "adamw"))
    assert sent_bytes(by_layer)["fsdp"] - sent_bytes(whole)["fsdp"] == 2 * 2 * matrices / 8 * 7 / 8
    h100 = CHIPS["gpu-h100"]
    more = estimate(muon, h100)["compute_seconds"] - estimate(adamw, h100)["compute_seconds"]
    assert more == pytest.approx(1.46e12 * 4 / 30 / (COMPUTE_SHARE * 989e12), rel=0.01)


def test_a_step_takes_the_longer_of_computing_and_memory_and_then_its_messages():
    found = estimate(step(), CHIPS["gpu-h100"])
    longer = max(found["compute_seconds"], found["memory_seconds"])
    assert found["step_seconds"] == longer + found["interconnect_seconds"]
    slow = CHIPS["gpu-h100"]._replace(memory_bytes_per_second=1e9)
    assert estimate(step(), slow)["step_seconds"] > estimate(step(), slow)["memory_seconds"] > longer
    flops = MODELS["135M"].flops_per_token(2_048) * 32 * 2_048 / 8
    assert found["compute_seconds"] >= flops / (COMPUTE_SHARE * 989e12)
    assert found["mfu"] == pytest.approx(flops / found["step_seconds"] / 989e12)


def test_the_estimate_agrees_with_the_one_measured_step():
    """One H200, 135M, 32 x 2,048 in bfloat16: benchmarks/RESULTS.md."""
    found = estimate(step(topology="gpu-h200:1"), CHIPS["gpu-h200"])
    assert found["tokens_per_second"] == pytest.approx(407_999, rel=0.01)
    assert found["mfu"] == pytest.approx(0.42, abs=0.005)


@pytest.mark.parametrize("name", [name for name in CHIPS if "gpu" in name])
def test_every_gpu_of_the_table_is_planned_with_its_own_peak(name):
    chip = CHIPS[name]
    half = jnp.dtype("bfloat16" if float(chip.compute_capability) >= 8 else "float16")
    peaks = [peak_flops(chip, jnp.dtype(dtype)) for dtype in (half, "float32")]
    assert peaks[0] > peaks[1] > 8e12
    assert (peak_flops(chip, jnp.dtype("bfloat16")) is None) == (name == "gpu-t4")
    found = as_dict(make_plan(parse(["--steps", "9", "--batch-size", "4", "--dtype", "float32"]), f"{name}:1"))
    assert found["estimate"]["mfu"] <= COMPUTE_SHARE


@pytest.mark.parametrize(
    ("kind", "bfloat16"),
    [("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA A10", 125), ("NVIDIA A10G", 70), ("NVIDIA L40S", 362),
     ("NVIDIA L4", 121), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA B200", 2_250), ("Tesla T4", None),
     ("cpu", None)],
)  # fmt: skip
def test_a_device_has_the_peak_of_its_own_name(kind, bfloat16):
    device = CHIPS["gpu-t4"]._replace(device_kind=kind)
    assert peak_flops(device, jnp.dtype("bfloat16")) == (bfloat16 and bfloat16 * 1e12)


def test_padding_costs_the_time_of_rows():
    def seconds(rows):
        padded = step("--batch-size", str(rows), "--steps", "9", "--phases", f"9x{rows}")
        return estimate(padded, CHIPS["gpu-h100"])["compute_seconds"]

    assert seconds(12) == seconds(16) > seconds(8)


def test_divided_parameters_take_a_part_of_the_memory():
    whole, parts = (memory_bytes(step(*mesh, remat="full")) for mesh in ((), ("--mesh", "fsdp=8")))
    assert whole - parts == pytest.approx(18 * WEIGHTS * 7 / 8, rel=0.01)


def test_recomputed_values_are_not_kept_and_cost_flops():
    config = parse(["--phases", "1000x32"])
    kept = [residual_bytes(config.model, remat) for remat in POLICIES]
    flops = [flops_per_token(config, remat) for remat in POLICIES]
    assert kept[0] > kept[1] > kept[2]
    assert flops[0] < flops[1] < flops[2] < flops[0] * 4 / 3
    assert flops[0] == config.model.flops_per_token(2_048)


@pytest.mark.parametrize("linear", [reference_linear, wide_linear])
@pytest.mark.parametrize("remat", POLICIES)
def test_the_residuals_by_formula_are_those_the_model_keeps(remat, linear):
    """Except for the softmaxes of the fused kernels, because attention is the reference here."""
    config, rows = MODELS["quickstart"], jnp.zeros((2, 64), jnp.int32)

    def residuals(params):
        def features(params):
            how = {"dtype": jnp.bfloat16, "remat": remat, "ops": Ops(linear=linear)}
            return SmolLM.from_params(config, params, **how).features(rows)

        return jax.vjp(features, params)[1]

    leaves = jax.tree.leaves(jax.eval_shape(residuals, jax.eval_shape(lambda: init_params(config, 0))))
    stacked = [leaf for leaf in leaves if leaf.shape[:3] == (config.num_layers, *rows.shape)]
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in stacked) / (config.num_layers * rows.size)
    assert kept == residual_bytes(config, remat) - (4 * config.num_heads if remat == "none" else 0)
