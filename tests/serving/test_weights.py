"""The weights of a served run: what a request may name, and what is loaded."""

import asyncio
import os

import pytest

from smollm_jax.runtime.errors import UserError
from smollm_jax.serving import weights as module
from smollm_jax.serving.claims import Claims
from smollm_jax.serving.limits import QueueFull
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


def test_weights_that_were_written_anew_are_loaded_anew(served, tmp_path):
    weights, _, loads = served
    (tmp_path / "export").mkdir()
    (tmp_path / "export/config.json").write_text("{}")
    key, _ = weights.take("export")
    os.utime(tmp_path / "export", (1, 1))
    assert weights.take("export") == ("export", "engine of None")  # in use: a request keeps its engine
    assert len(loads) == 1
    weights.give_back(key)
    weights.give_back(key)
    weights.take("export")
    assert len(loads) == 2


def test_the_newest_checkpoint_comes_though_all_engines_are_in_use(served):
    weights, times, _ = served
    for step in (1, 2, 3):
        times[step] = step
    weights._look()
    for choice in ("1", "2", "newest"):
        weights.take(choice)
    with pytest.raises(QueueFull, match="in use"):
        weights.take("3")
    times[20] = 9
    weights._look()
    assert weights.take("newest") == (20, "engine of 20")


def test_a_client_uses_one_old_checkpoint_at_a_time(served):
    weights, times, _ = served
    times[6] = 4
    weights._look()

    async def tries():
        claims = Claims(weights)
        async with claims.of("5", "a") as (key, _), claims.of("5", "a"), claims.of("newest", "a"):
            assert key == 5
            with pytest.raises(QueueFull, match="another checkpoint"):
                async with claims.of("6", "a"):
                    pass
            async with claims.of("6", "b") as (other, _):
                assert other == 6
        async with claims.of("6", "a"):
            pass
        assert not claims._claimed
        assert not +weights._users

    asyncio.run(tries())
