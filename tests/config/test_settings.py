"""Settings, recipes, and what may change between two starts."""

import contextlib
import json
import re
import resource
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import smollm_jax
from smollm_jax.cli.arguments import parse
from smollm_jax.config.architecture import MODELS, ModelConfig
from smollm_jax.config.serialization import from_dict, to_dict
from smollm_jax.config.settings import ComputeConfig, Config, RunConfig, parse_phases
from smollm_jax.runs.metrics import keep_records
from smollm_jax.training.restore import check_settings
from tests.support.paths import ROOT


def phases_of(*argv):
    return [(phase.steps, phase.batch_size) for phase in parse([*argv]).phases]


def test_the_bare_command_is_the_replica():
    config = parse([])
    assert phases_of() == [(5_000, 32), (50, 8)]
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay, config.warmup_steps) == (
        6e-4,
        0.01,
        100,
    )
    assert (config.optimizer.schedule, config.run.checkpoint_every, config.data.seq_len) == ("linear", 500, 2_048)
    assert config.data.data == "HuggingFaceTB/smollm-corpus:cosmopedia-v2"
    assert config.model == MODELS["135M"]


def test_smollm2_has_the_published_numbers():
    config = parse(["--recipe", "smollm2"])
    assert config.main_batch_size * config.data.seq_len == 1_048_576
    assert (config.total_steps, config.warmup_steps, config.decay_steps) == (2_000_000, 2_000, 400_000)
    assert config.optimizer.learning_rate == 3e-3
    assert config.optimizer.schedule == "wsd"


def test_steps_and_batch_size_shape_the_phases():
    assert phases_of("--steps", "100") == [(100, 32)]
    assert phases_of("--steps", "5010") == [(5_000, 32), (10, 8)]
    assert phases_of("--steps", "6000") == [(5_950, 32), (50, 8)]
    assert phases_of("--batch-size", "4") == [(5_000, 4), (50, 4)]
    assert phases_of("--batch-size", "64") == [(5_000, 64), (50, 8)]


def test_a_recipes_warm_up_is_fitted_and_one_by_hand_is_not():
    assert parse(["--steps", "200"]).warmup_steps == 20
    assert parse(["--steps", "200", "--warmup-steps", "50"]).warmup_steps == 50
    with pytest.raises(ValueError, match="warmup_steps=300 must be below the 200 steps"):
        parse(["--steps", "200", "--warmup-steps", "300"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--steps", "0"], "steps=0 must be at least 1"),
        (["--steps", "many"], "many"),
        (["--step", "5"], "--step"),
        (["--recipe", "replicate"], "expected one of replica, smollm2, quickstart"),
        (["--preset", "7B"], "expected one of 135M, 360M, 1.7B, quickstart"),
        (["--num-heads", "9", "--num-kv-heads", "4"], "num_heads=9 must be a multiple of num_kv_heads=4"),
        (["--learning-rate", "-1"], "learning_rate=-1.0 must be above 0"),
        (["--learning-rate", "nan"], "learning_rate=nan must be a finite number"),
        (["--learning-rate", "inf"], "learning_rate=inf must be a finite number"),
        (["--grad-accum", "3"], "grad_accum=3 must divide the batch size 32"),
        (["--decay-steps", "5"], "decay_steps=5 belongs to --schedule wsd"),
        (["--schedule", "wsd", "--warmup-steps", "80", "--decay-steps", "80", "--steps", "100"], "together"),
        (["--seq-len", "9000"], "seq_len=9000 must not exceed the model's max_seq_len=8192"),
        (["--dtype", "float16"], "float16"),
        (["--phases", "5x"], "must read STEPSxBATCH"),
        (["--beta2", "1"], "beta2=1.0 must lie in [0, 1)"),
        (["--final-learning-rate", "1"], "must not be above"),
        (["--data-timeout", "0"], "data_timeout=0.0"),
        (["--seed", str(2**32)], "seed=4294967296 must be below 2**32"),
        (["--steps", "9999999999"], "must be below 2**31"),
        (["--sample-prompts", "a", ""], "every prompt must have text"),
        (["--schedule", "constant", "--final-learning-rate", "1e-5"], "belongs to a schedule that decays"),
        (["--eval-data", "x.jsonl", "--eval-documents", "0"], "must be above 0"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(argv, words):
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        parse(argv)
    assert "\n" not in str(caught.value)


def test_a_mistake_on_the_command_line_exits_with_2_and_no_traceback():
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_jax.py"), "--steps", "0"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: steps=0 must be at least 1; see train_jax.py --help\n"


@pytest.mark.parametrize("command", [["train_jax.py"], ["-m", "smollm_jax"], ["-m", "smollm_jax", "export"]])
def test_help_answers_at_once(command):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command, "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert "usage" in done.stdout
    heavy = {"jax", "numpy", "torch", "datasets", "transformers", "gradio", "orbax"}
    assert not heavy & {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    )  # of the processor: the wall is shared


@pytest.mark.parametrize("argv", [[], ["--recipe", "smollm2"], ["--recipe", "quickstart", "--steps", "70"]])
def test_a_config_survives_being_written(argv):
    config = parse(argv)
    written = json.loads(json.dumps(to_dict(config)))
    again = from_dict(written)
    assert to_dict(again) == to_dict(config)
    assert again.run.steps == config.total_steps
    assert again.phases == config.phases


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(["run", "data", "optimizer", "compute", "model"]), st.data())
def test_a_damaged_config_is_a_value_error(group, data):
    values = to_dict(Config())
    name = data.draw(st.sampled_from(sorted(values[group])))
    values[group][name] = data.draw(JSON)
    with contextlib.suppress(ValueError):
        from_dict(values)


@given(JSON)
def test_any_json_as_a_config_is_a_value_error_or_a_config(values):
    with contextlib.suppress(ValueError):
        from_dict(values)


@given(st.text(max_size=12))
@example("0x4")
@example("4x0,1x1")
def test_phases_are_read_or_refused(text):
    try:
        phases = parse_phases(text)
    except ValueError:
        return
    assert all(phase.steps > 0 and phase.batch_size > 0 for phase in phases)


def updates_of(step):
    return lambda config: [(config.optimizer.learning_rate, config.batch_size_at(i + 1)) for i in range(step)]


def test_changes_are_refused_noted_or_let_pass():
    config = Config()
    saved = to_dict(config)
    assert check_settings(saved, config, 10, updates_of(10)) == []
    louder = replace(config, run=replace(config.run, log_every=1, keep_last=9))
    assert check_settings(saved, louder, 10, updates_of(10)) == []
    accumulating = replace(config, compute=replace(config.compute, grad_accum=2))
    assert "same maths" in check_settings(saved, accumulating, 10, updates_of(10))[0]
    longer = replace(config, run=replace(config.run, steps=9_000))
    assert "stay as they were" in check_settings(saved, longer, 10, updates_of(10))[0]
    other = replace(config, data=replace(config.data, data="x.jsonl"), run=replace(config.run, seed=1))
    with pytest.raises(ValueError, match=r"run\.seed was 0, is 1; data\.data was .*, is x\.jsonl"):
        check_settings(saved, other, 10, updates_of(10))
    with pytest.raises(ValueError, match="stands at step 10, past --steps 5"):
        check_settings(saved, replace(config, run=replace(config.run, steps=5)), 10, updates_of(10))


def test_a_smaller_batch_of_the_past_is_refused_and_of_the_future_is_not():
    saved = to_dict(replace(Config(), run=RunConfig(phases="20x8")))
    later = replace(Config(), run=RunConfig(phases="10x8,10x4"))
    assert "stay as they were" in check_settings(saved, later, 10, updates_of(10))[0]
    with pytest.raises(ValueError, match=r"run\.phases was 20x8, is 10x8,10x4"):
        check_settings(saved, later, 11, updates_of(11))


def test_records_are_cut_back_to_the_checkpoint(tmp_path):
    lines = [
        {"step": 1, "loss": 3.0, "ledger": "a"},
        {"step": 2, "loss": 2.0, "ledger": "b"},
        {"step": 2, "eval_loss": 2.5},
        {"step": 3, "loss": 1.0, "ledger": "c"},
    ]
    text = "\n".join(json.dumps(line) for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '\n{"step": 4, "lo')
    (tmp_path / "samples.txt").write_text("=== step 2\n  a\n  === step 9\n=== step 4\n  b\n")
    records = keep_records(tmp_path, 2)
    assert records.evaluated == 2
    assert records.ledgers == {1: "a", 2: "b", 3: "c"}
    assert [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()] == lines[:3]
    assert (tmp_path / "samples.txt").read_text() == "=== step 2\n  a\n  === step 9\n"
    assert keep_records(tmp_path, 1).evaluated == 0
    assert (tmp_path / "samples.txt").read_text() == ""


def test_flops_of_a_token_are_the_counted_products():
    config = ModelConfig()
    products = 6 * 134_515_008
    assert config.flops_per_token(2_048) == products + 6 * 30 * 2_048 * 576
    assert config.flops_per_token(2_048) == pytest.approx(1.019e9, rel=1e-3)


def test_layers_and_tokens_at_a_time_go_by_device_and_remat_unless_they_are_given():
    auto, given = ComputeConfig(), ComputeConfig(unroll=3, loss_chunk=100)
    for remat, on_gpu, layers, tokens in [
        ("none", True, 30, 8_192),
        ("dots", True, 1, 8_192),
        ("full", True, 1, 1_024),
        ("none", False, 1, 1_024),
    ]:
        assert auto.unroll_for(remat, 30, on_gpu=on_gpu) == layers
        assert auto.loss_chunk_for(remat, on_gpu=on_gpu) == tokens
        assert given.unroll_for(remat, 30, on_gpu=on_gpu) == 3
        assert given.loss_chunk_for(remat, on_gpu=on_gpu) == 100


def test_the_map_names_every_room():
    rooms = [path.stem for path in (ROOT / "smollm_jax").glob("[!_]*.py")]
    named = set(re.findall(r"\w+", smollm_jax.__doc__.split("The map")[1]))
    assert [room for room in rooms if room not in named] == []


def test_a_preset_with_a_shorter_context_has_shorter_rows():
    assert parse(["--preset", "quickstart"]).data.seq_len == MODELS["quickstart"].max_seq_len
    assert parse(["--preset", "quickstart", "--seq-len", "256"]).data.seq_len == 256
