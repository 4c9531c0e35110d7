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
