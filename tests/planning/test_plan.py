"""Plans: the collectives of a program, the arithmetic, and the step compiled for a TPU that is not here."""

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from smollm_jax.cli.arguments import parse
from smollm_jax.config.architecture import MODELS
from smollm_jax.config.settings import ComputeConfig, Config, DataConfig, RunConfig
from smollm_jax.kernels.cpu import wide_product
from smollm_jax.model.ops import reference_linear
from smollm_jax.model.transformer import SmolLM, init_params
from smollm_jax.planning import topology as targets
from smollm_jax.planning.estimate import Estimate, executed_flops_per_token, kept_bytes
from smollm_jax.planning.hlo import Collective, collectives, kernels
from smollm_jax.planning.plan import POLICIES, find_remedy, make_plan, needed_by, plan_of, text_of
from smollm_jax.planning.report import as_dict, table
from smollm_jax.planning.topology import CHIPS, topology_of
from tests.support.paths import ROOT
from tests.support.runs import TINY, ended

# What XLA writes of a module, cut down: a loop of 30 turns whose condition alone knows that, one of 7 that
# says so, an asynchronous gather that goes on in a fusion of the loop, a scatter that is a fusion of its own, and
# a conditional
PROGRAM = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%begins (param.1: bf16[100,64]) -> (bf16[100,64], bf16[100,256]) {
  %all-gather.1 = bf16[100,256]{1,0:T(8,128)(2,1)} all-gather(%param.1), channel_id=9, replica_groups=[2,4]<=[8], dimensions={1}
  ROOT %custom-call.1 = (bf16[100,64]{1,0}, bf16[100,256]{1,0}) custom-call(%all-gather.1), custom_call_target="x"
}

%async_collective_fusion.1 (param.2: bf16[100,64]) -> bf16[100,256] {
  ROOT %all-gather.2 = bf16[100,256]{1,0:T(8,128)(2,1)} all-gather(%param.2), channel_id=9, replica_groups=[2,4]<=[8], dimensions={1}
}

%all-reduce-scatter (input: f32[16,8]) -> f32[4,8] {
  %all-reduce.1 = f32[16,8]{1,0} all-reduce(%input), channel_id=4, replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, to_apply=%add
  ROOT %slice = f32[4,8]{1,0} dynamic-slice(%all-reduce.1), dynamic_slice_sizes={4,8}
}

%layer (param.3: (s32[], f32[10])) -> (s32[], f32[10]) {
  %all-reduce.2 = (f32[10]{0:T(128)S(1)}, /*index=1*/bf16[2,3]{1,0}) all-reduce(%x, %y), channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  %fusion.1 = bf16[100,256]{1,0} fusion(%x), kind=kOutput, calls=%async_collective_fusion.1
  ROOT %tuple = (s32[], f32[10]) tuple(%x, %all-reduce.2)
}

%condition (param.4: (s32[], f32[10])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(30)
  ROOT %lt = pred[] compare(%counter, %constant.1), direction=LT
}

%inner (param.5: f32[10]) -> f32[10] {
  %start = (f32[10]{0}, f32[10]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%param.5), channel_id=3, source_target_pairs={{0,1},{1,0}}
  ROOT %done = f32[10]{0} collective-permute-done(%start)
}

%yes (param.6: f32[10]) -> f32[10] {
  ROOT %all-to-all.1 = f32[10]{0} all-to-all(%param.6), channel_id=7, replica_groups={}, dimensions={0}
}

%no (param.7: f32[10]) -> f32[10] {
  ROOT %param.7 = f32[10]{0} parameter(0)
}

ENTRY %main (arg: f32[10]) -> f32[10] {
  %async-collective-start = (bf16[100,64]{1,0}, bf16[100,256]{1,0}) fusion(%arg), kind=kCustom, calls=%begins
  %while.1 = (s32[], f32[10]) while(%arg), condition=%condition, body=%layer
  %async-collective-done = bf16[100,256]{1,0} fusion(%arg), kind=kCustom, calls=%async_collective_fusion.1
  %while.2 = f32[10] while(%arg), condition=%unknown, body=%inner, backend_config={"known_trip_count":{"n":"7"}}
  %scattered = f32[4,8]{1,0} fusion(%arg), kind=kCustom, calls=%all-reduce-scatter
  %reduce-scatter.1 = f32[2,8]{1,0} reduce-scatter(%arg), channel_id=5, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %conditional.1 = f32[10]{0} conditional(%arg, %arg, %arg), branch_computations={%no, %yes}
}
"""  # noqa: E501


def test_collectives_count_once_for_each_turn_of_their_loop():
    found = {(each.kind, each.group): (each.count, each.bytes) for each in collectives(PROGRAM, 8)}
    assert found == {
        ("all-reduce", 2): (30, 30 * (10 * 4 + 6 * 2)),
        ("all-gather", 4): (1, 100 * 256 * 2),
        ("reduce-scatter", 4): (2, 16 * 8 * 4 + 4 * 2 * 8 * 4),
        ("collective-permute", 8): (7, 7 * 40),
        ("all-to-all", 8): (1, 40),
    }


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2},{3,4,5}}, use_global_device_ids=true", 3),
        ("[2,4]<=[8], dimensions={0}", 4),
        ("[4,2]<=[2,4]T(1,0), dimensions={0}", 2),
        ("mesh['a'=2,'b'=4] {'b'}, dimensions={0}", 4),
        ("mesh['a'=2,'b'=4] {'a','b'}, dimensions={0}", 8),
        ("mesh['a'=8] {'a':(2)4}, dimensions={0}", 4),
        ("mesh['a'=2,'b'=1,'c'=2], device_ids=([2,2]T(1,0)) {'c'}, dimensions={0}", 2),
        ("{}, dimensions={0}", 8),
    ],
)
def test_groups_are_read_in_each_way_in_which_xla_writes_them(groups, size):
    program = (
        f"ENTRY %main (x: f32[8]) -> f32[8] {{\n  ROOT %y = f32[8] all-gather(%x), replica_groups={groups}\n}}"
    )
    assert [each.group for each in collectives(program, 8)] == [size]


def test_a_loop_that_does_not_say_how_often_it_turns_is_not_guessed():
    with pytest.raises(RuntimeError, match=r"the loop while\.1 does not say"):
        collectives(PROGRAM.replace("constant(30)", "parameter(0)"), 8)


def test_a_ring_sends_an_array_once_around_and_a_sum_twice():
    def sent(kind):
        return Collective(kind=kind, count=3, bytes=800, group=4).bytes_sent

    assert sent("all-gather") == sent("reduce-scatter") == sent("all-to-all") == 600
    assert sent("all-reduce") == 1_200
    assert sent("collective-permute") == 800


def test_the_gradients_of_a_compiled_step_are_in_its_collectives():
    """Against XLA itself: a scan over five layers on a mesh of 8 CPU devices, in a process that has them."""
    code = """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from smollm_jax.planning.hlo import collectives
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
def loss(w, x):
    return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0] ** 2)
step = jax.jit(jax.grad(loss), in_shardings=(NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))),
               out_shardings=NamedSharding(mesh, P()))
program = step.lower(jnp.ones((5, 32, 32)), jnp.ones((16, 32))).compile().as_text()
print([(c.kind, c.group, c.bytes) for c in collectives(program, 8)])
"""
    env = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"[('all-reduce', 8, {5 * 32 * 32 * 4})]"


TINY_MODEL = replace(MODELS["quickstart"], num_layers=2, vocab_size=256, hidden_size=128)


def tiny(batch_size=8, **compute):
    return Config(
        model=TINY_MODEL,
        run=RunConfig(phases=f"10x{batch_size}"),
        data=DataConfig(seq_len=256),
        compute=ComputeConfig(loss_chunk=256, **compute),
    )


def config_135m(*flags):
    return parse(["--phases", "1000x32", *flags])


@pytest.fixture(scope="module")
def on_tpu():
    pytest.importorskip("libtpu", reason="the compiler for TPU is not installed; pip install 'smollm-jax[plan]'")
    return make_plan(tiny(mesh="data=2,fsdp=2"), "v5e:2x2")


def test_the_step_is_compiled_for_a_tpu_that_is_not_here(on_tpu):
    assert on_tpu.fits
    assert on_tpu.target.devices[0].device_kind == "TPU v5 lite" == CHIPS["v5e"].device_kind
    assert on_tpu.attention == "splash"
    assert on_tpu.kernels == 3
    assert on_tpu.dtype == "bfloat16"
    assert 0 < on_tpu.attempt.memory_bytes < 100e6


def test_parameters_divided_over_fsdp_are_brought_together_each_time(on_tpu):
    kinds = {(each.kind, each.group) for each in on_tpu.messages}
    assert ("all-gather", 2) in kinds
    assert any(kind == "all-reduce" for kind, _ in kinds)


def test_the_table_and_the_line_of_json_say_the_same(on_tpu):
    found, words = json.loads(json.dumps(as_dict(on_tpu))), table(on_tpu)
    assert found["fits"]
    assert found["compiled"]
    assert found["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1}
    assert f"{found['parameters']:,}" in words
    assert f"{found['memory_bytes'] / 2**30:.2f} of 15.75 GiB a chip" in words
    assert "splash, 3 fused kernels in the program" in words
    for message in found["collectives"]:
        assert f"{message['count']:,} {message['kind']} among {message['group']}" in words
    assert f"{found['estimate']['tokens_per_second']:,.0f} tokens/s" in words
    assert "ESTIMATE" in words
    assert found["estimate"]["recipe_tokens"] == 10 * 8 * 256


def test_a_topology_of_several_hosts_is_planned_with_their_votes():
    pytest.importorskip("libtpu", reason="the compiler for TPU is not installed; pip install 'smollm-jax[plan]'")
    assert len({device.process_index for device in topology_of("v5e:4x4").devices}) == 4
    assert make_plan(tiny(16, remat="none"), "v5e:4x4").attempt.mesh.size == 16


@pytest.mark.slow
def test_what_a_tpu_refuses_does_not_fit_and_the_remedy_does():
    pytest.importorskip("libtpu", reason="the compiler for TPU is not installed; pip install 'smollm-jax[plan]'")
    wide = replace(TINY_MODEL, hidden_size=1_024, intermediate_size=8_192, num_heads=8, num_kv_heads=8)
    plan = make_plan(replace(tiny(512, remat="none"), model=wide), "v5e:1x1")
    assert not plan.fits
    assert plan.attempt.refused
    assert plan.remedy is not None
    assert plan.remedy.startswith("--remat ")
    assert f"it would with {plan.remedy}" in table(plan)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="a process's memory is read from /proc")
def test_the_memory_of_a_cpu_plan_is_that_of_the_run(train):
    """Compared: what plan finds for cpu:1, and the most memory that the process of a run has held."""
    flags = (
        "--hidden-size 512 --num-heads 8 --num-kv-heads 4 --head-dim 64 --intermediate-size 1408 --num-layers 4 "
        "--vocab-size 8192 --seq-len 256 --batch-size 16 --steps 2 --warmup-steps 0"
    ).split()
    process = train(*flags, "--no-export", "--eval-every", "0", "--eval-documents", "0")
    peak, status = 0, Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        held = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        peak = max(peak, int(held[1]) * 1024 if held else 0)  # a process that has ended holds nothing
        time.sleep(0.05)
    ended(process)
    plan = make_plan(parse([*TINY, *flags]), "cpu:1")
    assert plan.target.compiles
    assert plan.attempt.memory_bytes == pytest.approx(peak, rel=0.1)


def test_the_devices_of_a_cpu_share_its_memory():
    one, eight = (
        make_plan(parse([*TINY, "--mesh", f"data={n}", "--batch-size", "8"]), f"cpu:{n}") for n in (1, 8)
    )
    assert eight.target.memory_bytes == one.target.memory_bytes // 8
    assert (
        eight.attempt.memory_bytes < one.attempt.memory_bytes / 4
    )  # libraries, and a save's copy, are there once


def test_padding_costs_the_time_of_rows():
    def seconds(rows):
        plan = as_dict(make_plan(config_135m("--batch-size", str(rows), "--steps", "9"), "gpu:8"))
        return plan["estimate"]["compute_seconds"]

    assert seconds(12) == seconds(16) > seconds(8)


def test_many_gpus_are_of_several_machines():
    with pytest.raises(ValueError, match="12 rows"):
        make_plan(config_135m("--batch-size", "12", "--steps", "9"), "gpu:16")


def test_a_gpu_is_planned_by_formula():
    plan = make_plan(config_135m(), "gpu:8")
    assert plan.fits
    assert plan.target.name == "gpu-h100:8"
    assert plan.attention == "pallas"
    assert plan.kernels is None
    assert "by formula" in table(plan)
    # gradients: 2 bytes each, and 4 more for those of the embedding from its other end
    whole = MODELS["135M"].num_parameters * 2 + 49_152 * 576 * 4
    assert [(each.kind, each.group, each.bytes) for each in plan.messages] == [("all-reduce", 8, whole)]
    found = as_dict(plan)["estimate"]
    assert found["step_seconds"] == pytest.approx(
        max(found["compute_seconds"], found["memory_seconds"]) + found["interconnect_seconds"]
    )
    flops = MODELS["135M"].flops_per_token(2_048) * 32 * 2_048 / 8
    assert found["compute_seconds"] >= flops / (0.5 * 989e12)
    assert found["mfu"] == pytest.approx(flops / found["step_seconds"] / 989e12)


def test_parts_of_the_parameters_take_parts_of_the_memory():
    whole = make_plan(config_135m("--remat", "full"), "gpu:8").attempt.memory_bytes
    parts = make_plan(config_135m("--remat", "full", "--mesh", "fsdp=8"), "gpu:8").attempt.memory_bytes
    divided = 18 * MODELS["135M"].num_parameters * 7 / 8
    assert whole - parts == pytest.approx(divided, rel=0.01)


def test_what_is_computed_again_is_not_kept_and_costs_flops():
    config = config_135m()
    kept = [kept_bytes(config.model, remat) for remat in POLICIES]
    flops = [executed_flops_per_token(config, remat) for remat in POLICIES]
    assert kept[0] > kept[1] > kept[2]
    assert flops[0] < flops[1] < flops[2] < flops[0] * 4 / 3
    assert flops[0] == config.model.flops_per_token(2_048)


@pytest.mark.parametrize("product", [reference_linear, wide_product])
@pytest.mark.parametrize("remat", POLICIES)
def test_what_is_kept_is_what_the_model_keeps(remat, product):
    """But for the numbers of the fused kernels' softmaxes: attention is the plain one here."""
    config, rows = MODELS["quickstart"], jnp.zeros((2, 64), jnp.int32)

    def residuals(params):
        def features(params):
            how = {"dtype": jnp.bfloat16, "remat": remat, "product": product}
            return SmolLM.from_params(config, params, **how).features(rows)

        return jax.vjp(features, params)[1]

    leaves = jax.tree.leaves(jax.eval_shape(residuals, jax.eval_shape(lambda: init_params(config, 0))))
    stacked = [leaf for leaf in leaves if leaf.shape[:3] == (config.num_layers, *rows.shape)]
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in stacked) / (config.num_layers * rows.size)
    assert kept == kept_bytes(config, remat) - (4 * config.num_heads if remat == "none" else 0)


def test_what_does_not_fit_is_said_with_the_flags_that_would():
    given = ["--preset", "1.7B", "--phases", "1000x512", "--remat", "none"]
    plan = make_plan(config_135m(*given), "gpu-a100:8")
    assert not plan.fits
    assert plan.remedy is not None
    assert f"it would with {plan.remedy}" in table(plan)
    assert make_plan(config_135m(*given, *plan.remedy.split()), "gpu-a100:8").fits


def test_where_nothing_helps_that_is_said():
    giant = replace(MODELS["1.7B"], hidden_size=16_384, num_layers=200)
    config = replace(config_135m(), model=giant)
    plan = make_plan(config, "gpu:1")
    assert not plan.fits
    assert find_remedy(config, plan.target, jax.numpy.dtype("bfloat16")) is None
    assert "give a smaller --batch-size, or more chips" in table(plan)


def test_the_step_takes_the_longer_of_two_and_then_the_third():
    assert Estimate(compute=3.0, memory=2.0, interconnect=1.0).step == 4.0
    assert Estimate(compute=1.0, memory=2.0, interconnect=1.0).step == 3.0


@pytest.mark.parametrize(
    ("topology", "why"),
    [
        ("", "expected v5e:AxB"),
        ("v5e", "expected v5e:AxB"),
        ("v7:2x2", "expected v5e:AxB"),
        ("v5e:2x2x2", "v5e has 2 dims"),
        ("v5p:2x2", "v5p has 3 dims"),
        ("v5e:32x32", "a pod of v5e has 256 chips"),
        ("gpu:2x4", "expected v5e:AxB"),
        ("cpu:0", "expected v5e:AxB"),
    ],
)
def test_devices_that_cannot_be_are_refused_in_one_line(topology, why):
    with pytest.raises(ValueError, match=why):
        topology_of(topology)


def test_a_slice_that_libtpu_does_not_know_is_refused():
    pytest.importorskip("libtpu", reason="the compiler for TPU is not installed; pip install 'smollm-jax[plan]'")
    with pytest.raises(ValueError, match="v5e:3x5: libtpu knows no such slice"):
        topology_of("v5e:3x5")


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"needs its compiler, libtpu: pip install 'smollm-jax\[plan\]'"):
        topology_of("v5e:2x2")


def test_a_program_that_jaxlib_cannot_read_is_planned_by_formula(on_tpu):
    def unread():
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure: async-update instruction should have 1")

    assert text_of(SimpleNamespace(as_text=unread)) is None
    attempt = replace(on_tpu.attempt, program=None)
    plan = plan_of(on_tpu.target, attempt, jax.numpy.dtype("bfloat16"))
    assert plan.messages
    words = table(plan)
    assert "this jaxlib cannot read the program" in words
    assert "by the compiled program" in words
    assert "sent by each chip, by formula" in words


def test_the_compiler_s_refusal_says_how_much():
    now = "the total memory required for HLO temporaries (35.75G) exceeds available HBM (15.75G). HLO module: jit"
    assert needed_by(now) == int(35.75 * 2**30)
    assert needed_by("Used 1.18T of 95.74G hbm") == int(1.18 * 2**40)
    assert needed_by("something else") == 0


def test_kernels_are_told_from_other_custom_calls():
    call = 'custom-call(%x), custom_call_target="{}"'
    names = ["tpu_custom_call", "AllocateBuffer", "__gpu$xla.gpu.triton", "__cudnn$fmhaSoftmaxBackward"]
    assert kernels("\n".join(call.format(name) for name in names)) == 3


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "smollm_jax", "plan", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_exit_code_says_whether_it_fits():
    fits = command("--topology", "gpu:8", "--json")
    assert fits.returncode == 0
    assert json.loads(fits.stdout)["fits"]
    not_so = command("--topology", "gpu:1", "--preset", "1.7B", "--remat", "none")
    assert not_so.returncode == 1
    assert "does not fit" in not_so.stdout
    padded = command("--topology", "gpu:8", "--mesh", "data=8", "--batch-size", "12", "--steps", "9")
    assert "12 x 2,048 = 24,576 tokens; 2 rows a chip, padding included" in padded.stdout
    spread = command("--topology", "gpu:16", "--mesh", "data=16", "--batch-size", "12", "--steps", "9")
    assert spread.returncode == 2
    assert spread.stdout == ""
    assert "12 rows, the largest batch of the phases over --grad-accum, leave some of 16 devices" in spread.stderr
    assert len(spread.stderr.splitlines()) == 1
