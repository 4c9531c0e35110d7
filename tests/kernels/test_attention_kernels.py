"""The attention kernels against the reference, interpreted on a CPU, and compiled for their devices."""

import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from smollm_jax.config.architecture import MODELS
from smollm_jax.config.settings import ComputeConfig, Config, DataConfig, RunConfig
from smollm_jax.kernels.check import check_attention
from smollm_jax.kernels.shard import attention_per_device
from smollm_jax.kernels.splash import splash_attention
from smollm_jax.kernels.triton_attention import triton_attention
from smollm_jax.model.attention import SMALLEST_BLOCK, packed_attention, starts_of
from smollm_jax.training.compile import compile_step
from smollm_jax.training.step import init_state, make_step
from tests.support.lowering import H100, KERNEL, lowered_for_cuda
from tests.support.packed import TOLERANCE, outcome, random_rows

KERNELS = {"splash": splash_attention, "pallas": triton_attention}


def interpreted(name):
    return packed_attention if name == "plain" else partial(KERNELS[name], interpret=True)


@pytest.mark.parametrize("name", ["splash", "pallas"])
@pytest.mark.parametrize(
    ("seed", "shape", "dtype"),
    [
        (0, {"length": 256}, "bfloat16"),
        (2, {"length": 100, "rows": 1}, "float32"),
        pytest.param(0, {"length": 256}, "float32", marks=pytest.mark.slow),
        pytest.param(1, {"length": 384}, "bfloat16", marks=pytest.mark.slow),
        pytest.param(2, {"length": 100, "rows": 1}, "bfloat16", marks=pytest.mark.release),
        pytest.param(3, {"length": 129, "heads": (4, 2)}, "float32", marks=pytest.mark.slow),
        pytest.param(4, {"length": 128, "heads": (3, 3), "head_dim": 32}, "float32", marks=pytest.mark.release),
        pytest.param(5, {"length": 700, "rows": 3}, "bfloat16", marks=pytest.mark.release),
        pytest.param(1, {"length": 384}, "float32", marks=pytest.mark.release),
        pytest.param(3, {"length": 129, "heads": (4, 2)}, "bfloat16", marks=pytest.mark.release),
        pytest.param(4, {"length": 128, "heads": (3, 3), "head_dim": 32}, "bfloat16", marks=pytest.mark.release),
        pytest.param(5, {"length": 700, "rows": 3}, "float32", marks=pytest.mark.release),
    ],
)
def test_values_and_gradients_equal_the_reference(name, seed, shape, dtype):
    rows = random_rows(seed, **shape, dtype=dtype)
    ours = jax.jit(partial(outcome, interpreted(name)))(*rows)
    exact = jax.jit(partial(outcome, packed_attention))(*(np.asarray(x, np.float32) for x in rows[:4]), rows[4])
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(np.asarray(a, np.float32), b, atol=TOLERANCE[dtype] * float(np.abs(b).max()))


@pytest.mark.parametrize("name", ["plain", "splash", "pallas"])
@pytest.mark.parametrize(
    "scale", [3, pytest.param(1, marks=pytest.mark.slow)]
)  # 3: over several blocks of the reference
def test_documents_and_the_future_have_exactly_no_influence(name, scale):
    q, k, v, _, _ = random_rows(0, rows=1, length=128 * scale)
    lengths = scale * jnp.array([50, 60, 18])
    segment_ids = jnp.repeat(jnp.array([[1, 2, 0]]), lengths, axis=1, total_repeat_length=128 * scale)
    kernel, at = interpreted(name), 80 * scale  # of the second document

    def output_at(k, v):
        return jnp.sum(kernel(q, k, v, starts_of(segment_ids))[0, at])

    for gradient in jax.jit(jax.grad(output_at, argnums=(0, 1)))(k, v):
        reach_T = np.abs(np.asarray(gradient)).sum(axis=(0, 2, 3))
        assert (reach_T[: 50 * scale] == 0).all()
        assert (reach_T[50 * scale : at + 1] > 0).all()
        assert (reach_T[at + 1 :] == 0).all()


def test_the_check_finds_a_leak_a_wrong_gradient_and_a_kernel_that_does_not_run():
    config = MODELS["quickstart"]

    def leaky(q, k, v, start):
        return packed_attention(q, k, v, jnp.zeros_like(start))

    def without_dk(q, k, v, start):
        return packed_attention(q, jax.lax.stop_gradient(k), v, start)

    assert check_attention(packed_attention, config, jnp.bfloat16) == ""
    assert "the output differs" in check_attention(leaky, config, jnp.bfloat16)
    assert "dk differs from the reference by 100.00%" in check_attention(without_dk, config, jnp.bfloat16)
    assert "does not run here: ValueError" in check_attention(triton_attention, config, jnp.bfloat16)


@pytest.mark.parametrize("mesh_shape", [(2, 1), (2, 3), (1, 2)])
def test_rows_and_heads_divided_among_devices_give_the_same(mesh_shape):
    devices = jax.devices()[: np.prod(mesh_shape)]
    mesh = jax.make_mesh(mesh_shape, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=devices)
    rows = random_rows(5, rows=2, length=128)
    kernel = attention_per_device(mesh, interpreted("pallas"), rows="data", heads="tensor")
    ours, whole = (jax.jit(partial(outcome, attention))(*rows) for attention in (kernel, packed_attention))
    for a, b in zip(ours, whole, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="it lowers this only where the GPUs are")
def test_a_kernel_divided_among_gpus_lowers_for_cuda():
    mesh = mesh_of(jax.devices(), data=4)
    kernel = attention_per_device(mesh, triton_attention, rows="data", heads="tensor")
    traced = jax.jit(partial(outcome, kernel)).trace(*random_rows(0, rows=4, dtype=jnp.bfloat16))
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count(KERNEL) == 3


@pytest.mark.parametrize("length", [200, 2_048])
def test_the_pallas_kernel_lowers_for_cuda(length):
    rows = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in random_rows(0, length=length, dtype=jnp.bfloat16)]
    program = lowered_for_cuda(jax.jit(partial(outcome, triton_attention)), *rows)
    assert program.count(KERNEL) == 3
    assert "attention_forward" in program
    assert "attention_backward" in program
    assert f"{length}x{length}x" not in program


SMALL = replace(MODELS["quickstart"], num_layers=2, vocab_size=256, hidden_size=128)


def train_config(attention="auto", seq_len=384):
    return Config(
        model=SMALL,
        run=RunConfig(phases="10x4"),
        data=DataConfig(seq_len=seq_len),
        compute=ComputeConfig(attention=attention, loss_chunk=128),
    )


def mesh_of(devices, *, data=1, tensor=1):
    shape = (data, 1, tensor)
    devices = np.array(devices[: data * tensor]).reshape(shape)
    return Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "attention", "dtype"),
    [
        ({}, "auto", "bfloat16"),
        ({"data": 2, "tensor": 2}, "auto", "bfloat16"),
        pytest.param({}, "auto", "float32", marks=pytest.mark.release),
        pytest.param({}, "plain", "bfloat16", marks=pytest.mark.release),
    ],
)
def test_the_train_step_compiled_for_a_tpu_has_the_kernel_and_no_scores(sizes, attention, dtype):
    pytest.importorskip("libtpu", reason="the compiler for TPU is not installed; pip install libtpu")
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    config, mesh = train_config(attention), mesh_of(topology.devices, **sizes)
    program = compile_step(config, mesh, 4, dtype=jnp.dtype(dtype), remat="none").as_text()
    kernels = program.count('custom_call_target="tpu_custom_call"')
    T = config.data.seq_len
    scores = re.search(rf"\[[\d,]*{T},{T}\]|\[\d+,\d+,\d+,{SMALLEST_BLOCK},{T}\]", program)
    assert kernels == (0 if attention == "plain" else 3)
    assert (scores is not None) == (attention == "plain")


@pytest.mark.parametrize(
    ("remat", "kernels", "loops"),
    [
        # the loss; of a layer attention there, back twice, heads and feed-forward; a loop over the loss's tokens
        ("none", {6, 11}, 1),  # its two layers share their kernels, or not (jax 0.11)
        # attention again on the way back; a loop over layers there and one back
        ("full", {7}, 3),
    ],
)
def test_the_train_step_lowers_for_a_gpu_with_the_kernels_in_it(remat, kernels, loops):
    config = train_config()
    gpu = SimpleNamespace(devices=np.array([H100]), size=1)
    step = make_step(config, gpu, dtype=jnp.dtype(jnp.bfloat16), remat=remat)
    state = jax.eval_shape(partial(init_state, config, mesh_of(jax.devices())))
    rows = jax.ShapeDtypeStruct((4, config.data.seq_len + 1), jnp.int32)
    program = lowered_for_cuda(jax.jit(step), state, rows, rows)
    assert program.count(KERNEL) in kernels
    assert program.count("stablehlo.while") == loops
    for name in ("attention_forward", "attention_backward", "loss", "heads_backward", "gated_backward"):
        assert name in program
    unique = re.findall(r"scatter.*?unique_indices = (\w+)", program, re.DOTALL)
    assert unique
    assert set(unique) == {"true"}
