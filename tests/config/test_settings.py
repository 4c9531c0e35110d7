"""Settings: recipes, ranges, phases, and their JSON."""

import contextlib
import json
from dataclasses import replace

import pytest
from hypothesis import example, given, reject
from hypothesis import strategies as st

from smollm_jax.cli.arguments import parse
from smollm_jax.config.architecture import MODELS, ModelConfig
from smollm_jax.config.fields import resume_rules
from smollm_jax.config.phases import parse_phases
from smollm_jax.config.recipes import RECIPES
from smollm_jax.config.serialization import from_dict, to_dict
from smollm_jax.config.settings import ComputeConfig, Config, OptimizerConfig, RunConfig


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


def test_fast_trains_on_twenty_tokens_a_parameter_with_muon():
    config = parse(["--recipe", "fast"])
    tokens = config.total_steps * config.main_batch_size * config.data.seq_len
    assert tokens / config.model.num_parameters == pytest.approx(20, rel=0.01)
    assert (config.optimizer.optimizer, config.warmup_steps, config.decay_steps) == ("muon", 0, 5_150)


def test_muon_s_settings_belong_to_muon_which_trains_no_adapters():
    assert OptimizerConfig(optimizer="muon", muon_momentum=0.9, adamw_share=0.3).name == "Muon"
    for values in ({"muon_momentum": 0.9}, {"muon_weight_decay": 0.3}, {"adamw_share": 0.3}):
        with pytest.raises(ValueError, match="belongs to --optimizer muon; adamw came"):
            OptimizerConfig(**values)
    with pytest.raises(ValueError, match="adapters train with adamw: give --optimizer adamw"):
        parse(["--optimizer", "muon", "--lora-rank", "4", "--init-from", "base"])
    with pytest.raises(ValueError, match=r"z_loss=0\.1 is for text and conversations"):
        parse(["--recipe", "dpo", "--z-loss", "0.1"])


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
    "argv",
    [
        [],
        ["--recipe", "smollm2", "--decay-shape", "1-sqrt", "--extend", "7"],
        ["--recipe", "fast"],
        ["--recipe", "quickstart", "--steps", "70"],
    ],
)
def test_a_config_survives_being_written(argv):
    config = parse(argv)
    written = json.loads(json.dumps(to_dict(config)))
    again = from_dict(written)
    assert to_dict(again) == to_dict(config)
    assert (again.run.steps, again.total_steps) == (config.own_steps, config.total_steps)
    assert again.phases == config.phases


def test_a_batch_that_grows_survives_being_written():
    for run in (
        RunConfig(phases="100x8,50x32"), RunConfig(phases="10x4,50x32", steps=15), RunConfig(phases="4x2,4x8"),
    ):  # fmt: skip
        config = Config(run=run)
        again = from_dict(json.loads(json.dumps(to_dict(config))))
        assert again.phases == config.phases
        assert again.main_batch_size == config.main_batch_size


SIZES, STEPS = st.sampled_from([2, 4, 8, 32, 64]), st.integers(1, 6_000)
PHASES = st.lists(st.builds("{}x{}".format, STEPS, SIZES), min_size=1, max_size=4).map(",".join)
CHANGES = st.fixed_dictionaries({
    "run": st.fixed_dictionaries({}, optional={
        "phases": PHASES, "steps": STEPS, "batch_size": SIZES, "stop_after": STEPS, "seed": st.integers(0, 99),
        "run_dir": st.text(), "init_from": st.text(), "new_run": st.booleans(), "export": st.booleans(),
        "sample_prompts": st.lists(st.text("ab", min_size=1)).map(tuple),
    }),
    "data": st.fixed_dictionaries({}, optional={
        "data": st.text(), "eval_data": st.text(), "shards": st.sampled_from([1, 2]), "epochs": st.integers(0, 2),
        "eval_documents": st.integers(1, 300), "on_bad_data": st.sampled_from(["stop", "skip"]),
    }),
    "optimizer": st.fixed_dictionaries({}, optional={
        "learning_rate": st.floats(1e-6, 1), "schedule": st.sampled_from(["linear", "constant", "cosine", "wsd"]),
        "warmup_steps": st.integers(0, 200), "decay_steps": st.integers(0, 200), "beta1": st.floats(0, 0.99),
        "optimizer": st.sampled_from(["adamw", "muon"]), "adamw_share": st.floats(0.1, 1),
    }),
    "compute": st.fixed_dictionaries({}, optional={
        "mesh": st.sampled_from(["", "data=2", "fsdp=2,tensor=3"]), "grad_accum": st.sampled_from([1, 2]),
        "dtype": st.sampled_from(["auto", "float32", "bfloat16"]), "unroll": st.integers(0, 4),
    }),
    "model": st.fixed_dictionaries({}, optional={
        "rope_theta": st.floats(1, 1e9), "tie_embeddings": st.booleans(), "max_seq_len": st.integers(2_048, 9_999),
    }),
})  # fmt: skip


@given(st.sampled_from(sorted(RECIPES)), CHANGES)
def test_any_config_survives_being_written(recipe, changes):
    config = RECIPES[recipe]
    try:
        groups = {name: replace(getattr(config, name), **values) for name, values in changes.items()}
        config = replace(config, **groups)
        _ = config.run_dir  # the home folder of an unknown user
    except ValueError:
        reject()
    written = json.loads(json.dumps(to_dict(config)))
    again = from_dict(written)
    assert to_dict(again) == to_dict(config)
    assert again.phases == config.phases
    for name in ("total_steps", "main_batch_size", "warmup_steps", "decay_steps", "run_dir"):
        assert getattr(again, name) == getattr(config, name)
    assert [again.data, again.compute, again.model] == [config.data, config.compute, config.model]


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


def test_a_preset_with_a_shorter_context_has_shorter_rows():
    assert parse(["--preset", "quickstart"]).data.seq_len == MODELS["quickstart"].max_seq_len
    assert parse(["--preset", "quickstart", "--seq-len", "256"]).data.seq_len == 256


def test_a_config_of_an_earlier_version_opens_though_its_kernel_is_gone():
    values = to_dict(Config())
    values["compute"]["attention"] = "cudnn"
    assert from_dict(values) == from_dict(to_dict(Config()))
    values["compute"]["attention"] = "cutlass"
    with pytest.raises(ValueError, match="attention must be one of auto, plain, splash, pallas, 'cutlass' came"):
        from_dict(values)


def test_what_a_resume_may_change_stands_with_each_setting():
    rules = resume_rules(Config())
    by_rule = {rule: {name for name in rules if rules[name] == rule} for rule in rules.values()}
    assert by_rule["same maths"] == {
        f"compute.{name}" for name in ("mesh", "remat", "attention", "unroll", "loss_chunk", "grad_accum")
    }
    assert by_rule["schedule"] == {
        *(f"run.{name}" for name in ("steps", "phases", "batch_size", "extend")),
        *(f"optimizer.{name}" for name in ("schedule", "warmup_steps", "decay_steps", "learning_rate")),
        "optimizer.final_learning_rate", "optimizer.decay_shape",
    }  # fmt: skip
    assert by_rule[""] == {
        "run.init_from", "run.seed", "data.data", "data.split", "data.text_column", "data.tokenizer",
        "data.seq_len", "data.shuffle_window", "data.shards", "data.epochs", "data.eval_data",
        "data.eval_documents", "data.eval_batches", "data.special_tokens", "optimizer.beta1",
        "optimizer.beta2", "optimizer.epsilon", "optimizer.weight_decay", "optimizer.clip_norm",
        "optimizer.optimizer", "optimizer.muon_momentum", "optimizer.muon_weight_decay", "optimizer.adamw_share",
        "optimizer.z_loss", "optimizer.ema",
        "model.vocab_size", "model.hidden_size",
        "model.num_layers", "model.num_heads", "model.num_kv_heads", "model.head_dim", "model.intermediate_size",
        "data.data_kind", "data.loss_on",
        "data.chat_template", "model.rms_norm_eps", "model.rope_theta",
        "model.max_seq_len", "model.initializer_range",
        "model.tie_embeddings",
        "adapter.lora_rank", "adapter.lora_alpha", "adapter.lora_targets", "adapter.dora",
        "preference.pair_loss", "preference.beta", "preference.label_smoothing",
    }  # fmt: skip
