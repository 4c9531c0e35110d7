"""What may change between two starts of a run."""

from dataclasses import replace

import numpy as np
import pytest

from smollm_jax.checkpoint.manager import CheckpointManager
from smollm_jax.config.serialization import to_dict
from smollm_jax.config.settings import Config, RunConfig
from smollm_jax.runtime.errors import UserError
from smollm_jax.training.restore import check_settings, resolve_start


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


def test_a_smaller_batch_of_the_past_is_refused_and_of_the_future_is_not():
    saved = to_dict(replace(Config(), run=RunConfig(phases="20x8")))
    later = replace(Config(), run=RunConfig(phases="10x8,10x4"))
    assert "stay as they were" in check_settings(saved, later, 10)[0]
    with pytest.raises(ValueError, match=r"run\.phases was 20x8, is 10x8,10x4"):
        check_settings(saved, later, 11)


@pytest.mark.parametrize(
    "meta",
    [{"progress": {}}, {"progress": {"nix": 1}, "config": to_dict(Config())}, {"progress": 3, "config": {}}],
)
def test_a_checkpoint_without_settings_or_progress_is_damaged_in_one_line(tmp_path, meta):
    checkpoints = CheckpointManager(tmp_path / "checkpoints", keep_last=1, keep_every=0)
    checkpoints.save(3, {"params": {"w": np.ones(2)}}, meta)
    assert checkpoints.wait()
    with pytest.raises(UserError, match=r"checkpoint 3 is damaged: its meta\.json lacks"):
        resolve_start(Config(), tmp_path, checkpoints)
