"""A run is scored on tasks at its evaluations and by the command, and its records and card hold the scores."""

import json

import numpy as np
import pytest

from smollm_jax.checkpoint.manager import read_params
from smollm_jax.cli.arguments import parse
from smollm_jax.cli.main import command
from smollm_jax.config.serialization import from_dict
from smollm_jax.runs.about import _scores
from smollm_jax.runs.convert import export_run
from smollm_jax.runs.plot import plot
from smollm_jax.runs.records import read_metrics, scores_in
from smollm_jax.runtime.errors import UserError, run_main
from smollm_jax.runtime.files import read_json
from smollm_jax.runtime.signals import StopRequest
from smollm_jax.training.fit import fit
from tests.support.harness_tasks import make_tasks
from tests.support.runs import TINY, leaves, records

pytest.importorskip("lm_eval", reason="lm_eval is not installed; pip install 'smollm-jax[eval]'")
pytestmark = pytest.mark.usefixtures("settings_restored")
FLAGS = [*TINY, "--steps", "4", "--eval-every", "2", "--no-export", "--checkpoint-every", "2", "--mesh", "data=1"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    files = make_tasks(tmp_path_factory.mktemp("tasks"), docs=8, longest=2).split(",")
    return ",".join(file for file in files if "quiz" in file or "story" in file)


@pytest.fixture(scope="module")
def start(tmp_path_factory, corpus, tokenizer, cache):
    folder = tmp_path_factory.mktemp("runs")

    def start(name, *flags):
        where = ["--data", f"{corpus}/*.jsonl", "--tokenizer", str(tokenizer), "--run-dir", str(folder / name)]
        cached = ["--compilation-cache-dir", str(cache)]
        return folder / name, run_main(lambda: fit(parse([*where, *FLAGS, *cached, *flags]), StopRequest()))

    return start


@pytest.fixture(scope="module")
def run(start, tasks):
    folder, code = start("run", "--eval-tasks", tasks, "--eval-task-limit", "6")
    assert code == 0
    return folder


def test_each_evaluation_has_the_scores_and_they_are_those_of_the_command(run, tasks, capsys):
    lines = [line for line in read_metrics(run) if "eval_loss" in line]
    assert [line["step"] for line in lines] == [2, 4]
    names = {"quiz/acc", "quiz/acc_norm", "quiz/acc_stderr", "quiz/acc_norm_stderr"}
    assert all(names < set(scores_in(line)) for line in lines)
    assert lines[0]["tasks/quiz/acc_stderr"] != 0, "six documents, not all alike"
    command("evaluate", [str(run), "--tasks", tasks, "--limit", "6"], "smollm")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["step"] == 4
    assert found["scores"] == scores_in(lines[1])
    assert len(list((run / "scores").glob("results_*.json"))) == 1
    assert scores_in(read_metrics(run)[-1]) == found["scores"]


def test_the_card_names_the_scores_of_its_own_checkpoint(run, tmp_path):
    for step in (2, 4):
        export_run(run, tmp_path / str(step), step=step, verify=False)
        card = (tmp_path / str(step) / "README.md").read_text()
        line = next(line for line in read_metrics(run) if line["step"] == step and "eval_loss" in line)
        score, error = line["tasks/quiz/acc"], line["tasks/quiz/acc_stderr"]
        assert f"| Score quiz/acc | `{score:.4f} ± {error:.4f} (6 documents)` |" in card
    shots = {"step": 4, "tasks/quiz/acc": 0.5, "task_limit": None, "task_shots": 0}
    assert _scores([{"step": 2, "tasks/quiz/acc": 0.1}, shots], 4) == {"quiz/acc": (0.5, "0.5000 (0-shot)")}


@pytest.mark.slow
def test_a_resumed_run_has_the_same_scores_and_tasks_change_no_loss(run, start, tasks):
    flags = ["--eval-tasks", tasks, "--eval-task-limit", "6"]
    assert start("stopped", *flags, "--stop-after", "3")[1] == 0
    folder, code = start("stopped", *flags)
    assert code == 0
    without, code = start("without")
    assert code == 0
    own = [line for line in records(run) if "ledger" in line or "eval_loss" in line]
    assert [line for line in records(folder) if "ledger" in line or "eval_loss" in line] == own
    assert records(without) == [{k: v for k, v in line.items() if not k.startswith("task")} for line in own]
    for group in ("params", "opt_state"):
        one, other, third = (
            leaves(read_params(path / "checkpoints", group=group)[1]) for path in (run, folder, without)
        )
        for a, b, c in zip(one, other, third, strict=True):
            np.testing.assert_array_equal(a, b)
            np.testing.assert_array_equal(a, c)


@pytest.mark.release
def test_adapters_are_scored_with_their_base(run, start, tasks, capsys):
    flags = ["--init-from", str(run), "--lora-rank", "2", "--learning-rate", "0.05", "--eval-tasks", tasks]
    folder, code = start("adapters", *flags, "--eval-task-limit", "6")
    assert code == 0
    line = next(line for line in read_metrics(folder) if "eval_loss" in line and line["step"] == 4)
    capsys.readouterr()
    command("evaluate", [str(folder), "--tasks", tasks, "--limit", "6"], "smollm")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["scores"] == scores_in(line)


def test_the_settings_are_kept_and_checked(run, tasks):
    config = from_dict(read_json(run / "config.json"))
    assert (config.run.eval_tasks, config.run.eval_task_limit) == (tasks, 6)
    with pytest.raises(UserError, match="eval_tasks need evaluations: eval_every above 0"):
        parse(["--eval-tasks", "hellaswag", "--eval-every", "0"])


def test_an_unknown_task_ends_the_start_in_a_line(start, capsys):
    assert start("mistake", "--eval-tasks", "missing.yaml")[1] == 2
    assert "error: there is no task file missing.yaml" in capsys.readouterr().err


def test_a_task_that_fails_is_told_once_and_the_run_goes_on(start, tasks, monkeypatch, capsys):
    def broken(*_, **__):
        raise KeyError("answer")

    monkeypatch.setattr("smollm_jax.training.tasks.run_tasks", broken)
    folder, code = start("broken", "--eval-tasks", tasks)
    assert code == 0
    assert capsys.readouterr().err.count("--eval-tasks failed and are left out from here: KeyError: 'answer'") == 1
    assert [line["step"] for line in read_metrics(folder) if "eval_loss" in line] == [2, 4]


def test_tensorboard_and_the_picture_show_the_scores(run, tmp_path):
    events = b"".join(path.read_bytes() for path in (run / "tensorboard").iterdir())
    assert events.count(b"tasks/quiz/acc_norm_stderr") == 2, "one for each evaluation"
    labels = []

    def seen(self, *_, **__):
        labels.extend(text.get_text() for axes in self.axes for legend in [axes.get_legend()] if legend
                      for text in legend.get_texts())  # fmt: skip

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", lambda self, part, **_: (seen(self), part.touch()))
        assert plot(run, tmp_path / "loss.png")
    assert labels == ["training", "training, running mean", "held out", "quiz/acc_norm", "story/exact_match"]
