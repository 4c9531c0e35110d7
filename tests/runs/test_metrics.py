"""The records of a run."""

import json

from smollm_jax.runs.metrics import keep_records


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
    records = keep_records(tmp_path, 2)
    assert records.evaluated == 2
    assert records.ledgers == {1: "a", 2: "b", 3: "c"}
    assert [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()] == lines[:3]
    assert (tmp_path / "samples.txt").read_text() == "=== step 2\n  a\n  === step 9\n"
    assert keep_records(tmp_path, 1).evaluated == 0
    assert (tmp_path / "samples.txt").read_text() == ""
