"""The records of a run."""

import io
import json
import logging
import sys

from smollm_jax.runs.metrics import RunMetrics, keep_records


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
