"""Runs that go on otherwise than they began: extended, annealed from a checkpoint, averaged, with longer rows."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from smollm_jax.checkpoint.manager import read_params
from smollm_jax.cli.arguments import parse
from smollm_jax.cli.main import command
from smollm_jax.runs.load import load_model, read_run
from smollm_jax.runs.replay import replay_step
from smollm_jax.runtime.errors import UserError, run_main
from smollm_jax.runtime.signals import StopRequest
from smollm_jax.training.fit import fit
from tests.support.paths import ROOT
from tests.support.runs import TINY, assert_same_run, leaves, records, wait_for_step
from tests.support.texts import make_texts, write_rows
from tests.training.test_branch import hashes

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("settings_restored")]
SHORT = (
    "--steps 16 --checkpoint-every 5 --keep-last 1 --eval-every 4 --no-export --learning-rate 0.01 "
    "--schedule wsd --decay-steps 4 --sample-prompts one --mesh data=1 --rope-theta 10000 --max-seq-len 48"
).split()


@pytest.fixture(scope="module")
def flags(cache, corpus, tokenizer):
    """The flags of a tiny run in a folder."""
    places = ["--data", f"{corpus}/*.jsonl", "--tokenizer", str(tokenizer), "--compilation-cache-dir", str(cache)]
    return lambda folder, *more: [*places, *TINY, *SHORT, "--run-dir", str(folder), *more]


@pytest.fixture(scope="module")
def parent(tmp_path_factory, flags):
    """A run of sixteen steps, extended to twenty at step ten. Its last four decay. Not to be changed."""
    folder = tmp_path_factory.mktemp("parent") / "run"
    assert fit(parse(flags(folder, "--stop-after", "10")), StopRequest()) == 0
    assert fit(parse(["--resume", str(folder), "--extend", "4"]), StopRequest()) == 0
    return folder


@pytest.fixture(scope="module")
def child(tmp_path_factory, parent):
    """The parent annealed from its kept checkpoint: the run folder, and the files of the parent before it."""
    folder, before = tmp_path_factory.mktemp("child") / "run", hashes(parent)
    assert run_main(lambda: command("anneal", branch_of(parent, folder), "smollm")) == 0
    return folder, before


def branch_of(parent, folder, *more):
    argv = "--from 16 --steps 40 --decay 1-sqrt --checkpoint-every 7 --eval-every 20 --run-dir".split()
    return [str(x) for x in (parent, *argv, folder, *more)]


@pytest.fixture
def did(capfd):
    """Runs a command line in this process; what it wrote."""

    def run(name, *argv, code=0):
        argv = [*map(str, argv)]
        if name == "train":
            found = run_main(lambda: fit(parse([*argv, "--mesh", "data=1"]), StopRequest()))
        else:
            found = run_main(lambda: command(name, argv, "smollm"))
        out, err = capfd.readouterr()
        assert found == code, err
        return out + err

    return run


def trained(folder):
    return {line["step"]: line for line in records(folder) if "loss" in line}


def test_a_run_is_extended_by_its_folder_alone_and_the_same_command_goes_on(parent, did, tmp_path):
    rates = {step: line["learning_rate"] for step, line in trained(parent).items()}
    assert list(rates) == [*range(1, 21)]
    np.testing.assert_allclose([rates[n] for n in range(2, 21)], [0.01] * 15 + [0.01, 0.0075, 0.005, 0.0025])
    shutil.copytree(parent, tmp_path / "run")
    assert "finished: step 20 of 20" in did("train", "--resume", tmp_path / "run", "--extend", 4)
    told = did("train", "--resume", tmp_path / "run", "--extend", 9, code=2)
    assert "the decay began after step 16, and the run is at step 20; smollm anneal RUN --from 16" in told


def test_the_checkpoint_before_the_decay_is_made_kept_and_named(parent, did):
    assert sorted(os.listdir(parent / "checkpoints")) == ["16", "20"]
    listed = did("checkpoints", parent).splitlines()[1:]
    assert [line.partition("good")[2] for line in listed] == [", kept: before the decay", ""]


def test_a_branch_goes_on_with_state_data_and_rate_of_the_step_and_leaves_its_parent_alone(parent, child):
    folder, before = child
    assert hashes(parent) == before
    ours, theirs = trained(folder), trained(parent)
    assert list(ours) == [*range(17, 57)]
    for step in range(17, 21):  # the parent went on with the same data
        assert ours[step]["ledger"] == theirs[step]["ledger"]
    assert ours[17]["loss"] == theirs[17]["loss"]
    rates = [line["learning_rate"] for line in ours.values()]
    np.testing.assert_allclose(rates, 0.01 * (1 - np.sqrt(np.arange(40) / 40)), rtol=1e-5)
    record = json.loads((folder / "parent.json").read_text())
    assert (record["parent"], record["step"], record["data"]) == (str(parent), 16, "on")
    assert "as on record" in replay_step(folder, 17)[1]
    with pytest.raises(UserError, match=r"the run is a branch of .*, whose batches these are"):
        replay_step(folder, 16)


def test_a_killed_branch_goes_on_bit_for_bit_without_its_parent(parent, child, did, tmp_path):
    shutil.copytree(parent, tmp_path / "parent")
    argv = branch_of(tmp_path / "parent", tmp_path / "child")
    process = subprocess.Popen(
        [sys.executable, "-m", "smollm_jax", "anneal", *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, cwd=ROOT,
    )  # fmt: skip
    wait_for_step(tmp_path / "child", 30, process)
    process.kill()
    process.wait()
    (tmp_path / "parent").rename(tmp_path / "gone")
    told = did("train", "--resume", tmp_path / "child")
    assert "starts      from checkpoint" in told
    assert f"branch      of {tmp_path}/parent at step 16; its data go on" in told
    assert_same_run(child[0], tmp_path / "child")
    (tmp_path / "child" / "checkpoints").rename(tmp_path / "lost")
    assert "is a branch, and its checkpoints are gone" in did("train", "--resume", tmp_path / "child", code=2)


def test_checkpoints_of_a_run_are_averaged_and_scored_on_its_held_out_rows(parent, did, tmp_path):
    told = did("average", parent, "--last", 2, "--out", tmp_path / "out", "--no-verify")
    names = [str(parent / "checkpoints" / step) for step in ("16", "20")]
    scored = {line.rsplit(maxsplit=2)[0]: line.split()[-2:] for line in told.splitlines() if "." in line}
    assert [name for name in scored if name in {*names, "the average"}] == [*names, "the average"]
    recorded = {line["step"]: line for line in records(parent) if "eval_loss" in line}
    for name in names:
        found = recorded[int(name.rsplit("/", 1)[1])]
        assert scored[name] == [f"{found['eval_loss']:.4f}", f"{found['eval_bits_per_byte']:.4f}"]
    (_, a), (_, b) = (read_params(parent / "checkpoints", step) for step in (16, 20))
    _, mean, _ = load_model(tmp_path / "out")
    for x, y, z in zip(leaves(a), leaves(b), leaves(mean), strict=True):
        np.testing.assert_array_equal(((x.astype(np.float64) + y.astype(np.float64)) / 2).astype(np.float32), z)


@pytest.mark.release  # the first batches are compared in tests/training
def test_a_branch_with_other_data_stops_and_resumes_exactly(parent, did, tmp_path):
    write_rows(tmp_path / "more.jsonl", [{"text": text} for text in make_texts(60, longest=60)])
    own = ["--data", tmp_path / "more.jsonl", "--eval-every", "0"]
    pieces, straight = tmp_path / "pieces", tmp_path / "straight"
    told = did("anneal", *branch_of(parent, pieces, *own, "--stop-after", 18, "--checkpoint-every", 0))
    assert "the data begin afresh" in told
    did("anneal", *branch_of(parent, pieces, *own))
    did("anneal", *branch_of(parent, straight, *own))
    assert_same_run(straight, pieces)
    assert "as on record" in replay_step(pieces, 17)[1]
    assert all("more.jsonl" in document["file"] for document in replay_step(pieces, 17)[0])


@pytest.mark.release  # tests/training has the rule
def test_weights_go_on_with_a_longer_context_also_where_it_is_the_recipes_own(parent, did, tmp_path, corpus):
    argv = f"--init-from {parent} --data {corpus}/*.jsonl --batch-size 2 --steps 2 --eval-documents 0 --no-export"
    argv, longer = argv.split(), "--rope-theta 100000 --max-seq-len 8192 --seq-len 96".split()
    run = ["--run-dir", tmp_path / "long"]
    told = did("train", *argv, *longer, *run)
    assert "context     48 -> 8,192 tokens, rope_theta 10,000 -> 100,000" in told
    assert read_run(run[1]).model == replace(read_run(parent).model, rope_theta=100_000.0, max_seq_len=8_192)
    assert read_run(run[1]).data.seq_len == 96
    assert "starts      from checkpoint 2" in did("train", *argv, *longer, *run)
    told = did("train", *argv, "--seq-len", 96, "--run-dir", tmp_path / "short", code=2)
    assert "seq_len=96 must not exceed the model's max_seq_len=48" in told
    told = did("train", *argv, *longer, *run, "--lora-rank", 2, "--new-run", code=2)
    assert "adapters keep the rope_theta of their base, 10,000; 100,000 came" in told
