"""Hold runs against figures and a checkpoint that commit af5194b left on 2026-11-27.

A refactor must not change them. They may change with a commit that means to change a result and says so: train
the same settings at that commit, record again, and name the commit in figures.json. (Since 2026-11-28
generation_config.json has sampling settings, and tokenizer_config.json has model_max_length.) Batch hashes and
files are the same on every machine; losses and weights are the same bits only on the CPU and the jax release they
were recorded with, so elsewhere they are compared to 1e-3.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
import tarfile
from pathlib import Path

import jax
import pytest

from tests.support.paths import ROOT

pytestmark = pytest.mark.usefixtures("optimized")
FOLDER = Path(__file__).parent / "recorded"
FIGURES = json.loads((FOLDER / "figures.json").read_text())
TINY = (
    "--data corpus.jsonl --tokenizer train:300 --vocab-size 300 --hidden-size 16 --num-layers 2 --num-heads 4 "
    "--num-kv-heads 2 --head-dim 8 --intermediate-size 24 --seq-len 32 --batch-size 4 --phases 10x4 "
    "--shuffle-window 16 --eval-documents 5 --eval-batches 2 --eval-every 5 --sample-tokens 4 "
    "--sample-prompts the --log-every 1 --warmup-steps 2 --checkpoint-every 0"
).split()


def same_machine():
    """Whether losses should be the recorded bits: the same CPU and jax release."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return (cpu, jax.__version__) == (FIGURES["cpu"], FIGURES["jax"])


def train(folder, *flags):
    command = [sys.executable, str(ROOT / "train_jax.py"), *flags]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def close(recorded):
    return recorded if same_machine() else pytest.approx(recorded, rel=1e-3)


def assert_as_recorded(run, figures):
    """Every line of metrics, the exported tensors, and the files beside them."""
    recorded, now = figures["lines"], lines_of(run)
    assert [line["step"] for line in now] == [line["step"] for line in recorded]
    for then, line in zip(recorded, now, strict=True):
        for name, value in then.items():
            assert line[name] == (close(value) if isinstance(value, float) else value), (
                f"step {then['step']}: {name}"
            )
    if same_machine():
        assert tensors_hash(run / "export") == figures["tensors_sha256"]
    for name, digest in figures["files_sha256"].items():
        assert hashlib.sha256((run / "export" / name).read_bytes()).hexdigest() == digest, name


def tensors_hash(folder):
    """sha256 of the tensors' bytes; the header before them may list its metadata in any order."""
    raw = (folder / "model.safetensors").read_bytes()
    return hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()


@pytest.fixture
def recorded_run(tmp_path):
    """A run at step 6 of 10 as commit af5194b left it, and its data."""
    with tarfile.open(FOLDER / "run_at_step_6.tar.gz") as archive:
        # Python 3.11.4 brings the filter; the archive is our own
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return tmp_path


@pytest.mark.slow
def test_a_fresh_run_gives_the_recorded_figures(recorded_run, cache):
    train(recorded_run, *TINY, "--compilation-cache-dir", str(cache), "--run-dir", "fresh")
    assert_as_recorded(recorded_run / "fresh", FIGURES["tiny"])


@pytest.mark.slow
def test_a_recorded_checkpoint_resumes_to_the_recorded_figures(recorded_run, cache):
    done = train(recorded_run, *TINY, "--compilation-cache-dir", str(cache), "--run-dir", "run")
    assert "from checkpoint 6" in done.stderr
    assert_as_recorded(recorded_run / "run", FIGURES["tiny"])


@pytest.mark.slow
def test_fifty_steps_of_the_quickstart_give_the_recorded_figures(tmp_path, cache):
    if platform.python_version() != FIGURES["python"]:
        pytest.skip(f"the quickstart reads CPython's own docs, recorded with Python {FIGURES['python']}")
    train(
        tmp_path, "--recipe", "quickstart", "--stop-after", "50", "--log-every", "1",
        "--optimizer", "adamw", "--schedule", "cosine", "--weight-decay", "0.01",  # as the recipe was then
        "--compilation-cache-dir", str(cache), "--run-dir", "run",
    )  # fmt: skip
    figures, lines = FIGURES["quickstart"], lines_of(tmp_path / "run")
    assert lines[-1]["ledger"] == figures["ledger"]
    assert [line["loss"] for line in lines] == [close(loss) for loss in figures["losses"]]
    command = [sys.executable, "-m", "smollm_jax", "export", "run", "--out", "export"]
    subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    if same_machine():
        assert tensors_hash(tmp_path / "export") == figures["tensors_sha256"]
