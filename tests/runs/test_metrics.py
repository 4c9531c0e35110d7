"""The records of a run."""

import io
import json
import logging
import os
import subprocess
import sys
from unittest.mock import Mock

import pytest

from smollm_jax.runs.metrics import RunMetrics, keep_records, plot


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
    assert keep_records(tmp_path, 1)[0] == 0
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


@pytest.mark.parametrize("name", ["run", "lr$\\x$"])
def test_a_curve_is_drawn_whatever_a_notebook_left_behind(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n')
    program = (
        "import sys, pathlib; from smollm_jax.runs.metrics import plot; assert plot(pathlib.Path(sys.argv[1]))"
    )
    variables = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "MPLCONFIGDIR": "/proc/nowhere"}
    command = [sys.executable, "-c", program, str(folder)]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (folder / "loss.png").stat().st_size > 1_000


@pytest.mark.parametrize(
    "error", [ValueError("no such backend"), OSError(28, "No space left"), ImportError("PIL")]
)
def test_no_run_ends_for_a_picture(tmp_path, monkeypatch, capsys, error):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", Mock(side_effect=error))
    assert plot(tmp_path) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"loss.png could not be drawn: {type(error).__name__}")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
