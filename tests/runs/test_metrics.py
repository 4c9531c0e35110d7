"""The records of a run."""

import io
import json
import logging
import os
import subprocess
import sys
from unittest.mock import Mock

import pytest

from smollm_jax.runs.metrics import RunMetrics, duration
from smollm_jax.runs.plot import draw
from smollm_jax.runs.records import keep_records, read_metrics


def test_records_are_cut_back_to_the_checkpoint(tmp_path):
    lines = [
        {"step": 1, "loss": 3.0, "ledger": "a"},
        {"step": 2, "loss": 2.0, "ledger": "b"},
        {"step": 2, "eval_loss": 2.5},
        {"step": 3, "loss": 1.0, "ledger": "c"},
    ]
    text = "\n".join(json.dumps(line) for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '\n{"step": 4, "lo')
    (tmp_path / "samples.txt").write_text("=== step 2\n  a\n  === step 9\n=== step 4\n  b\n")
    evaluated, ledgers = keep_records(tmp_path, 2)
    assert evaluated == 2
    assert ledgers == {1: "a", 2: "b", 3: "c"}
    assert [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()] == lines[:3]
    assert (tmp_path / "samples.txt").read_text() == "=== step 2\n  a\n  === step 9\n"
    assert keep_records(tmp_path, 1)[0] == -1
    assert (tmp_path / "samples.txt").read_text() == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_warning_is_written_around_the_progress_bar(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stderr", Terminal())
    handlers = list(logging.root.handlers)
    report = RunMetrics(tmp_path, start=0, total=10)
    report.progress(3)
    logging.getLogger("smollm_jax.data.loader").warning("waiting for %s", "the Hub")
    report.say("step 3")
    shown = sys.stderr.getvalue()
    report.close()
    assert "\rwaiting for the Hub\n" in shown.replace("\x1b[A", "")
    assert "step 3\n" in shown
    assert "3/10" in shown
    assert logging.root.handlers == handlers


DAMAGED = [b"\xff\xfe", b"[3]", b"7", b"null", b'{"loss": 2}', b'{"step": "x"}', b'{"step": true, "loss": 1}',
           b"[" * 9_000, b'{"step": 3, "loss": "x"}', b'{"step": 3, "eval_loss": [], "eval_bits_per_byte": 1}',
           b'{"step": -1}', b'{"step": 3, "bad_steps": {}}', b'{"step": 1e999}', b'{"step": 3, "loss": 1e999}',
           b'{"step": 1' + b"0" * 400 + b', "loss": "', b"\0"]  # fmt: skip


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_record_is_left_out_and_ends_nothing(tmp_path, line):
    whole = b'{"step": 1, "loss": 3.0}'
    (tmp_path / "metrics.jsonl").write_bytes(
        whole + b"\n" + line + b"\n" + whole.replace(b"1", b"2") + b"\n" + line
    )
    (tmp_path / "samples.txt").write_bytes(b"=== step 0\n \xff\n" + line)
    assert [x["step"] for x in read_metrics(tmp_path)] == [1, 2]
    assert draw(tmp_path, tmp_path / "loss.png")
    keep_records(tmp_path, 2)
    assert [json.loads(x)["step"] for x in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_a_sample_moves_no_cursor_above_the_progress_bar(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    report = RunMetrics(tmp_path, start=0, total=9)
    report._bar = Mock()
    report.say("Once\x1b[2J")
    assert report._bar.write.call_args.args == ("Once\\x1b[2J",)


def test_a_heading_of_many_digits_ends_nothing(tmp_path):
    (tmp_path / "samples.txt").write_text(f"=== step {'9' * 5_000}\n a\n")
    assert keep_records(tmp_path, 2) == (-1, {})


def test_a_pipe_is_no_record(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    os.mkfifo(tmp_path / "samples.txt")
    assert read_metrics(tmp_path) == []
    assert keep_records(tmp_path, 2) == (-1, {})


LINE = {"step": 3, "loss": 2.0, "tokens_per_second": 5.0, "learning_rate": 1e-3, "grad_norm": 1.0}
EVALUATION = {"step": 3, "eval_loss": 2.0, "eval_bits_per_byte": 1.0, "eval_tokens": 9}


@pytest.mark.parametrize("name", ["loss.png", "tensorboard", "samples.txt", "metrics.jsonl"])
@pytest.mark.parametrize("instead", ["a folder", "a file", "a pipe"])
def test_output_that_cannot_be_written_ends_no_run(tmp_path, name, instead, capsys):
    path = tmp_path / name
    {"a folder": path.mkdir, "a file": path.touch, "a pipe": lambda: os.mkfifo(path)}[instead]()
    report = RunMetrics(tmp_path, start=0, total=9)
    report.train(LINE)
    report.evaluation(EVALUATION, [("The", " cat"), ("The", "\ud800")])
    report.close()
    fits = instead == ("a folder" if name == "tensorboard" else "a file")
    assert fits or name == "loss.png" or name in capsys.readouterr().err or name == "tensorboard"
    if name != "metrics.jsonl":
        assert [x["step"] for x in read_metrics(tmp_path)] == [3, 3]


@pytest.mark.parametrize("module", ["tensorboardX.summary", "tensorboardX.proto.event_pb2"])
def test_a_broken_tensorboard_ends_no_run(tmp_path, monkeypatch, capsys, module):
    monkeypatch.setitem(sys.modules, module, None)
    report = RunMetrics(tmp_path, start=0, total=9)
    report.train(LINE)
    report.evaluation(EVALUATION, [("The", " cat")])
    report.close()
    assert "TensorBoard gets no more of this run" in capsys.readouterr().err
    assert [x["step"] for x in read_metrics(tmp_path)] == [3, 3]


@pytest.mark.parametrize("name", ["run", r"lr$\x_{$"])
def test_a_curve_is_drawn_whatever_a_notebook_left_behind(tmp_path, name):
    """Its backend is not installed here, and a title is no formula."""
    folder = tmp_path / name
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(json.dumps(LINE) + "\n")
    program = (
        "import sys; from pathlib import Path; from smollm_jax.runs.plot import draw\n"
        "assert all(draw(Path(sys.argv[1]), Path(sys.argv[1], 'loss.png')) for _ in range(2))"
    )
    variables = {"MPLBACKEND": "module://not_installed_here", "MPLCONFIGDIR": "/proc/nowhere"}
    environment = os.environ | variables | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (folder / "loss.png").stat().st_size > 1_000


@pytest.mark.parametrize(
    "error", [ValueError("no such backend"), OSError(28, "No space left"), ImportError("PIL")]
)
def test_no_run_ends_for_a_picture(tmp_path, monkeypatch, capsys, error):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", Mock(side_effect=error))
    assert not draw(tmp_path, tmp_path / "loss.png")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path}/loss.png could not be drawn: {type(error).__name__}")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "2 seconds"), (40, "40 seconds"), (200, "3 minutes"), (9_000, "2 hours"), (1_700_000, "20 days")],
)
def test_a_duration_is_said_as_people_say_it(seconds, words):
    assert duration(seconds) == f"about {words}"


def test_the_first_steps_tell_how_long_the_others_take(tmp_path, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    report = RunMetrics(tmp_path, start=0, total=1_000)
    for step in range(1, 9):
        now[0] += 100 if step == 1 else 6  # the first is slower than the others
        report.progress(step)
    assert capsys.readouterr().err == "time        about 100 minutes left, by the first 3 steps\n"


def test_tensorboard_groups_its_tags_and_shows_samples_as_they_are(tmp_path):
    report = RunMetrics(tmp_path, start=0, total=9)
    report.train(LINE | {"step_loss": None, "mfu": 0.5, "ledger": "x", "time": 1.0})
    report.evaluation(EVALUATION, [("A class", " is** a\n# string")])
    report.close()
    events = (tmp_path / "tensorboard").iterdir()
    raw = b"".join(path.read_bytes() for path in events)
    for tag in (
        "train/loss",
        "eval/loss",
        "eval/bits_per_byte",
        "optimizer/learning_rate",
        "speed/tokens_per_second",
    ):
        assert tag.encode() in raw
    assert b"eval_loss" not in raw
    assert b"    A class\xe2\x9f\xb6 is** a\n    # string\n" in raw
