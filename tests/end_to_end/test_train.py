"""Runs from end to end: what a user starts, stops, kills and starts again."""

import json
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest

from smollm_jax.checkpoint.manager import read_params
from smollm_jax.cli.arguments import parse
from smollm_jax.runs.convert import import_run
from smollm_jax.runs.replay import replay_step
from smollm_jax.runtime.errors import run_main
from smollm_jax.runtime.signals import StopRequest
from smollm_jax.training.fit import fit
from tests.support.paths import ROOT
from tests.support.runs import TINY, assert_same_run, ended, leaves, records, wait_for_step

pytestmark = pytest.mark.usefixtures("settings_restored")
SHORT = "--steps 6 --eval-every 3 --checkpoint-every 4 --sample-tokens 4".split()


def flags_of(run_dir, cache, corpus, tokenizer, data=None):
    """Of a tiny run on one of the devices there are."""
    flags = ["--mesh", "data=1"]
    flags += [
        "--data",
        data or f"{corpus}/*.jsonl",
        *TINY,
        "--tokenizer",
        str(tokenizer),
        "--run-dir",
        str(run_dir),
    ]
    return [*flags, "--compilation-cache-dir", str(cache)]


@pytest.fixture
def fitted(tmp_path, cache, corpus, tokenizer, capfd):
    """Trains in this process until the run ends with exit code `code`; stdout and stderr."""

    def start(*flags, run="run", data=None, code=0, bare=False):
        given = ["--mesh", "data=1"] if bare else flags_of(tmp_path / run, cache, corpus, tokenizer, data)
        given += flags
        found = run_main(lambda: fit(parse(given), StopRequest()))
        out, err = capfd.readouterr()
        assert found == code, err
        return out, err

    return start


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache, corpus, tokenizer):
    """The folder of a run of six steps by the command, and what the command wrote; not to be changed."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    command = [sys.executable, str(ROOT / "train_jax.py"), *flags_of(run_dir, cache, corpus, tokenizer), *SHORT]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr
    return run_dir, done.stdout, done.stderr


@pytest.fixture(scope="module")
def finished_run(finished):
    return finished[0]


def test_the_command_prints_one_line_of_result(finished):
    _, out, err = finished
    assert out.count("\n") == 1
    assert out.startswith("finished: step 6 of 6, ")
    assert "starts      from fresh weights" in err


def test_a_run_leaves_what_the_contract_names(finished_run):
    names = "config.json metrics.jsonl tensorboard loss.png samples.txt tokenizer checkpoints export"
    for name in names.split():
        assert (finished_run / name).exists(), name
    steps = [line["step"] for line in records(finished_run) if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in records(finished_run) if "eval_loss" in line] == [3, 6]
    assert sorted(path.name for path in (finished_run / "checkpoints").iterdir()) == ["4", "6"]
    line = json.loads((finished_run / "metrics.jsonl").read_text().splitlines()[0])
    expected = {"step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second"}
    assert expected | {"data_wait_seconds", "step_seconds"} <= set(line)


def test_exactly_n_updates_are_made_for_n_steps(finished_run):
    _, opt_state = read_params(finished_run / "checkpoints", group="opt_state")
    assert [int(x) for x in leaves(opt_state) if np.ndim(x) == 0] == [6]


@pytest.mark.slow
@pytest.mark.release  # as the stops at random moments in test_nothing_lost.py
def test_a_killed_run_goes_on_bit_for_bit(train, tmp_path):
    """Across phases and epochs: 120 documents last for about 15 steps."""
    settings = "--phases 30x4,10x2 --checkpoint-every 7 --eval-every 10 --sample-tokens 4 --no-export".split()
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
@pytest.mark.release  # the test above kills, the one below resumes with a loss scale
def test_a_killed_run_in_float16_goes_on_bit_for_bit(train, tmp_path):
    settings = "--phases 20x4 --dtype float16 --checkpoint-every 7 --eval-every 10 --sample-tokens 4".split()
    ended(train(*settings, run="straight"))
    process = train(*settings)
    wait_for_step(tmp_path / "run", 12, process)
    process.kill()
    process.wait()
    _, err = ended(train(*settings))
    assert "starts      from checkpoint" in err
    assert_same_run(tmp_path / "straight", tmp_path / "run")


@pytest.mark.slow
def test_a_run_in_float16_survives_overflow_and_resumes_with_its_scale(fitted, tmp_path, monkeypatch):
    monkeypatch.setattr("smollm_jax.training.loss_scale.FIRST", 2.0**32)
    settings = "--steps 30 --dtype float16 --eval-every 0 --no-export --log-every 1".split()
    fitted(*settings, run="straight")
    _, err = fitted(*settings, "--stop-after", "11")
    assert "float16 with a loss scale, now 4.29497e+09; a step that overflows is skipped" in err
    assert "step 1: a gradient overflows float16; the update is skipped, the loss scale is now 2.1" in err
    scales = [read_params(tmp_path / "run/checkpoints", group="loss_scale")[1]]
    _, err = fitted(*settings)
    assert f"now {float(scales[0]['scale']):,g};" in err
    assert_same_run(tmp_path / "straight", tmp_path / "run")
    scales = [read_params(tmp_path / run / "checkpoints", group="loss_scale")[1] for run in ("straight", "run")]
    lines = records(tmp_path / "run")
    last = max(line["step"] for line in lines if line["loss"] is None)
    assert [int(scale["good_steps"]) for scale in scales] == [30 - last] * 2
    assert lines[0]["loss_scale"] > lines[-1]["loss_scale"] == scales[0]["scale"]
    assert lines[-1]["skipped_steps"] > 1
    assert lines[-1]["bad_steps"] == 0
    assert lines[-1]["loss"] < lines[0]["step_loss"]
    _, err = fitted(*settings[:2], *settings[4:], code=2)
    assert "the run computed in float16, and would go on in float32; give --dtype float16" in err


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


@pytest.mark.parametrize(
    "flags", ["--num-heads 9 --num-kv-heads 3", "--initializer-range 2", "--bos-token-id 300"]
)
def test_what_cannot_be_exported_is_not_trained(fitted, tmp_path, flags):
    _, err = fitted("--steps", "2", "--warmup-steps", "0", *flags.split(), code=2)
    (line,) = [line for line in err.splitlines() if not line.endswith("the last one counts")]
    assert line.startswith("error: ")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_where_no_checkpoint_is_good_the_run_does_not_start_over_by_itself(fitted, tmp_path):
    settings = ["--steps", "4", "--checkpoint-every", "2", "--no-export", "--eval-every", "0"]
    fitted(*settings)
    run = tmp_path / "run"
    before = (run / "metrics.jsonl").read_text()
    for folder in (run / "checkpoints").iterdir():
        (folder / "meta.json").write_text("{}")
    _, err = fitted(*settings, code=2)
    assert "holds no good checkpoint, only 2.bad, 4.bad" in err
    assert (run / "metrics.jsonl").read_text() == before
    fitted(*settings, "--new-run")


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
def test_bad_rows_are_skipped_and_counted_when_asked(fitted, tmp_path, corpus):
    lines = (corpus / "part-0.jsonl").read_text().splitlines()
    path = tmp_path / "broken.jsonl"
    path.write_text("\n".join([*lines, "{not json", *lines[:20]]) + "\n")
    settings = "--steps 60 --shuffle-window 4 --checkpoint-every 10 --no-export --eval-every 0".split()
    fitted(*settings, data=str(path), code=2)
    _, err = fitted(*settings, "--on-bad-data", "skip", data=str(path))
    assert f"skipped: {path}, row 60, cannot be read" in err
    assert "starts      from checkpoint" in err
    assert records(tmp_path / "run")[-1]["skipped_documents"] >= 1


@pytest.mark.slow
def test_stop_after_leaves_the_schedule_alone(fitted, tmp_path):
    fitted("--steps", "9", "--no-export", run="straight")
    out, _ = fitted("--steps", "9", "--no-export", "--stop-after", "4")
    assert "step 4 of 9" in out
    fitted("--steps", "9", "--no-export")
    assert_same_run(tmp_path / "straight", tmp_path / "run")


def test_a_folder_that_cannot_be_one_is_one_line(fitted, tmp_path):
    (tmp_path / "run").write_text("a file")
    _, err = fitted("--steps", "5", code=2)
    assert err == f"error: --run-dir {tmp_path}/run cannot be used as a folder: File exists\n"


@pytest.mark.slow
def test_a_changed_setting_is_refused_by_name_and_a_harmless_one_is_not(fitted, tmp_path):
    fitted("--steps", "4", "--schedule", "constant", "--no-export")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    again = ["--steps", "4", "--schedule", "constant", "--no-export"]
    _, err = fitted(*again, "--learning-rate", "1e-3", code=2)
    assert err.startswith("error: ")
    assert "optimizer.learning_rate was 0.0006, is 0.001" in err
    assert err.count("\n") == 1
    _, err = fitted(*again, "--seed", "3", "--weight-decay", "0.3", code=2)
    assert "run.seed was 0, is 3; " in err
    assert "optimizer.weight_decay was 0.01, is 0.3" in err
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    fitted("--steps", "8", "--schedule", "constant", "--log-every", "2", "--no-export")
    assert [x["step"] for x in records(tmp_path / "run") if "loss" in x] == [1, 2, 3, 4, 6, 8]
    _, err = fitted("--steps", "8", "--schedule", "constant", "--seed", "3", "--new-run", "--no-export")
    assert "moved the old run to" in err
    assert (tmp_path / "run.old1" / "checkpoints" / "8").is_dir()


@pytest.mark.slow
def test_data_that_ends_ends_the_run_with_everything_saved(fitted, tmp_path):
    out, _ = fitted("--steps", "500", "--epochs", "1", "--eval-every", "100")
    assert out.startswith("the data ended: step ")
    step = records(tmp_path / "run")[-1]["step"]
    assert (tmp_path / "run" / "checkpoints" / str(step)).is_dir()
    assert "held-out loss" in out
    assert (tmp_path / "run" / "export" / "model.safetensors").exists()


def test_unreadable_data_costs_nothing_of_what_was_trained_before_it(fitted, tmp_path, corpus):
    lines = (corpus / "part-0.jsonl").read_text().splitlines()
    path = tmp_path / "broken.jsonl"
    path.write_text("\n".join([*lines, "{not json"]) + "\n")
    settings = "--steps 50 --shuffle-window 4 --checkpoint-every 100 --eval-every 0 --no-export".split()
    _, err = fitted(*settings, data=str(path), code=2)
    assert err.rstrip().splitlines()[-1].startswith(f"error: {path}, row 60, cannot be read")
    saved = [int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()]
    assert saved == [records(tmp_path / "run")[-1]["step"]]
    path.write_text("\n".join([*lines, *lines]) + "\n")
    _, err = fitted(*settings, data=str(path), code=2)
    assert "changed since the checkpoint" in err


def assert_same_params(one, other):
    """Up to updates with next to no learning rate; returns the checkpoint of the second run."""
    (_, before), (found, after) = (read_params(run / "checkpoints") for run in (one, other))
    for x, y in zip(leaves(before), leaves(after), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-9)
    return found


@pytest.mark.slow
def test_weights_to_start_from_bring_architecture_and_tokenizer_along(finished_run, fitted, tmp_path):
    texts = [{"text": "the old cat saw one red bird near our house " * 3}] * 20
    (tmp_path / "more.jsonl").write_text("\n".join(map(json.dumps, texts)))
    flags = "--seq-len 32 --batch-size 2 --steps 2 --eval-documents 0 --no-export".split()
    flags += [
        "--data",
        str(tmp_path / "more.jsonl"),
        "--run-dir",
        str(tmp_path / "more"),
        "--init-from",
        str(finished_run / "export"),
    ]
    _, err = fitted(*flags, "--learning-rate", "1e-12", bare=True)
    assert f"starts      from the weights of {finished_run}/export" in err
    assert_same_params(finished_run, tmp_path / "more")
    ours, theirs = (run / "tokenizer" / "tokenizer.json" for run in (tmp_path / "more", finished_run))
    assert ours.read_bytes() == theirs.read_bytes()
    _, err = fitted(*flags, "--learning-rate", "1e-12", bare=True)
    assert "starts      from checkpoint 2" in err
    _, err = fitted(*flags, "--preset", "360M", "--new-run", bare=True, code=2)
    assert "the weights have vocab_size=300, this run asks for 49152" in err


@pytest.mark.slow
def test_an_imported_run_goes_on_from_its_weights(finished_run, fitted, tmp_path):
    imported = tmp_path / "imported"
    import_run(finished_run / "export", imported)
    flags = ["--steps", "1", "--warmup-steps", "0", "--learning-rate", "1e-12"]
    _, err = fitted(*flags, run="imported")
    assert f"starts      from the weights of {imported}" in err
    assert assert_same_params(finished_run, imported).step == 1


@pytest.mark.slow
def test_a_second_process_on_a_run_is_refused(train, tmp_path):
    first = train("--steps", "3000", "--no-export")
    wait_for_step(tmp_path / "run", 1, first)
    _, err = ended(train("--steps", "3000", "--no-export"), 2)
    assert f"is in use by process {first.pid}" in err
    first.kill()
    first.communicate()
    ended(train("--steps", "3000", "--stop-after", "1", "--no-export"))


def test_numbers_that_go_wrong_stop_the_run_and_leave_the_documents_behind(fitted, tmp_path):
    settings = ["--steps", "30", "--learning-rate", "1e30", "--warmup-steps", "0", "--max-bad-steps", "4"]
    _, err = fitted(*settings, "--checkpoint-every", "100", "--no-export", "--clip-norm", "1e9", code=1)
    run = tmp_path / "run"
    assert "loss or gradient not finite; the update is skipped" in err
    assert "stopped: 4 steps in a row without a finite gradient" in err
    assert "Traceback" not in err
    assert not (run / "checkpoints").exists()
    (written,) = run.glob("bad_step_*.jsonl")
    step = int(written.stem.rpartition("_")[2])
    documents = [json.loads(line) for line in written.read_text().splitlines()]
    assert documents == replay_step(run, step)[0]
    assert all({"source", "file", "row", "text"} == set(document) for document in documents)
    shown = [line for line in records(run) if line["bad_steps"]]
    assert [line["bad_steps"] for line in shown] == list(range(1, len(shown) + 1))
    assert all(None in (line["loss"], line["grad_norm"]) for line in shown)


@pytest.mark.slow
def test_nothing_is_compiled_twice(train, monkeypatch):
    """One program a batch size before the first step; a second evaluation and the second phase compile nothing."""
    monkeypatch.setenv("JAX_LOG_COMPILES", "1")
    settings = "--phases 6x4,4x2 --grad-accum 1 --eval-every 3 --checkpoint-every 4 --no-export".split()
    _, err = ended(train(*settings))
    first, later = err.split("held-out loss", 1)
    names = [words.split("(")[1].split(")")[0] for words in first.split("Compiling jit")[1:]]
    assert {name: names.count(name) for name in ("step", "create", "nll")} == {"step": 2, "create": 1, "nll": 1}
    assert "Compiling jit" not in later
