"""The weights of a served run: what a request may name, and what is loaded."""

import pytest

from smollm_jax.runtime.errors import UserError
from smollm_jax.serving import weights as module
from smollm_jax.serving.weights import Weights


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Weights of a run with checkpoints 5 and 10, whose loads are listed."""
    times, loads = {5: 1, 10: 2}, []

    def load(run, step=None):
        loads.append((run.name, step))
        if step == 15:
            raise UserError("checkpoint 15 has another width")
        return None, step, None

    monkeypatch.setattr(module, "LOOK_SECONDS", 60)
    monkeypatch.setattr(module, "checkpoint_times", lambda _: dict(times))
    monkeypatch.setattr(module, "is_good", lambda _, step: step != 7)
    monkeypatch.setattr(module, "load_model", load)
    made = Weights("engine", run=tmp_path, step=10, rebuild=lambda _, params: f"engine of {params}")
    made._look()
    yield made, times, loads
    made.close()


@pytest.mark.parametrize("choice", ["7", "999999", "export"])
def test_weights_that_are_not_there_are_refused_before_anything_is_loaded_or_forgotten(served, choice):
    weights, times, loads = served
    times[7] = 3
    weights._look()
    with pytest.raises(UserError, match=r"no good checkpoint of step|no export yet"):
        weights.take(choice)
    assert loads == []
    assert weights.take("newest") == (10, "engine")


def test_an_older_checkpoint_is_loaded_once(served):
    weights, _, loads = served
    assert [weights.take("5"), weights.take("5")] == [(5, "engine of 5")] * 2
    assert [step for _, step in loads] == [5]


def test_a_newest_checkpoint_that_cannot_be_loaded_is_tried_once_until_it_changes(served):
    weights, times, loads = served
    times[15] = 4
    with pytest.raises(UserError, match="another width"):
        weights._look()
    weights._look()
    assert [step for _, step in loads] == [15]
    assert weights.newest == 10
    times[15] = 5
    with pytest.raises(UserError, match="another width"):
        weights._look()
    times[20] = 6
    weights._look()
    assert weights.newest == 20
