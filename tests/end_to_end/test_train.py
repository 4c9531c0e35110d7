"""Runs from end to end, as processes: what a person starts, stops, kills and starts again."""

import json
import random
import signal
import subprocess
import sys

import numpy as np
import pytest

from smollm_jax.checkpoint.manager import read_params
from smollm_jax.runs.replay import replay_step
from tests.support.paths import ROOT
from tests.support.runs import assert_same_run, ended, leaves, records, wait_for_step


def test_a_run_leaves_what_the_contract_names(train, tmp_path):
    out, err = ended(train("--steps", "6", "--eval-every", "3", "--checkpoint-every", "4"))
    run = tmp_path / "run"
    assert out.count("\n") == 1
    assert out.startswith("finished: step 6 of 6, ")
    names = "config.json metrics.jsonl tensorboard loss.png samples.txt tokenizer checkpoints export"
    for name in names.split():
        assert (run / name).exists(), name
    steps = [line["step"] for line in records(run) if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in records(run) if "eval_loss" in line] == [3, 6]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["4", "6"]
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    expected = {"step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second"}
    assert expected | {"data_wait_seconds", "step_seconds"} <= set(line)
    assert "starts      from fresh weights" in err


def test_exactly_n_updates_are_made_for_n_steps(train, tmp_path):
    ended(train("--steps", "5", "--no-export", "--eval-every", "0"))
    _, opt_state = read_params(tmp_path / "run" / "checkpoints", group="opt_state")
    assert [int(x) for x in leaves(opt_state) if np.ndim(x) == 0] == [5]
    assert [line["step"] for line in records(tmp_path / "run")] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(train, tmp_path):
    """Across phases and epochs: 120 documents last for about 15 steps."""
    settings = ["--phases", "30x4,10x2", "--checkpoint-every", "7", "--eval-every", "10", "--no-export"]
    ended(train(*settings, run="straight"))
    run, rng = tmp_path / "run", random.Random(1)
    for _ in range(3):
        process = train(*settings)
        target = (records(run)[-1]["step"] if (run / "metrics.jsonl").exists() else 0) + rng.randint(3, 9)
        wait_for_step(run, target, process)
        process.kill()
        process.wait()
    _, err = ended(train(*settings))
    assert "starts      from checkpoint" in err
    assert_same_run(tmp_path / "straight", run)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_next_start_goes_on_bit_for_bit(train, tmp_path, number):
    settings = ["--steps", "40", "--checkpoint-every", "100", "--eval-every", "20", "--no-export"]
    ended(train(*settings, run="straight"))
    run = tmp_path / "run"
    process = train(*settings)
    wait_for_step(run, 5, process)
    process.send_signal(number)
    out, err = ended(process, 75)
    assert out == ""
    assert "run the same command to go on" in err
    saved = int(max((run / "checkpoints").iterdir(), key=lambda path: int(path.name)).name)
    assert 5 <= saved < 40
    ended(train(*settings))
    assert_same_run(tmp_path / "straight", run)


@pytest.mark.slow
def test_a_signal_in_an_evaluation_saves_the_step_it_came_at(train, tmp_path):
    """The last evaluation too: the run is finished by the next start, held-out loss and all."""
    settings = ["--steps", "8", "--eval-every", "4", "--checkpoint-every", "100", "--sample-tokens", "600"]
    run = tmp_path / "run"
    for at in (4, 8):
        process = train(*settings)
        wait_for_step(run, at, process)
        process.send_signal(signal.SIGTERM)
        _, err = ended(process, 75)
        assert (
            ", saved; run the same command to go on" in err
        )  # by the loop, or by the thread that stands in for it
        assert max(int(path.name) for path in (run / "checkpoints").iterdir()) == at
        assert not (run / "export").exists()
    out, _ = ended(train(*settings))
    assert [line["step"] for line in records(run) if "eval_loss" in line] == [4, 8]
    assert "held-out loss" in out
    assert (run / "export").exists()


@pytest.mark.slow
def test_where_no_checkpoint_is_good_the_run_does_not_start_over_by_itself(train, tmp_path):
    settings = ["--steps", "4", "--checkpoint-every", "2", "--no-export", "--eval-every", "0"]
    ended(train(*settings))
    run = tmp_path / "run"
    before = (run / "metrics.jsonl").read_text()
    for folder in (run / "checkpoints").iterdir():
        (folder / "meta.json").write_text("{}")
    _, err = ended(train(*settings), 2)
    assert "holds no good checkpoint, only 2.bad, 4.bad" in err
    assert (run / "metrics.jsonl").read_text() == before
    ended(train(*settings, "--new-run"))


@pytest.mark.slow
def test_four_devices_train_like_one(train, tmp_path, monkeypatch):
    settings = [
        "--phases",
        "6x4,2x8",
        "--grad-accum",
        "1",
        "--checkpoint-every",
        "4",
        "--eval-every",
        "4",
        "--no-export",
    ]
    ended(train(*settings, run="one"))
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    _, err = ended(train(*settings, run="four"))
    assert "4 x cpu (cpu) of 4" in err
    for one, four in zip(records(tmp_path / "one"), records(tmp_path / "four"), strict=True):
        assert one.get("ledger") == four.get("ledger")
        for name in {"loss", "grad_norm", "eval_loss"} & set(one):
            assert one[name] == pytest.approx(four[name], rel=1e-4)
    ended(train(*settings, "--stop-after", "5", run="pieces"))
    ended(train(*settings, run="pieces"))
    assert_same_run(tmp_path / "four", tmp_path / "pieces")


@pytest.mark.slow
def test_bad_rows_are_skipped_and_counted_when_asked(train, tmp_path, corpus):
    lines = (corpus / "part-0.jsonl").read_text().splitlines()
    path = tmp_path / "broken.jsonl"
    path.write_text("\n".join([*lines, "{not json", *lines[:20]]) + "\n")
    settings = "--steps 60 --shuffle-window 4 --checkpoint-every 10 --no-export --eval-every 0".split()
    ended(train(*settings, data=str(path)), 2)
    _, err = ended(train(*settings, "--on-bad-data", "skip", data=str(path)))
    assert f"skipped: {path}, row 60, cannot be read" in err
    assert "starts      from checkpoint" in err
    assert records(tmp_path / "run")[-1]["skipped_documents"] >= 1


@pytest.mark.slow
def test_stop_after_leaves_the_schedule_alone(train, tmp_path):
    ended(train("--steps", "9", "--no-export", run="straight"))
    out, _ = ended(train("--steps", "9", "--no-export", "--stop-after", "4"))
    assert "step 4 of 9" in out
    ended(train("--steps", "9", "--no-export"))
    assert_same_run(tmp_path / "straight", tmp_path / "run")


@pytest.mark.slow
def test_a_folder_that_cannot_be_one_is_one_line(train, tmp_path):
    (tmp_path / "run").write_text("a file")
    _, err = ended(train("--steps", "5"), 2)
    assert err == f"error: --run-dir {tmp_path}/run cannot be used as a folder: File exists\n"


@pytest.mark.slow
def test_a_changed_setting_is_refused_by_name_and_a_harmless_one_is_not(train, tmp_path):
    ended(train("--steps", "4", "--schedule", "constant", "--no-export"))
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    again = ["--steps", "4", "--schedule", "constant", "--no-export"]
    _, err = ended(train(*again, "--learning-rate", "1e-3"), 2)
    assert err.startswith("error: ")
    assert "optimizer.learning_rate was 0.0006, is 0.001" in err
    assert err.count("\n") == 1
    _, err = ended(train(*again, "--seed", "3", "--weight-decay", "0.3"), 2)
    assert "run.seed was 0, is 3; " in err
    assert "optimizer.weight_decay was 0.01, is 0.3" in err
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    ended(train("--steps", "8", "--schedule", "constant", "--log-every", "2", "--no-export"))
    assert [x["step"] for x in records(tmp_path / "run") if "loss" in x] == [1, 2, 3, 4, 6, 8]
    _, err = ended(train("--steps", "8", "--schedule", "constant", "--seed", "3", "--new-run", "--no-export"))
    assert "moved the old run to" in err
    assert (tmp_path / "run.old1" / "checkpoints" / "8").is_dir()


@pytest.mark.slow
def test_data_that_ends_ends_the_run_with_everything_saved(train, tmp_path):
    out, _ = ended(train("--steps", "500", "--epochs", "1", "--eval-every", "100"))
    assert out.startswith("the data ended: step ")
    step = records(tmp_path / "run")[-1]["step"]
    assert (tmp_path / "run" / "checkpoints" / str(step)).is_dir()
    assert "held-out loss" in out
    assert (tmp_path / "run" / "export" / "model.safetensors").exists()


@pytest.mark.slow
def test_unreadable_data_costs_nothing_of_what_was_trained_before_it(train, tmp_path, corpus):
    lines = (corpus / "part-0.jsonl").read_text().splitlines()
    path = tmp_path / "broken.jsonl"
    path.write_text("\n".join([*lines, "{not json"]) + "\n")
    settings = "--steps 50 --shuffle-window 4 --checkpoint-every 100 --eval-every 0 --no-export".split()
    _, err = ended(train(*settings, data=str(path)), 2)
    assert err.rstrip().splitlines()[-1].startswith(f"error: {path}, row 60, cannot be read")
    saved = [int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()]
    assert saved == [records(tmp_path / "run")[-1]["step"]]
    path.write_text("\n".join([*lines, *lines]) + "\n")
    _, err = ended(train(*settings, data=str(path)), 2)
    assert "changed since the checkpoint" in err


@pytest.mark.slow
def test_weights_to_start_from_bring_architecture_and_tokenizer_along(train, tmp_path):
    ended(train("--steps", "6"))
    command = [
        sys.executable, str(ROOT / "train_jax.py"), "--data", f"{tmp_path}/more.jsonl", "--seq-len", "32",
        "--batch-size", "2", "--steps", "2", "--eval-documents", "0", "--no-export", "--compilation-cache-dir", "",
    ]  # fmt: skip
    texts = [{"text": "the old cat saw one red bird near our house " * 3}] * 20
    (tmp_path / "more.jsonl").write_text("\n".join(map(json.dumps, texts)))
    into = ["--run-dir", str(tmp_path / "more"), "--init-from", str(tmp_path / "run" / "export")]
    started = subprocess.run(
        [*command, *into, "--learning-rate", "1e-12"], capture_output=True, text=True, check=True
    )
    assert f"starts      from the weights of {tmp_path}/run/export" in started.stderr
    (_, before), (_, after) = (read_params(tmp_path / run / "checkpoints") for run in ("run", "more"))
    for x, y in zip(leaves(before), leaves(after), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-9)
    assert (tmp_path / "more/tokenizer/tokenizer.json").read_bytes() == (
        tmp_path / "run/tokenizer/tokenizer.json"
    ).read_bytes()
    again = subprocess.run(
        [*command, *into, "--learning-rate", "1e-12"], capture_output=True, text=True, check=True
    )
    assert "starts      from checkpoint 2" in again.stderr
    other = subprocess.run(
        [*command, *into, "--preset", "360M", "--new-run"], capture_output=True, text=True, check=False
    )
    assert other.returncode == 2
    assert "the weights have vocab_size=300, this run asks for 49152" in other.stderr


@pytest.mark.slow
def test_an_imported_run_goes_on_from_its_weights(train, tmp_path):
    ended(train("--steps", "6"))
    imported = tmp_path / "imported"
    module = [sys.executable, "-m", "smollm_jax", "import"]
    subprocess.run([*module, str(tmp_path / "run" / "export"), "--out", str(imported)], check=True, cwd=ROOT)
    _, err = ended(train("--steps", "1", "--warmup-steps", "0", "--learning-rate", "1e-12", run="imported"))
    assert f"starts      from the weights of {imported}" in err
    (_, before), (found, after) = (read_params(tmp_path / run / "checkpoints") for run in ("run", "imported"))
    assert found.step == 1
    for x, y in zip(leaves(before), leaves(after), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-9)


@pytest.mark.slow
def test_a_second_process_on_a_run_is_refused(train, tmp_path):
    first = train("--steps", "3000", "--no-export")
    wait_for_step(tmp_path / "run", 1, first)
    _, err = ended(train("--steps", "3000", "--no-export"), 2)
    assert f"is in use by process {first.pid}" in err
    first.kill()
    first.communicate()
    ended(train("--steps", "3000", "--stop-after", "1", "--no-export"))


@pytest.mark.slow
def test_numbers_that_go_wrong_stop_the_run_and_leave_the_documents_behind(train, tmp_path):
    settings = ["--steps", "30", "--learning-rate", "1e30", "--warmup-steps", "0", "--max-bad-steps", "4"]
    _, err = ended(train(*settings, "--checkpoint-every", "100", "--no-export", "--clip-norm", "1e9"), 1)
    run = tmp_path / "run"
    assert "loss or gradient not finite; the update is skipped" in err
    assert "stopped: 4 steps in a row without a finite gradient" in err
    assert "Traceback" not in err
    assert not (run / "checkpoints").exists()
    (written,) = run.glob("bad_step_*.jsonl")
    step = int(written.stem.rpartition("_")[2])
    documents = [json.loads(line) for line in written.read_text().splitlines()]
    assert documents == replay_step(run, step).documents
    assert all({"source", "file", "row", "text"} == set(document) for document in documents)
    shown = [line for line in records(run) if line["bad_steps"]]
    assert [line["bad_steps"] for line in shown] == list(range(1, len(shown) + 1))
    assert all(None in (line["loss"], line["grad_norm"]) for line in shown)


def test_nothing_is_compiled_twice(train, monkeypatch):
    """One program a batch size before the first step; a second evaluation and the second phase compile nothing."""
    monkeypatch.setenv("JAX_LOG_COMPILES", "1")
    settings = "--phases 6x4,4x2 --grad-accum 1 --eval-every 3 --checkpoint-every 4 --no-export".split()
    _, err = ended(train(*settings))
    first, later = err.split("held-out loss", 1)
    names = [words.split("(")[1].split(")")[0] for words in first.split("Compiling jit")[1:]]
    assert {name: names.count(name) for name in ("step", "create", "nll")} == {"step": 2, "create": 1, "nll": 1}
    assert "Compiling jit" not in later
