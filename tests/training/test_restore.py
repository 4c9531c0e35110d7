"""What may change between two starts of a run."""

from dataclasses import replace

import pytest

from smollm_jax.config.serialization import to_dict
from smollm_jax.config.settings import Config, OptimizerConfig, RunConfig
from smollm_jax.training.restore import check_settings


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


def test_a_batch_that_grows_is_compared_as_it_ran():
    """Also in a config written before: batch_size, of the longest phase, stands beside larger phases."""
    steady = replace(Config(), optimizer=OptimizerConfig(schedule="constant"))
    saved = to_dict(replace(steady, run=RunConfig(phases="3x2,2x4")))
    assert (saved["run"]["phases"], saved["run"]["batch_size"]) == ("3x2,2x4", 2)
    longer = replace(steady, run=RunConfig(phases="3x2,4x4"))
    assert "stay as they were" in check_settings(saved, longer, 5)[0]
    with pytest.raises(ValueError, match=r"run\.phases was 3x2,2x4, is 5x2"):
        check_settings(saved, replace(steady, run=RunConfig(phases="5x2")), 4)
