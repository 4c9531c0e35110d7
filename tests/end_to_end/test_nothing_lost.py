"""Stops at random moments, and the commands that prove and explain a run."""

import contextlib
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from smollm_jax.checkpoint.listing import list_checkpoints
from smollm_jax.config.serialization import from_dict
from smollm_jax.data.sources import open_source
from smollm_jax.runs.records import read_metrics
from smollm_jax.runs.replay import replay_step
from smollm_jax.runtime.files import read_json
from smollm_jax.training.verify_resume import compare_runs, start, verify_resume
from tests.chaos.__main__ import chaos, scenarios, table
from tests.support.paths import ROOT


@pytest.fixture(scope="session")
def short_run(tmp_path_factory):
    """A finished run of 30 steps with a checkpoint every 7, and its config."""
    folder = tmp_path_factory.mktemp("short")
    config = scenarios(folder, folder / "compiled")["mixture"]
    config = replace(
        config,
        run=replace(
            config.run, phases="30x4", checkpoint_every=7, eval_every=0, keep_last=9, run_dir=str(folder / "run")
        ),
    )
    assert start(config).wait() == 0
    return folder / "run", config


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stops", "seed", "only"),
    # seed 9: kill -9 while the reference log-probs are computed, and at a save
    [
        (4, 7, ["phases"]),
        (2, 9, ["pairs"]),
        (2, 8, ["muon and average"]),
        pytest.param(10, 7, [], marks=pytest.mark.release),
    ],
)
def test_runs_stopped_at_random_moments_come_out_bit_for_bit(tmp_path, stops, seed, only):
    made, wrong = chaos(tmp_path, stops=stops, seed=seed, jobs=1, cache=tmp_path / "compiled", only=only)
    assert not wrong, wrong
    assert len(made) >= stops
    assert table(made).splitlines()[-1] == f"| **all** | | {len(made)} | {len(made)} | 0 |"


@pytest.mark.slow
def test_verify_resume_finds_a_recipe_exact_and_a_tampered_run_not(short_run, tmp_path):
    _, config = short_run
    result = verify_resume(config, tmp_path, steps=9)
    assert result.exact, result.compared
    assert result.resumes >= 1
    metrics = tmp_path / "pieces" / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    ledger = json.loads(lines[4])["ledger"]
    metrics.write_text("\n".join(lines).replace(ledger, "0" * 32) + "\n")
    compared = compare_runs(tmp_path / "straight", tmp_path / "pieces")
    assert compared["ledger, losses and norms"] == "step 5: ledger differ"


@pytest.mark.slow
def test_verify_resume_as_a_command_prints_a_verdict(short_run):
    run_dir, config = short_run
    flags = ["--recipe", "quickstart", "--data", config.data.data, "--tokenizer", config.data.tokenizer]
    flags += ["--batch-size", "2", "--seq-len", "16", "--verify-steps", "4", "--num-layers", "1"]
    command = [sys.executable, "-m", "smollm_jax", "verify-resume", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert re.fullmatch(
        r"verdict: exact over 4 steps, killed and resumed [123] times", done.stdout.splitlines()[-1]
    )
    assert not list(run_dir.parent.glob("verify-resume-*"))


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 8, 30])
def test_the_documents_of_a_step_are_those_it_was_trained_on(short_run, step):
    run_dir, config = short_run
    documents, verdict = replay_step(run_dir, step)
    assert verdict.endswith("as on record")
    known = {
        (document.source, document.file, document.row): document.text
        for spec in (f"{Path(config.data.tokenizer).parent}/{name}-*.jsonl" for name in "ab")
        for document in open_source(spec, config.data).documents()
    }
    assert documents
    for document in documents:
        assert known[document["source"], document["file"], document["row"]] == document["text"]


@pytest.mark.slow
def test_a_step_that_never_was_is_refused(short_run):
    with pytest.raises(ValueError, match="the run has steps 1 to 30"):
        replay_step(short_run[0], 31)


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("relieved", [True, False])
def test_a_full_disk_stops_no_training_and_only_a_save_that_never_came_ends_in_failure(
    short_run, small_disk, relieved
):
    _, config = short_run
    run = replace(config.run, phases="900x4", checkpoint_every=50, keep_last=1, run_dir=str(small_disk / "run"))
    process = start(replace(config, run=run), stderr=subprocess.PIPE)
    checkpoints, filler, enough = small_disk / "run" / "checkpoints", small_disk / "filler", threading.Event()

    def fill() -> None:  # and take again what the run itself gives free
        with filler.open("wb", buffering=0) as file:
            while process.poll() is None and not enough.wait(0.001):
                with contextlib.suppress(OSError):
                    while not enough.is_set():
                        file.write(bytes(4096))
        filler.unlink()

    while process.poll() is None and not (checkpoints / "50").exists():
        time.sleep(0.01)
    filling = threading.Thread(target=fill)
    filling.start()
    words = ""
    for line in process.stderr:
        words += line
        if relieved and "could not be saved" in line:
            enough.set()
    code = process.wait()
    filling.join()
    assert "could not be saved (No space left on device); the newest is " in words
    assert "Traceback" not in words
    infos = list_checkpoints(checkpoints)
    assert [info.verdict for info in infos] == ["good"]
    if relieved:
        assert code == 0, words
        assert infos[0].step == 900
        assert [x["step"] for x in read_metrics(small_disk / "run")] == list(range(1, 901))
    else:
        assert code == 1, words
        assert "the last checkpoint could not be saved: step 900" in words


@pytest.mark.slow
def test_batches_that_are_not_those_of_the_first_time_are_called_out(short_run, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(short_run[0], run_dir)
    for step in (28, 30):
        shutil.rmtree(run_dir / "checkpoints" / str(step))
    metrics = run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    metrics.write_text(
        "".join(json.dumps(x | ({"ledger": "f" * 32} if x["step"] == 25 else {})) + "\n" for x in lines)
    )
    saved = from_dict(read_json(run_dir / "config.json"))
    process = start(replace(saved, run=replace(saved.run, run_dir=str(run_dir))), stderr=subprocess.PIPE)
    _, words = process.communicate()
    assert process.returncode == 0
    assert words.count("THE BATCHES DIFFER FROM THE FIRST TIME") == 1
    assert "step 25: THE BATCHES" in words
