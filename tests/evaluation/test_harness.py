"""Our scores are those of lm-evaluation-harness's own model class for transformers, on the same folder in float32.

SMOLLM_TEST_GGUF_FOLDER, a folder with the weights of SmolLM2-135M-Instruct, adds the real model.
"""

import json
import os
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from smollm_jax.cli.main import command
from smollm_jax.evaluation.scorer import Scorer
from smollm_jax.evaluation.tasks import load_tasks, run_tasks
from smollm_jax.generation.generator import Generator
from smollm_jax.hf.export import export_folder
from smollm_jax.model.transformer import SmolLM
from smollm_jax.runs.load import load_model
from smollm_jax.runtime.errors import UserError
from tests.support.gguf_files import WIDE
from tests.support.harness_tasks import make_tasks
from tests.support.hf_folders import numpy_params
from tests.support.texts import chat_tokenizer

catalogue = pytest.importorskip("lm_eval.tasks", reason="lm_eval is not installed; pip install 'smollm-jax[eval]'")
harness = pytest.importorskip("smollm_jax.evaluation.harness")
REAL = os.environ.get("SMOLLM_TEST_GGUF_FOLDER", "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    tokenizer = chat_tokenizer()
    tokenizer.save(place / "tokenizer")
    model = replace(
        WIDE, vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_id, bos_token_id=tokenizer.eos_id
    )
    export_folder(numpy_params(model), model, place / "hf", tokenizer_folder=place / "tokenizer", verify=False)
    return place / "hf"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Questions longer than the context of 96 tokens are among them."""
    return make_tasks(tmp_path_factory.mktemp("tasks"), longest=40)


def results_of(model, files, **options):
    """Scores and the log-likelihoods, flags and texts of every request, by task."""
    found = run_tasks(tasks := load_tasks(files, options.pop("num_fewshot", None)), model, **options)
    answers = {
        name: [answer for instance in task.instances for answer in instance.resps]
        for name, task in tasks["tasks"].items()
    }
    return found["results"], answers


def theirs(folder):
    """The harness's own model in float32."""
    pytest.importorskip("accelerate")
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    return huggingface.HFLM(str(folder), device="cpu", dtype="float32", batch_size=8)


def ours(folder):
    config, params, tokenizer = load_model(folder)
    generator = cache(lambda: Generator(SmolLM.from_params(config, jax.tree.map(jnp.asarray, params))))
    scorer = Scorer(config, jnp.dtype("float32"))
    return harness.HarnessModel(config, tokenizer, scorer=scorer, params=params, generator=generator)


def assert_same_answers(own, other):
    (results, answers), (results_b, answers_b) = own, other
    assert answers.keys() == answers_b.keys()
    for task in answers:
        assert len(answers[task]) == len(answers_b[task]) > 0
        for a, b in zip(answers[task], answers_b[task], strict=True):
            if isinstance(a, tuple):
                assert a[0] == pytest.approx(b[0], abs=1e-3), task
                assert a[1] == b[1], task
            else:
                assert a == (b if isinstance(b, str) else pytest.approx(b, abs=1e-3)), task
    for task, values in results.items():
        for name, value in values.items():
            near = isinstance(value, float) and "acc" not in name
            assert value == (pytest.approx(results_b[task][name], rel=1e-5) if near else results_b[task][name])


def test_scores_are_those_of_the_harness_for_transformers(folder, tasks):
    assert_same_answers(results_of(ours(folder), tasks), results_of(theirs(folder), tasks))


def test_few_shots_and_chat_template_as_in_the_harness(folder, tasks):
    files = ",".join(file for file in tasks.split(",") if "quiz" in file or "story" in file)
    options = {"num_fewshot": 2, "chat": True, "limit": 5}
    own, other = (results_of(model, files, **options) for model in (ours(folder), theirs(folder)))
    assert_same_answers(own, other)


@pytest.mark.skipif(not REAL, reason="SMOLLM_TEST_GGUF_FOLDER is not set")
@pytest.mark.slow
def test_scores_of_the_real_model_are_those_of_the_harness(tmp_path):
    words = (Path(os.environ["SMOLLM_TEST_DATA"]) / "text" / "wikitext2_test.txt").read_text().split()
    files = make_tasks(tmp_path / "tasks", docs=8, words=words[:3_000])
    assert_same_answers(results_of(ours(REAL), files), results_of(theirs(REAL), files))


def test_the_last_message_of_a_conversation_is_continued_as_in_transformers(folder):
    own, other = ours(folder), theirs(folder)
    talk = [{"role": "user", "content": "a model"}, {"role": "assistant", "content": "reads "}]
    for prompt in (True, False):
        assert own.apply_chat_template(talk, prompt) == other.apply_chat_template(talk, prompt)
    assert own.prefix_token_id == other.prefix_token_id
    assert own.max_length == other.max_length
    for text in ("the model", "<|im_start|>user\nthe", ""):
        assert own.tok_encode(text) == other.tok_encode(text)


def test_a_continuation_that_the_harness_refuses_has_no_score(folder):
    model = ours(folder)
    with pytest.raises(UserError, match="a continuation without a token of its own"):
        model._score([([1], [])])
    with pytest.raises(UserError, match="a continuation of 97 tokens; the model reads 96"):
        model._score([([1], [5] * 97)])
    (longest,) = model._score([([1], [5] * 96)])
    assert longest[0] < 0
    assert model._score([([], [5])]) == model._score([([model.prefix_token_id], [5])])


def test_greedy_text_has_the_penalty_and_special_tokens_stop_it(folder):
    model = ours(folder)
    given = {"do_sample": False, "repetition_penalty": 1.2, "until": ["<|im_end|>"], "num_beams": 1}
    sampling, stop = model._choices(given)
    assert (sampling.temperature, sampling.repetition_penalty) == (0, 1.2)
    assert load_model(folder)[2].special_tokens["<|im_end|>"] in sampling.stop_ids
    assert stop == ["<|im_end|>"]
    with pytest.raises(UserError, match="num_beams is not supported"):
        model._choices(given | {"num_beams": 4})


def test_examples_that_a_task_does_not_take_are_said_to_be_left_out(tmp_path, tasks, capsys):
    quiz = Path(tasks.split(",")[0])
    fixed = tmp_path / "fixed.yaml"
    fixed.write_text(quiz.read_text().replace("task: quiz", "task: fixed") + "\nnum_fewshot: 0\n")
    load_tasks(f"{fixed},{quiz}", 2)
    assert "--num-fewshot 2 changes nothing for fixed: these fix 0" in capsys.readouterr().err


def test_a_place_that_takes_no_results_is_told_before_the_scoring(tmp_path, folder, tasks, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("smollm_jax.evaluation.report.run_tasks", lambda *_, **__: pytest.fail("scored"))
    asked = [str(folder), "--tasks", tasks.split(",")[0], "--output", str(tmp_path / "file")]
    with pytest.raises(OSError, match="file"):
        command("evaluate", asked, "smollm")


def test_the_command_prints_a_table_and_json_and_writes_results(tmp_path, folder, tasks, capsys):
    quiz = tasks.split(",")[0]
    command("evaluate", [str(folder), "--tasks", quiz, "--limit", "4", "--output", str(tmp_path)], "smollm")
    out = capsys.readouterr().out.splitlines()
    scores = json.loads(out[-1])["scores"]
    assert set(scores) == {f"quiz/{metric}{end}" for metric in ("acc", "acc_norm") for end in ("", "_stderr")}
    table = "\n".join(out[:-1])
    shown = next(line.split("|") for line in table.splitlines() if "|acc " in line)
    assert float(shown[7]) == pytest.approx(scores["quiz/acc"], abs=1e-4)
    assert float(shown[9]) == pytest.approx(scores["quiz/acc_stderr"], abs=1e-4)
    (file,) = tmp_path.glob("results_*.json")
    written = json.loads(file.read_text())
    assert written["results"]["quiz"]["acc,none"] == scores["quiz/acc"]
    assert written["config"]["limit"] == written["n-samples"]["quiz"]["effective"] == 4


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tasks", "helaswag_of_nobody"], "lm_eval has no task 'helaswag_of_nobody'"),
        (["--tasks", "missing.yaml"], "there is no task file missing.yaml"),
        (["--tasks", ","], "expected names of lm_eval or YAML files"),
        (["--tasks", "quiz", "--seq-len", "3"], "--seq-len belongs to --data"),
        (["--data", "x.txt", "--limit", "3"], "--limit belongs to --tasks"),
        (["--tasks", "quiz", "--limit", "0"], "--limit 0 must be at least 1"),
        ([], "give --data SOURCE or --tasks NAMES, and not both"),
        (["--tasks", "quiz", "--data", "x.txt"], "and not both"),
    ],
)
def test_a_mistake_is_told_in_a_line(folder, flags, words, monkeypatch):
    manager = catalogue.TaskManager  # the index of all tasks takes seconds
    few = lambda **options: manager(**options | {"include_defaults": False})  # noqa: E731
    monkeypatch.setattr("lm_eval.tasks.TaskManager", few)
    with pytest.raises(UserError, match=words):
        command("evaluate", [str(folder), *flags], "smollm")


def test_a_mistake_in_a_task_is_told_in_a_line(folder, tasks, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "a"}\n')
    file = tmp_path / "wrong.yaml"
    file.write_text(
        f"task: wrong\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{question}}"\n'
        'doc_to_choice: "{{[question, answers]}}"\ndoc_to_target: 0\n'
    )
    with pytest.raises(UserError, match=r"wrong.yaml could not be loaded: ValueError"):
        command("evaluate", [str(folder), "--tasks", str(file), "--output", str(tmp_path)], "smollm")
    flags = ["--tasks", tasks.split(",")[0], "--num-fewshot", "50"]
    with pytest.raises(UserError, match=r"quiz.yaml failed in lm_eval: ValueError: Sample larger"):
        command("evaluate", [str(folder), *flags, "--output", str(tmp_path)], "smollm")


def test_without_the_extra_a_line_says_how_to_install_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(UserError, match=r"need lm_eval: pip install .*eval"):
        command("evaluate", [str(folder), "--tasks", "quiz"], "smollm")
