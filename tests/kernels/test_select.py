"""Which functions a device gets, and what happens if a kernel fails its check."""

from dataclasses import replace
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from smollm_jax.config.architecture import MODELS
from smollm_jax.kernels import check, select
from smollm_jax.kernels.cpu import residuals_as_bits, wide_linear
from smollm_jax.kernels.select import select_attention, select_checked_ops, select_ops
from smollm_jax.model.attention import packed_attention
from smollm_jax.model.ops import REFERENCE
from tests.support.lowering import H100


def mesh_of(at, size=1, tensor=1):
    return SimpleNamespace(devices=np.array([at]), size=size, shape={"tensor": tensor})


def device(platform, kind="a device", **more):
    return SimpleNamespace(platform=platform, device_kind=kind, **more)


A100 = device("gpu", "NVIDIA A100", compute_capability="8.0")
T4 = device("gpu", "Tesla T4", compute_capability="7.5")
V100 = device("gpu", "Tesla V100", compute_capability="7.0")
MI300 = device("gpu", "AMD MI300X", compute_capability="gfx942")
CPU, TPU = device("cpu", "cpu"), device("tpu", "TPU v5 lite")


def test_each_device_gets_its_kernel():
    for at, name in [(CPU, "plain"), (TPU, "splash"), (H100, "pallas"), (A100, "pallas")]:
        assert select_attention("auto", at, jnp.bfloat16) == (name, "")
        assert select_attention("plain", at, jnp.bfloat16) == ("plain", "")
    assert select_attention("auto", TPU, jnp.float32) == ("splash", "")


@pytest.mark.parametrize(
    ("at", "dtype", "why"),
    [
        (T4, "bfloat16", "pallas needs compute capability 8.0, and Tesla T4 has 7.5"),
        (V100, "bfloat16", "pallas needs compute capability 8.0, and Tesla V100 has 7.0"),
        (MI300, "bfloat16", "pallas has not been tried on AMD MI300X"),
        (H100, "float32", "pallas is for bfloat16; tensor cores would round float32 down"),
    ],
)
def test_auto_says_why_it_falls_back_to_the_reference(at, dtype, why):
    assert select_attention("auto", at, dtype) == ("plain", f"attention   plain: {why}")


@pytest.mark.parametrize(
    ("name", "at", "why"),
    [
        ("splash", CPU, "attention=splash cannot run here: splash is for a TPU, and the device is cpu"),
        ("pallas", TPU, "pallas is for a GPU, and the device is TPU v5 lite"),
        ("pallas", T4, "pallas needs compute capability 8.0, and Tesla T4 has 7.5"),
    ],
)
def test_a_name_that_cannot_run_is_refused_in_one_line(name, at, why):
    with pytest.raises(ValueError, match=why) as refusal:
        select_attention(name, at, jnp.bfloat16)
    assert str(refusal.value).endswith("; give plain or auto")


def test_a_kernel_that_fails_its_check_gives_way_to_the_reference_with_a_note():
    """The Pallas kernel for GPU, on this CPU, by a mesh that says it is one."""
    mesh, config = mesh_of(H100), MODELS["quickstart"]
    ops, notes = select_checked_ops("auto", mesh, jnp.bfloat16, config)
    assert ops.kernels == "plain"
    assert ops.attention is packed_attention
    assert len(notes) == 1
    assert notes[0].startswith("attention   plain: pallas failed its check, attention: does not run here")
    with pytest.raises(ValueError, match="attention=pallas failed its check"):
        select_checked_ops("pallas", mesh, jnp.bfloat16, config)


@pytest.mark.parametrize("failing", ["cross_entropy", "layer"])
def test_a_loss_or_a_layer_that_fails_its_check_takes_attention_with_it(failing, monkeypatch):
    """On this CPU, where no kernel for GPUs runs, by a mesh that says it is one."""
    mesh, config = mesh_of(H100), MODELS["quickstart"]
    checks = ("attention", "cross_entropy", "layer")
    for name in checks[: checks.index(failing)]:
        monkeypatch.setattr(check, f"check_{name}", lambda *_: "")
    ops, notes = select_checked_ops("auto", mesh, jnp.bfloat16, config)
    assert ops.cross_entropy is REFERENCE.cross_entropy
    assert ops.attention is packed_attention
    what = {"cross_entropy": "cross entropy", "layer": "a layer"}[failing]
    assert notes[0].startswith(f"attention   plain: pallas failed its check, {what}: does not run here")
    with pytest.raises(ValueError, match=f"attention=pallas failed its check: {what}: does not run here"):
        select_checked_ops("pallas", mesh, jnp.bfloat16, config)


def test_kernels_that_pass_their_checks_are_taken_all_together(monkeypatch):
    monkeypatch.setattr(select, "check_ops", lambda *_: "")
    ops, notes = select_checked_ops("auto", mesh_of(H100), jnp.bfloat16, MODELS["quickstart"])
    assert ops.on_gpu
    assert notes == ["attention   pallas, checked against the reference"]
    for field in ("attention", "embed", "project_heads", "feed_forward", "cross_entropy"):
        assert getattr(ops, field) is not getattr(REFERENCE, field)


def test_a_layer_is_fused_if_no_device_has_a_part_of_a_matrix():
    def fused(at, **mesh):
        ops = select_ops("auto", mesh_of(at, **mesh), jnp.bfloat16, rows="data", heads="tensor")
        return ops.feed_forward is not REFERENCE.feed_forward

    assert fused(H100)
    assert fused(H100, size=2)
    assert not fused(H100, size=2, tensor=2)
    assert not fused(TPU)


def test_only_a_cpu_multiplies_wide_and_stores_bits():
    in_f32 = select_ops("auto", mesh_of(CPU), jnp.float32)
    assert in_f32 == replace(REFERENCE, linear=wide_linear)
    assert select_ops("auto", mesh_of(CPU), jnp.bfloat16) == replace(in_f32, wrap_layer=residuals_as_bits)
    for at in (H100, TPU):
        ops = select_ops("plain", mesh_of(at), jnp.bfloat16)
        assert (ops.linear, ops.wrap_layer) == (REFERENCE.linear, REFERENCE.wrap_layer)
    assert select_ops("auto", None, jnp.bfloat16) is REFERENCE
