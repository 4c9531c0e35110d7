"""What may change between two starts of a run, and what does not start over."""

import json
from dataclasses import replace

import numpy as np
import pytest

from smollm_jax.api.training import settings_of
from smollm_jax.checkpoint.manager import CheckpointManager
from smollm_jax.cli.arguments import parse
from smollm_jax.config.adapters import AdapterConfig
from smollm_jax.config.architecture import ModelConfig
from smollm_jax.config.recipes import RECIPES
from smollm_jax.config.serialization import from_dict, to_dict
from smollm_jax.config.settings import Config, OptimizerConfig, RunConfig
from smollm_jax.runtime.errors import UserError
from smollm_jax.tokenizer import train_tokenizer
from smollm_jax.training.origin import about_context
from smollm_jax.training.restore import check_settings, completed, resolve_start, vocabulary_follows
from smollm_jax.training.setup import keep_config

CURSOR = {"tokenizer": "", "step": 4}


def test_changes_are_refused_noted_or_let_pass():
    config = Config()
    saved = to_dict(config)
    assert check_settings(saved, config, 10) == []
    louder = replace(config, run=replace(config.run, log_every=1, keep_last=9))
    assert check_settings(saved, louder, 10) == []
    accumulating = replace(config, compute=replace(config.compute, grad_accum=2))
    assert "same maths" in check_settings(saved, accumulating, 10)[0]
    longer = replace(config, run=replace(config.run, steps=9_000))
    assert "stay as they were" in check_settings(saved, longer, 10)[0]
    other = replace(config, data=replace(config.data, data="x.jsonl"), run=replace(config.run, seed=1))
    with pytest.raises(ValueError, match=r"run\.seed was 0, is 1; data\.data was .*, is x\.jsonl"):
        check_settings(saved, other, 10)
    with pytest.raises(ValueError, match="is at step 10, past --steps 5"):
        check_settings(saved, replace(config, run=replace(config.run, steps=5)), 10)


def test_a_run_is_extended_only_while_its_rates_stay_as_they_were():
    optimizer = OptimizerConfig(schedule="wsd")
    config = replace(Config(), run=RunConfig(phases="100x4"), optimizer=optimizer)
    longer = replace(config, run=replace(config.run, extend=60))
    kept = "run.extend changed: all 80 updates so far stay as they were"
    assert check_settings(to_dict(config), longer, 80) == [kept]
    assert check_settings(to_dict(longer), longer, 120) == []
    with pytest.raises(UserError, match=r"decay began after step 80, .* at step 90; smollm anneal RUN --from 80"):
        check_settings(to_dict(config), longer, 90)


def test_a_smaller_batch_of_the_past_is_refused_and_of_the_future_is_not():
    saved = to_dict(replace(Config(), run=RunConfig(phases="20x8")))
    later = replace(Config(), run=RunConfig(phases="10x8,10x4"))
    assert "stay as they were" in check_settings(saved, later, 10)[0]
    with pytest.raises(ValueError, match=r"run\.phases was 20x8, is 10x8,10x4"):
        check_settings(saved, later, 11)


def test_a_batch_that_grows_is_compared_as_it_ran():
    """Also in a config written before: batch_size, of the longest phase, stands beside larger phases."""
    steady = replace(Config(), optimizer=OptimizerConfig(schedule="constant"))
    saved = to_dict(replace(steady, run=RunConfig(phases="3x2,2x4")))
    assert (saved["run"]["phases"], saved["run"]["batch_size"]) == ("3x2,2x4", 2)
    longer = replace(steady, run=RunConfig(phases="3x2,4x4"))
    assert "stay as they were" in check_settings(saved, longer, 5)[0]
    with pytest.raises(ValueError, match=r"run\.phases was 3x2,2x4, is 5x2"):
        check_settings(saved, replace(steady, run=RunConfig(phases="5x2")), 4)


def test_a_run_stays_on_record_with_the_initial_weights_it_began_with(tmp_path):
    """Also if it began before its recipe scaled them."""
    config = RECIPES["smollm2"]
    old = to_dict(config)
    del old["run"]["scale_residual_init"]
    for saved, began in ((old, False), (to_dict(config), True)):
        checkpoints = CheckpointManager(tmp_path / str(began), keep_last=3, keep_every=0)
        checkpoints.save(
            4, {"params": {"x": np.zeros(3, np.float32)}}, {"progress": {}, "cursor": CURSOR, "config": saved}
        )
        assert checkpoints.wait()
        start = resolve_start(config, tmp_path, checkpoints)
        assert start.config.run.scale_residual_init == began
        assert start.notes == []


def test_a_tokenizer_that_was_moved_is_the_same_tokenizer(tmp_path):
    tokenizers = [train_tokenizer(["the cat sat on the mat"] * 9, size) for size in (270, 265)]
    for name, tokenizer in zip(("new", "other"), tokenizers, strict=True):
        tokenizer.save(tmp_path / name)
    config = replace(Config(), data=replace(Config().data, tokenizer=str(tmp_path / "old")))
    cursor = {"step": 4, "tokenizer": tokenizers[0].fingerprint[:16]}
    meta = {"progress": {}, "config": to_dict(config), "cursor": cursor}
    checkpoints = CheckpointManager(tmp_path / "checkpoints", keep_last=3, keep_every=0)
    checkpoints.save(4, {"params": {"x": np.zeros(3, np.float32)}}, meta)
    assert checkpoints.wait()
    moved, other = (
        replace(config, data=replace(config.data, tokenizer=str(tmp_path / x))) for x in ("new", "other")
    )
    (note,) = resolve_start(moved, tmp_path, checkpoints).notes
    assert "the same tokenizer" in note
    with pytest.raises(ValueError, match=r"data\.tokenizer was .*old, is .*other"):
        resolve_start(other, tmp_path, checkpoints)


@pytest.fixture
def trained(tmp_path):
    """A run folder with 30 steps on record, a checkpoint being due every 10."""
    config = replace(Config(), run=RunConfig(phases="40x2", checkpoint_every=10))
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 31)))
    return config, tmp_path, CheckpointManager(tmp_path / "checkpoints", keep_last=3, keep_every=0)


def test_an_imported_run_does_not_start_over_by_itself(trained):
    config, run_dir, checkpoints = trained
    checkpoints.save(0, {"params": {"x": np.zeros(3, np.float32)}}, {"imported_from": "x"})
    assert checkpoints.wait()
    (run_dir / "checkpoints" / "6").mkdir()
    with pytest.raises(ValueError, match=r"no good checkpoint after the import, only 6\.bad; see .* --new-run"):
        resolve_start(config, run_dir, checkpoints)
    (run_dir / "checkpoints" / "6.bad").rmdir()  # by hand: what was trained is gone nevertheless
    with pytest.raises(ValueError, match=r"30 steps are trained, but .* no good checkpoint after the import"):
        resolve_start(config, run_dir, checkpoints)


def test_a_run_whose_checkpoints_are_gone_does_not_start_over_by_itself(trained):
    """A volume that is not mounted, say: the records would be cut to nothing."""
    config, run_dir, checkpoints = trained
    with pytest.raises(ValueError, match=r"30 steps are trained, but .* holds no good checkpoint; bring it back"):
        resolve_start(config, run_dir, checkpoints)
    before = "".join(f'{{"step": {step}}}\n' for step in range(1, 20))  # killed while the first save was under way
    (run_dir / "metrics.jsonl").write_text(before)
    assert resolve_start(config, run_dir, checkpoints).checkpoint is None
    (run_dir / "export").mkdir()
    with pytest.raises(ValueError, match="19 steps are trained"):
        resolve_start(config, run_dir, checkpoints)


def test_a_run_older_than_a_setting_goes_on_with_its_default_and_not_with_another():
    config, saved = Config(), to_dict(Config())
    del saved["data"]["special_tokens"], saved["model"]["extra_eos_token_ids"]
    assert check_settings(saved, config, 10) == []
    parsing = replace(config, data=replace(config.data, special_tokens="parse"))
    with pytest.raises(ValueError, match=r"data\.special_tokens was text, is parse"):
        check_settings(saved, parsing, 10)


@pytest.mark.parametrize(
    "meta",
    [
        {"progress": {}},
        {"progress": {"nix": 1}, "config": to_dict(Config())},
        {"progress": 3, "config": {}},
        {"progress": {"step": "x"}, "config": to_dict(Config())},
        {"progress": {"step": 3}, "config": to_dict(Config())},
        {"progress": {"step": 3}, "config": to_dict(Config()), "cursor": {"tokenizer": 5, "step": 3}},
        {"progress": {"step": 3}, "config": to_dict(Config()), "cursor": {"tokenizer": "x", "step": None}},
    ],
)
def test_a_checkpoint_without_settings_or_progress_is_damaged_in_one_line(tmp_path, meta):
    checkpoints = CheckpointManager(tmp_path / "checkpoints", keep_last=1, keep_every=0)
    checkpoints.save(3, {"params": {"w": np.ones(2)}}, meta)
    assert checkpoints.wait()
    with pytest.raises(UserError, match=r"checkpoint 3 is damaged: its meta\.json lacks"):
        resolve_start(Config(), tmp_path, checkpoints)


def test_data_at_another_place_is_left_to_the_loader_and_other_weights_are_refused():
    def reading(data, **changes):
        return replace(Config(), data=replace(Config().data, data=data, **changes))

    saved = to_dict(reading("a/x.jsonl=0.7,b/y.jsonl=0.3", eval_data="e/z.jsonl"))
    moved = reading("c/x.jsonl=0.7,b/y.jsonl=0.3", eval_data="c/z.jsonl")
    notes = check_settings(saved, moved, 10)
    assert [note.split(" changed")[0] for note in notes] == ["data.data", "data.eval_data"]
    assert all("goes on if the files are the same" in note for note in notes)
    for other in ("c/x.jsonl=0.6,b/y.jsonl=0.4", "c/x.jsonl"):
        with pytest.raises(ValueError, match=r"data\.data was .*, is c/x"):
            check_settings(saved, reading(other, eval_data="e/z.jsonl"), 10)
    with pytest.raises(ValueError, match=r"data\.eval_data was .*, is None"):
        check_settings(saved, reading("a/x.jsonl=0.7,b/y.jsonl=0.3"), 10)


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        ("old/a,b.txt", "new/a,b.txt", True),
        ("old/year=2024,b.txt=0.7,old/c.txt=0.3", "new/year=2024,b.txt=0.7,new/c.txt=0.3", True),
        ("old/year=2024,b.txt,old/c.txt", "new/year=2024,b.txt,new/c.txt", True),
        ("old/a,b.txt=0.7,old/c.txt=0.3", "new/a,b.txt=0.6,new/c.txt=0.4", False),
        ("old/a,b.txt,old/c.txt", "new/a,b.txt", False),
        ("old/a.txt", "new/a,b.txt,new/c.txt", False),
    ],
)
def test_names_with_commas_and_equals_signs_may_move_too(tmp_path, monkeypatch, before, now, same):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "new").mkdir()
    for name in ("a,b.txt", "c.txt", "year=2024,b.txt"):
        (tmp_path / "new" / name).write_text("text")
    saved = to_dict(replace(Config(), data=replace(Config().data, data=before)))
    moved = replace(Config(), data=replace(Config().data, data=now))
    if same:
        (note,) = check_settings(saved, moved, 10)
        assert "goes on if the files are the same" in note
    else:
        with pytest.raises(UserError, match=r"data\.data was "):
            check_settings(saved, moved, 10)


def test_a_refusal_names_three_changes_and_three_ways_on():
    saved, config = to_dict(Config()), RECIPES["quickstart"]
    with pytest.raises(ValueError, match=r"and \d+ more\. Go on with its own settings by --resume RUN") as caught:
        check_settings(saved, config, 10)
    assert len(str(caught.value)) < 500


def test_the_vocabulary_follows_a_tokenizer_that_is_not_the_recipes_unless_given():
    config = RECIPES["quickstart"]
    assert not vocabulary_follows(config)
    other = replace(config, data=replace(config.data, tokenizer="train:1024"))
    assert vocabulary_follows(other)
    assert not vocabulary_follows(replace(other, model=replace(other.model, vocab_size=2_048)))


@pytest.mark.parametrize(
    "change",
    [
        {"cursor": [1]}, {"cursor": {"tokenizer": 1, "step": 4}}, {"cursor": {"tokenizer": ""}}, {"progress": [1]},
        {"progress": {"step": "4"}}, {"progress": {"ledger": 1}}, {"progress": {"x": 1}}, {"config": []},
        {"computed": [1]},
    ],
    ids=str,
)  # fmt: skip
def test_a_checkpoint_whose_meta_is_of_no_run_is_damaged_in_one_line(tmp_path, change):
    """Its seal vouches for bytes, and whoever sends a run can seal it."""
    checkpoints = CheckpointManager(tmp_path / "checkpoints", keep_last=3, keep_every=0)
    meta = {"progress": {"step": 4}, "cursor": CURSOR, "config": to_dict(Config())}
    checkpoints.save(4, {"params": {"x": np.zeros(3, np.float32)}}, meta | change)
    assert checkpoints.wait()
    with pytest.raises(UserError, match=r"checkpoint 4 is damaged: its meta\.json lacks"):
        resolve_start(Config(), tmp_path, checkpoints)


def test_a_folder_in_the_place_of_config_json_is_named_before_anything_is_computed(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(UserError, match=r"config\.json is not a file"):
        keep_config(Config(), tmp_path)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("", (10_000.0, 2_048)),
        ("--rope-theta 100000 --max-seq-len 8192", (100_000.0, 8_192)),  # though the recipe's own
        ("--max-seq-len 4096", (10_000.0, 4_096)),
        ("--recipe smollm2 --rope-theta 100000 --max-seq-len 8192", (100_000.0, 8_192)),
    ],
)
def test_a_given_context_holds_over_the_weights_own(argv, expected):
    weights = replace(ModelConfig(), rope_theta=10_000.0, max_seq_len=2_048, num_layers=3)
    config = completed(parse(["--init-from", "x", *argv.split()]), weights, "x")
    assert (config.model.rope_theta, config.model.max_seq_len) == expected
    assert config.model == replace(weights, rope_theta=expected[0], max_seq_len=expected[1])
    again = from_dict(json.loads(json.dumps(to_dict(config))))
    assert completed(again, config.model, "x").model == config.model
    notes = about_context(weights, config)
    assert bool(notes) == bool(argv)
    if "rope" in argv:
        assert notes == ["context     2,048 -> 8,192 tokens, rope_theta 10,000 -> 100,000"]
        adapters = replace(config, adapter=AdapterConfig(lora_rank=2))
        with pytest.raises(UserError, match="adapters keep the rope_theta of their base"):
            about_context(weights, adapters)
    with pytest.raises(UserError, match="the weights have num_layers=3, this run asks for 5"):
        completed(parse(["--init-from", "x", "--num-layers", "5"]), weights, "x")


def test_a_part_of_the_architecture_in_a_file_is_given_and_the_whole_of_a_run_is_not(tmp_path):
    (tmp_path / "part.yaml").write_text("model: {rope_theta: 100000.0, max_seq_len: 8192}")
    (tmp_path / "whole.json").write_text(json.dumps(to_dict(Config())))
    assert parse(["--config", str(tmp_path / "part.yaml")]).run.own_context == ("rope_theta", "max_seq_len")
    assert parse(["--config", str(tmp_path / "whole.json")]).run.own_context == ()
    assert settings_of(Config(), {"rope_theta": 5.0}).run.own_context == ("rope_theta",)
