"""What may change between two starts of a run."""

from dataclasses import replace

import pytest

from smollm_jax.config.serialization import to_dict
from smollm_jax.config.settings import Config, RunConfig
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


def test_a_run_older_than_a_setting_goes_on_with_its_default_and_not_with_another():
    config, saved = Config(), to_dict(Config())
    del saved["data"]["special_tokens"], saved["model"]["extra_eos_token_ids"]
    assert check_settings(saved, config, 10) == []
    parsing = replace(config, data=replace(config.data, special_tokens="parse"))
    with pytest.raises(ValueError, match=r"data\.special_tokens was text, is parse"):
        check_settings(saved, parsing, 10)
