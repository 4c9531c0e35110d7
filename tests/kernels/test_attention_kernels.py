"""The fused kernels against the plain attention, interpreted on a CPU, and compiled for their devices."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn_kernel
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from smollm_jax.config.architecture import MODELS
from smollm_jax.config.settings import ComputeConfig, Config, DataConfig, RunConfig
from smollm_jax.kernels import splash as fused_attention
from smollm_jax.kernels.check import disagreement
from smollm_jax.kernels.select import choose, choose_checked
from smollm_jax.model.attention import BLOCKS, SMALLEST_BLOCK, _blocks, packed_attention, starts_of
from smollm_jax.training.compile import compile_step
from smollm_jax.training.step import init_state, make_step
from tests.support.lowering import KERNEL, lowered_for_cuda

TOLERANCE = {"float32": 1e-5, "bfloat16": 0.02}


def random_rows(seed, *, rows=2, length=256, heads=(9, 3), head_dim=64, dtype=jnp.float32):
    """q, k, v, an output's gradient, and documents of random lengths with padding, segment 0, at the end."""
    rng = np.random.default_rng(seed)
    N, K = heads
    arrays = [jnp.asarray(rng.normal(size=(rows, length, n, head_dim)), dtype) for n in (N, K, K, N)]
    begins = rng.random((rows, length)) < rng.choice([0.005, 0.05, 0.5])
    segment_ids = 1 + np.cumsum(begins, axis=1).astype(np.int32)
    for row, padding in enumerate(rng.integers(0, max(1, length // 3), rows)):
        segment_ids[row, length - padding :] = 0
    return *arrays, starts_of(jnp.asarray(segment_ids))


def outcome(kernel, *rows):
    q, k, v, do, start = rows
    out, pull = jax.vjp(lambda q, k, v: kernel(q, k, v, start), q, k, v)
    return out, *pull(do)


def interpreted(name):
    return packed_attention if name == "plain" else partial(fused_attention.KERNELS[name], interpret=True)


def textbook(q_BTNH, k_BTKH, v_BTKH, start_BT):
    """Softmax attention as the formula has it, all scores at once; its gradient is JAX's own."""
    T, N, H = q_BTNH.shape[1:]
    k_BTNH, v_BTNH = (jnp.repeat(x, N // k_BTKH.shape[2], axis=2) for x in (k_BTKH, v_BTKH))
    scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BTNH) / H**0.5
    own_BTS = (start_BT[:, :, None] == start_BT[:, None]) & jnp.tril(jnp.ones((T, T), bool))
    weights_BNTS = jax.nn.softmax(jnp.where(own_BTS[:, None], scores_BNTS, -jnp.inf))
    return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BTNH)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("length", "heads"),
    [(1, (9, 3)), (100, (4, 4)), (SMALLEST_BLOCK + 1, (3, 1)), (BLOCKS * SMALLEST_BLOCK + 70, (6, 2))],
)
def test_the_plain_form_is_the_textbook_s(dtype, length, heads):
    q, k, v, do, start = random_rows(length, length=length, heads=heads, dtype=dtype)
    ours = jax.jit(partial(outcome, packed_attention))(q, k, v, do, start)
    exact = outcome(textbook, *(x.astype(jnp.float32) for x in (q, k, v, do)), start)
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == dtype
        # of one token the gradients of q and k are 0
        atol = TOLERANCE[dtype] * max(float(jnp.abs(b).max()), 1.0)
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=atol)


@pytest.mark.parametrize(
    ("length", "count", "largest"),
    [(1, 1, 1), (128, 1, 128), (129, 2, 128), (1025, 5, 256), (4096, 8, 512), (4097, 9, 512), (8192, 16, 512)],
)
def test_blocks_cover_a_row_once(length, count, largest):
    blocks = _blocks(length)
    assert [i for block in blocks for i in range(block.start, block.stop)] == list(range(length))
    assert (len(blocks), max(block.stop - block.start for block in blocks)) == (count, largest)


def test_the_way_back_does_not_share_the_scores_of_the_way_there():
    rows = random_rows(0, length=SMALLEST_BLOCK)
    assert "optimization_barrier" in jax.jit(partial(outcome, packed_attention)).lower(*rows).as_text()


@pytest.mark.parametrize("name", ["splash", "pallas"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("seed", "shape"),
    [
        (0, {"length": 256}),
        (1, {"length": 384}),
        (5, {"length": 700, "rows": 3}),
        (2, {"length": 100, "rows": 1}),
        (3, {"length": 129, "heads": (4, 2)}),
        (4, {"length": 128, "heads": (3, 3), "head_dim": 32}),
    ],
)
def test_values_and_gradients_equal_the_plain_ones(name, dtype, seed, shape):
    rows = random_rows(seed, **shape, dtype=dtype)
    ours = jax.jit(partial(outcome, interpreted(name)))(*rows)
    exact = outcome(packed_attention, *(x.astype(jnp.float32) for x in rows[:4]), rows[4])
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=TOLERANCE[dtype] * float(jnp.abs(b).max()))


@pytest.mark.parametrize("name", ["plain", "splash", "pallas"])
@pytest.mark.parametrize("scale", [1, 3])  # 3: over several blocks of the plain form
def test_documents_and_the_future_have_exactly_no_influence(name, scale):
    q, k, v, _, _ = random_rows(0, rows=1, length=128 * scale)
    lengths = scale * jnp.array([50, 60, 18])
    segment_ids = jnp.repeat(jnp.array([[1, 2, 0]]), lengths, axis=1, total_repeat_length=128 * scale)
    kernel, at = interpreted(name), 80 * scale  # of the second document

    def output_at(k, v):
        return jnp.sum(kernel(q, k, v, starts_of(segment_ids))[0, at])

    for gradient in jax.grad(output_at, argnums=(0, 1))(k, v):
        reach_T = np.abs(np.asarray(gradient)).sum(axis=(0, 2, 3))
        assert (reach_T[: 50 * scale] == 0).all()
        assert (reach_T[50 * scale : at + 1] > 0).all()
        assert (reach_T[at + 1 :] == 0).all()


def device(platform, kind="a device", **more):
    return SimpleNamespace(platform=platform, device_kind=kind, **more)


H100 = device("gpu", "NVIDIA H100", compute_capability="9.0")
A100 = device("gpu", "NVIDIA A100", compute_capability="8.0")
T4 = device("gpu", "Tesla T4", compute_capability="7.5")
V100 = device("gpu", "Tesla V100", compute_capability="7.0")
MI300 = device("gpu", "AMD MI300X", compute_capability="gfx942")
CPU, TPU = device("cpu", "cpu"), device("tpu", "TPU v5 lite")


def test_each_device_gets_its_kernel():
    for at, name in [(CPU, "plain"), (TPU, "splash"), (H100, "pallas"), (A100, "pallas")]:
        assert choose("auto", at, jnp.bfloat16) == (name, "")
        assert choose("plain", at, jnp.bfloat16) == ("plain", "")
    assert choose("auto", TPU, jnp.float32) == ("splash", "")


@pytest.mark.parametrize(
    ("at", "dtype", "why"),
    [
        (T4, "bfloat16", "pallas needs compute capability 8.0, and Tesla T4 has 7.5"),
        (V100, "bfloat16", "pallas needs compute capability 8.0, and Tesla V100 has 7.0"),
        (MI300, "bfloat16", "pallas has not been tried on AMD MI300X"),
        (H100, "float32", "pallas is for bfloat16; tensor cores would round float32 down"),
    ],
)
def test_auto_says_why_it_comes_to_the_plain_form(at, dtype, why):
    assert choose("auto", at, dtype) == ("plain", f"attention   plain: {why}")


@pytest.mark.parametrize(
    ("name", "at", "why"),
    [
        ("splash", CPU, "attention=splash cannot run here: splash is for a TPU, and the device is cpu"),
        ("pallas", TPU, "pallas is for a GPU, and the device is TPU v5 lite"),
        ("cudnn", A100, "cudnn needs compute capability 9.0, and NVIDIA A100 has 8.0"),
    ],
)
def test_a_name_that_cannot_run_is_refused_in_one_line(name, at, why):
    with pytest.raises(ValueError, match=why) as refusal:
        choose(name, at, jnp.bfloat16)
    assert str(refusal.value).endswith("; give plain or auto")


def test_the_check_at_the_start_finds_a_leak_a_wrong_gradient_and_a_kernel_that_does_not_run():
    config = MODELS["quickstart"]

    def leaky(q, k, v, start):
        return packed_attention(q, k, v, jnp.zeros_like(start))

    def without_dk(q, k, v, start):
        return packed_attention(q, jax.lax.stop_gradient(k), v, start)

    assert disagreement(packed_attention, config, jnp.bfloat16) == ""
    assert "the output differs" in disagreement(leaky, config, jnp.bfloat16)
    assert "dk differs from the plain form's by 100.00%" in disagreement(without_dk, config, jnp.bfloat16)
    assert "it does not run here: ValueError" in disagreement(fused_attention.pallas, config, jnp.bfloat16)


def test_a_kernel_that_fails_its_check_gives_way_to_the_plain_form_in_words():
    """The Pallas kernel for GPU, on this CPU, by a mesh that says it is one."""
    mesh, config = SimpleNamespace(devices=np.array([H100])), MODELS["quickstart"]
    name, notes = choose_checked("auto", mesh, config, jnp.bfloat16)
    assert name == "plain"
    assert len(notes) == 1
    assert notes[0].startswith("attention   plain: pallas failed its check, it does not run here")
    with pytest.raises(ValueError, match="attention=pallas failed its check"):
        choose_checked("pallas", mesh, config, jnp.bfloat16)


EIGHT_DEVICES = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}


@pytest.mark.parametrize("mesh_shape", [(2, 1), (2, 3), (1, 2)])
def test_rows_and_heads_divided_among_devices_give_the_same(mesh_shape):
    if len(jax.devices()) < np.prod(mesh_shape):
        pytest.skip("too few devices; the test below has eight")
    mesh = jax.make_mesh(mesh_shape, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    rows = random_rows(5, rows=2, length=128)
    kernel = fused_attention.over(mesh, interpreted("pallas"), rows="data", heads="tensor")
    for a, b in zip(jax.jit(partial(outcome, kernel))(*rows), outcome(packed_attention, *rows), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="it lowers this only where the GPUs are")
def test_a_kernel_divided_among_gpus_lowers_for_cuda():
    if len(jax.devices()) < 4:
        pytest.skip("too few devices; the test below has eight")
    mesh = mesh_of(jax.devices(), data=4)
    kernel = fused_attention.over(mesh, fused_attention.pallas, rows="data", heads="tensor")
    traced = jax.jit(partial(outcome, kernel)).trace(*random_rows(0, rows=4, dtype=jnp.bfloat16))
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count(KERNEL) == 3


def test_with_eight_devices():
    command = [sys.executable, "-m", "pytest", __file__, "-k", "divided_among"]
    done = subprocess.run(command, env=os.environ | EIGHT_DEVICES, capture_output=True, text=True, check=False)
    assert re.search(r"\b4 passed|3 passed, 1 skipped", done.stdout), done.stdout


@pytest.mark.parametrize("length", [200, 2_048])
def test_the_pallas_kernel_lowers_for_cuda(length):
    rows = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in random_rows(0, length=length, dtype=jnp.bfloat16)]
    program = lowered_for_cuda(jax.jit(partial(outcome, fused_attention.pallas)), *rows)
    assert program.count(KERNEL) == 3
    assert "attention_forward" in program
    assert "attention_backward" in program
    assert f"{length}x{length}x" not in program


def test_documents_are_told_to_cudnn_where_they_lie():
    segment_ids = jnp.array([[1, 1, 1, 2, 2, 3, 0, 0], [4, 5, 5, 5, 5, 5, 5, 5]])
    start = starts_of(segment_ids)
    lengths, offsets, fits = fused_attention.documents_of(start, 4)
    assert lengths.tolist() == [[3, 2, 1, 2], [1, 7, -1, -1]]
    assert offsets.tolist() == [[0, 3, 5, 6, -1], [0, 1, -1, -1, -1]]
    assert fits
    assert not fused_attention.documents_of(start, 3)[2]


@pytest.mark.parametrize("seed", range(3))
def test_cudnn_would_read_each_document_and_nothing_else(seed):
    """What JAX hands to cuDNN, read as cuDNN's documentation of ragged tensors has it: segment i is so many
    tokens from element `offset[i]` of the batch laid flat."""
    q, k, v, _, start_BT = random_rows(seed, length=64, heads=(3, 3), head_dim=8)
    lengths, offsets, fits = fused_attention.documents_of(start_BT, 64)
    assert fits
    lengths, _, offsets, _ = cudnn_kernel._fix_seqlen_offsets(lengths, lengths, offsets, offsets, q, k)
    flat, starts = [np.asarray(x).reshape(-1) for x in (q, k, v)], np.asarray(offsets).reshape(-1)
    out = np.full_like(flat[0], np.nan)
    for start, length in zip(starts, np.asarray(lengths).reshape(-1), strict=False):
        end = start + length * 3 * 8
        document = [jnp.asarray(x[start:end].reshape(1, length, 3, 8)) for x in flat]
        if length:
            out[start:end] = np.asarray(packed_attention(*document, jnp.zeros((1, length)))).reshape(-1)
    np.testing.assert_allclose(out.reshape(q.shape), packed_attention(q, k, v, start_BT), atol=1e-5)


def test_the_cudnn_kernel_lowers_for_cuda(monkeypatch):
    monkeypatch.setattr(cudnn_kernel, "check_cudnn_version", lambda: 91_200)
    monkeypatch.setattr(cudnn_kernel, "check_compute_capability", lambda _: True)
    rows = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in random_rows(0, length=512, dtype=jnp.bfloat16)]
    traced = jax.jit(partial(outcome, fused_attention.cudnn)).trace(*rows)
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "@__cudnn$fmhaSoftmax(" in program
    assert "@__cudnn$fmhaSoftmaxBackward(" in program
    assert "PADDING_CAUSAL" in program
    assert f"max_seg_per_batch\\22: {fused_attention.CUDNN_DOCUMENTS}" in program


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


@pytest.mark.parametrize(
    ("sizes", "attention", "dtype"),
    [
        ({}, "auto", "bfloat16"),
        ({}, "auto", "float32"),
        ({"data": 2, "tensor": 2}, "auto", "bfloat16"),
        ({}, "plain", "bfloat16"),
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
