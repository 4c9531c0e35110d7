"""Facts about a run on its page."""

import json
from dataclasses import replace

from smollm_jax.config.recipes import QUESTIONS
from smollm_jax.config.serialization import to_dict
from smollm_jax.config.settings import Config, RunConfig
from smollm_jax.serving.facts import OPENINGS, Facts


def run_of(folder, steps):
    config = replace(Config(), run=RunConfig(steps=steps, sample_prompts=()))
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    return config


def test_a_run_that_is_extended_is_followed_to_its_new_end(tmp_path):
    config = run_of(tmp_path, 60)
    (tmp_path / "metrics.jsonl").write_text('{"step": 60, "loss": 2.5}\n')
    facts = Facts(run=tmp_path, config=config, step=60, follows=True)
    assert facts.live() == ""
    run_of(tmp_path, 120)
    assert "step 60 of 120 · loss 2.500" in facts.live()
    assert "step 60 of 120" in facts.html()
    (tmp_path / "config.json").write_text("{")  # as it is being written
    assert facts.live() == ""


def test_a_run_without_prompts_has_the_openings_of_any_model(tmp_path):
    assert Facts(run=tmp_path, config=run_of(tmp_path, 60)).openings == OPENINGS


def test_a_chat_model_has_the_questions_of_its_run_and_a_base_model_those_of_any(tmp_path):
    base = Facts(run=tmp_path, config=run_of(tmp_path, 60))
    data = replace(base.config.data, data_kind="chat")
    run = replace(base.config.run, sample_prompts=("What does zip do?",))
    assert Facts(run=tmp_path, config=replace(base.config, data=data, run=run)).questions == ("What does zip do?",)
    assert base.questions == Facts().questions == QUESTIONS
