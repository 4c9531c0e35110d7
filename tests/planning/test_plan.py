"""A plan: does the step fit, by the compiler or by formula, and which flags make it fit."""

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from smollm_jax.cli.arguments import parse
from smollm_jax.cli.commands import plan as plan_command
from smollm_jax.config.architecture import ADAPTED, MODELS
from smollm_jax.config.settings import ComputeConfig, Config, DataConfig, OptimizerConfig, RunConfig
from smollm_jax.planning import plan as plans
from smollm_jax.planning import topology as topologies
from smollm_jax.planning.plan import as_dict, find_remedy, make_plan, needed_by, table
from smollm_jax.planning.topology import CHIPS, topology_of
from tests.support.paths import ROOT
from tests.support.runs import TINY, ended

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
def compiled_for_tpu():
    """A plan for four TPU chips, and the program that the compiler made for it."""
    pytest.importorskip("libtpu", reason="the compiler for TPU is not installed; pip install 'smollm-jax[plan]'")
    programs = []

    def compile_step(*args, **kwargs):
        programs.append(plans_compile(*args, **kwargs))
        return programs[-1]

    plans_compile = plans.compile_step
    config = replace(tiny(mesh="data=2,fsdp=2"), optimizer=OptimizerConfig(optimizer="muon"))
    with mock.patch.object(plans, "compile_step", compile_step):
        return make_plan(config, "v5e:2x2"), programs[-1]


@pytest.fixture
def on_tpu(compiled_for_tpu):
    return compiled_for_tpu[0]


@pytest.mark.slow
def test_the_step_is_compiled_for_a_tpu_that_is_not_here(on_tpu):
    assert on_tpu.fits
    assert on_tpu.topology.devices[0].device_kind == "TPU v5 lite" == CHIPS["v5e"].device_kind
    assert as_dict(on_tpu)["attention"] == "splash"
    assert on_tpu.step.dtype.name == "bfloat16"
    assert 0 < on_tpu.memory_bytes < 100e6


@pytest.mark.slow
def test_the_program_for_a_tpu_has_its_kernels_and_gathers_divided_parameters(compiled_for_tpu):
    program = compiled_for_tpu[1].as_text()
    assert len(re.findall(r'custom_call_target="tpu_custom_call"', program)) == 3
    assert "all-gather" in program
    assert "all-reduce" in program


@pytest.mark.slow
def test_a_tpu_orthogonalizes_whole_layers_in_bfloat16_between_two_exchanges(compiled_for_tpu):
    lines = [
        line for line in compiled_for_tpu[1].as_text().splitlines() if "/optimizer/cond/branch_1_fun/" in line
    ]
    sent = [line for line in lines if re.search(r" all-to-all(-start)?\(", line)]
    assert len(sent) == 2 * len(ADAPTED)
    assert all(re.search(r"= \(?bf16\[", line) for line in sent), sent
    assert not any(re.search(r" (all-reduce|reduce-scatter)(-start)?\(", line) for line in lines)


@pytest.mark.slow
def test_the_table_and_the_json_hold_the_same_facts(on_tpu):
    found, lines = json.loads(json.dumps(as_dict(on_tpu))), table(on_tpu)
    assert found["fits"]
    assert found["compiled"]
    assert found["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1}
    assert f"{found['parameters']:,}" in lines
    assert f"{found['memory_bytes'] / 2**30:.2f} GiB per chip" in lines
    assert "15.75 GiB per chip" in lines
    assert "fits, by the compiler" in lines
    assert f"{found['estimate']['tokens_per_second']:,.0f}" in lines
    assert "ESTIMATE memory bytes" not in lines
    assert found["estimate"]["recipe_tokens"] == 10 * 8 * 256
    names = {line[:34].strip().removeprefix("ESTIMATE ").replace(" ", "_") for line in lines.splitlines()}
    assert names == (found.keys() | found["estimate"].keys()) - {"estimate"}


@pytest.mark.slow
def test_a_topology_of_several_hosts_is_planned_with_their_votes():
    pytest.importorskip("libtpu", reason="the compiler for TPU is not installed; pip install 'smollm-jax[plan]'")
    assert len({device.process_index for device in topology_of("v5e:4x4").devices}) == 4
    assert make_plan(tiny(16, remat="none"), "v5e:4x4").step.mesh.size == 16


@pytest.mark.release
def test_a_step_that_a_tpu_refuses_does_not_fit_and_the_remedy_does():
    pytest.importorskip("libtpu", reason="the compiler for TPU is not installed; pip install 'smollm-jax[plan]'")
    wide = replace(TINY_MODEL, hidden_size=1_024, intermediate_size=8_192, num_heads=8, num_kv_heads=8)
    plan = make_plan(replace(tiny(512, remat="none"), model=wide), "v5e:1x1")
    assert not plan.fits
    assert plan.remedy is not None
    assert plan.remedy.startswith("--remat ")
    assert f"it would with {plan.remedy}" in table(plan)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="a process's memory is read from /proc")
def test_the_memory_of_a_cpu_plan_is_the_memory_of_the_run(train):
    """Compared: the plan for cpu:1 and the peak memory of a run's process."""
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
    assert plan.topology.compiles
    assert plan.memory_bytes == pytest.approx(peak, rel=0.1)


@pytest.mark.slow
def test_the_devices_of_a_cpu_share_its_memory():
    one, eight = (
        make_plan(parse([*TINY, "--mesh", f"data={n}", "--batch-size", "8"]), f"cpu:{n}") for n in (1, 8)
    )
    assert eight.topology.memory_bytes == one.topology.memory_bytes // 8
    assert eight.memory_bytes < one.memory_bytes / 4  # libraries and a save's copy exist once


def test_many_gpus_are_of_several_machines():
    with pytest.raises(ValueError, match="12 rows"):
        make_plan(config_135m("--batch-size", "12", "--steps", "9"), "gpu:16")


def test_a_gpu_is_planned_by_formula_and_says_so():
    plan = make_plan(config_135m(), "gpu:8")
    assert plan.fits
    assert plan.topology.name == "gpu-h100:8"
    assert as_dict(plan)["attention"] == "pallas"
    assert not as_dict(plan)["compiled"]
    assert "fits, by formula only" in table(plan)
    assert "ESTIMATE memory bytes" in table(plan)


def test_a_run_that_does_not_fit_is_reported_with_the_flags_that_would():
    given = ["--preset", "1.7B", "--phases", "1000x512", "--remat", "none"]
    plan = make_plan(config_135m(*given), "gpu-a100:8")
    assert not plan.fits
    assert plan.remedy is not None
    assert f"it would with {plan.remedy}" in table(plan)
    assert make_plan(config_135m(*given, *plan.remedy.split()), "gpu-a100:8").fits


def test_a_run_that_nothing_makes_fit_has_no_remedy():
    giant = replace(MODELS["1.7B"], hidden_size=16_384, num_layers=200)
    config = replace(config_135m(), model=giant)
    plan = make_plan(config, "gpu:1")
    assert not plan.fits
    assert find_remedy(config, plan.topology) is None
    assert "give a smaller --batch-size, or more chips" in table(plan)
    assert "estimate" not in as_dict(plan)


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
def test_impossible_devices_are_refused_in_one_line(topology, why):
    with pytest.raises(ValueError, match=why):
        topology_of(topology)


def test_a_slice_that_libtpu_does_not_know_is_refused():
    pytest.importorskip("libtpu", reason="the compiler for TPU is not installed; pip install 'smollm-jax[plan]'")
    with pytest.raises(ValueError, match="v5e:3x5: libtpu knows no such slice"):
        topology_of("v5e:3x5")


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"needs its compiler, libtpu: pip install .*'\.\[plan\]'"):
        topology_of("v5e:2x2")


def test_the_compiler_s_refusal_names_the_bytes_needed():
    now = "the total memory required for HLO temporaries (35.75G) exceeds available HBM (15.75G). HLO module: jit"
    assert needed_by(now) == int(35.75 * 2**30)
    assert needed_by("Used 1.18T of 95.74G hbm") == int(1.18 * 2**40)
    assert needed_by("something else") == 0


def test_the_exit_code_says_whether_it_fits(capsys):
    assert plan_command(["--topology", "gpu:8", "--json"], "plan") == 0
    assert json.loads(capsys.readouterr().out)["fits"]
    assert plan_command(["--topology", "gpu:1", "--preset", "1.7B", "--remat", "none"], "plan") == 1
    assert "does not fit" in capsys.readouterr().out
    padded = ["--topology", "gpu:8", "--mesh", "data=8", "--batch-size", "12", "--steps", "9", "--json"]
    assert plan_command(padded, "plan") == 0
    assert json.loads(capsys.readouterr().out)["batch_a_chip"] == 2


def test_a_mesh_with_devices_without_rows_is_a_mistake_in_one_line():
    flags = ["--topology", "gpu:16", "--mesh", "data=16", "--batch-size", "12", "--steps", "9"]
    command = [sys.executable, "-m", "smollm_jax", "plan", *flags]
    spread = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert spread.returncode == 2
    assert spread.stdout == ""
    assert "12 rows, the largest batch of the phases over --grad-accum, leave some of 16 devices" in spread.stderr
    assert len(spread.stderr.splitlines()) == 1


def test_the_plan_tells_adapters_from_full_fine_tuning():
    """1.7B on an A100. The optimizer holds two f32 moments of each trained parameter, and two counts."""
    flags = ["--preset", "1.7B", "--init-from", "base", "--batch-size", "4", "--seq-len", "2048"]
    full, adapters = (
        make_plan(parse([*flags, *more]), "gpu-a100:1") for more in ([], ["--lora-rank", "16", "--dora"])
    )
    D, F, L = 2_048, 8_192, 24
    trained = L * (16 * (4 * (D + D) + 3 * (D + F)) + 4 * D + 2 * F + D)  # A and B, and the length of each output
    for plan, count in ((full, 1_711_376_384), (adapters, trained)):
        facts = as_dict(plan)
        assert facts["trained_parameters"] == count
        assert 8 * count <= facts["optimizer_memory_bytes"] <= 8 * count + 16
        assert f"trained parameters                {count:,}" in table(plan)
    # a parameter needs 18 bytes of state, of an adapter's base 2, and 2 for the sums that backward reads
    saved = full.memory_bytes - adapters.memory_bytes
    blocks = 1_711_376_384 - 49_152 * D
    assert saved == pytest.approx(18 * (1_711_376_384 - trained) - 2 * 1_711_376_384 - 2 * blocks, rel=1e-3)
