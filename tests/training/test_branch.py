"""What a branch begins with, and what cannot be one. Nothing is trained here."""

import hashlib
import json
import os
import shutil
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from smollm_jax.checkpoint.listing import open_checkpoint
from smollm_jax.checkpoint.manager import CheckpointManager, read_params
from smollm_jax.cli.arguments import parse
from smollm_jax.cli.main import command
from smollm_jax.config.defaults import default_settings
from smollm_jax.config.serialization import to_dict
from smollm_jax.data.loader import BatchIterator, Loader
from smollm_jax.runtime.errors import UserError, run_main
from smollm_jax.tokenizer.load import load_tokenizer
from smollm_jax.training.branch import Branch
from smollm_jax.training.optimizer import learning_rate_schedule
from smollm_jax.training.run import Progress
from tests.support.runs import TINY

pytestmark = pytest.mark.usefixtures("settings_restored")
NEW = "--from 12 --steps 3".split()


def hashes(folder):
    return {str(x): hashlib.md5(x.read_bytes()).hexdigest() for x in sorted(folder.rglob("*")) if x.is_file()}


@pytest.fixture(scope="module")
def parent(tmp_path_factory, corpus, tokenizer):
    """What is read of a run of sixteen steps, with checkpoints 12 and 16; not to be changed."""
    run = tmp_path_factory.mktemp("parent") / "run"
    more = f"--schedule wsd --decay-steps 4 --learning-rate 0.01 --steps 16 --keep-last 1 --run-dir {run}".split()
    config = parse(["--data", f"{corpus}/*.jsonl", "--tokenizer", str(tokenizer), *TINY, *more])
    shutil.copytree(tokenizer, run / "tokenizer")
    (run / "config.json").write_text(json.dumps(to_dict(config)))
    loader = Loader(config, load_tokenizer(str(tokenizer)))
    batches = BatchIterator(loader, None)
    checkpoints = CheckpointManager(run / "checkpoints", keep_last=2, keep_every=0)
    for _ in range(16):
        _, cursor = next(batches)
        step = cursor["step"]
        if step in (12, 16):
            progress = vars(Progress(step=step, cursor=cursor, ledger=str(step)))
            state = {"params": {"x": np.full(3, step, np.float32)}, "step": np.int32(step)}
            checkpoints.save(step, state, {"config": to_dict(config), "progress": progress, "cursor": cursor})
            assert checkpoints.wait()
    return run


def settled(branch, run_dir, *flags):
    return branch.settle(parse(["--resume", str(branch.parent), "--run-dir", str(run_dir), *flags]))


def test_a_branch_holds_the_arrays_the_place_in_the_data_and_its_own_settings(parent, tmp_path):
    branch, before = Branch(parent=parent, step=12, steps=6, shape="1-sqrt"), hashes(parent)
    config = settled(branch, tmp_path)
    branch.begin(tmp_path, config)
    found, params = read_params(tmp_path / "checkpoints", 12)
    np.testing.assert_array_equal(params["x"], np.full(3, 12, np.float32))
    theirs = open_checkpoint(parent / "checkpoints" / "12", 12)
    assert open_checkpoint(tmp_path / "checkpoints" / "12", 12).leaves == theirs.leaves
    assert found.meta["cursor"] == theirs.meta["cursor"]
    assert found.meta["progress"] == theirs.meta["progress"]
    assert found.meta["config"] == to_dict(config)
    assert found.meta["annealed_from"] == {"run": str(parent), "step": 12}
    assert (config.total_steps, config.decay_start, config.optimizer.decay_shape) == (18, 12, "1-sqrt")
    assert (tmp_path / "tokenizer" / "tokenizer.json").exists()
    made = hashes(tmp_path)
    branch.begin(tmp_path, config)  # the same command again
    assert hashes(tmp_path) == made
    shutil.rmtree(tmp_path / "checkpoints")  # killed before the copy was whole
    branch.begin(tmp_path, config)
    assert os.listdir(tmp_path / "checkpoints") == ["12"]
    with pytest.raises(UserError, match=r"is another branch: steps was 6, is 7"):
        replace(branch, steps=7).begin(tmp_path, config)
    assert hashes(parent) == before


def test_other_data_are_read_from_their_beginning_at_the_step_of_the_branch(parent, tmp_path):
    branch = Branch(parent=parent, step=12, steps=6)
    config = settled(branch, tmp_path, "--shuffle-window", "8")
    branch.begin(tmp_path, config)
    cursor = open_checkpoint(tmp_path / "checkpoints" / "12", 12).meta["cursor"]
    loader = Loader(config, load_tokenizer(str(tmp_path / "tokenizer")))
    ours, fresh = BatchIterator(loader, cursor), BatchIterator(loader, None)
    for step in (13, 14):
        (batch, place), (first, _) = next(ours), next(fresh)
        np.testing.assert_array_equal(batch.tokens, first.tokens)
        assert place["step"] == step
    again = BatchIterator(loader, place)  # from then on as any cursor
    np.testing.assert_array_equal(next(again)[0].tokens, next(ours)[0].tokens)
    with pytest.raises(UserError, match="the tokenizer changed"):
        BatchIterator(loader, cursor | {"tokenizer": "other"})
    with pytest.raises(UserError, match="damaged"):
        BatchIterator(loader, {"step": 12, "tokenizer": cursor["tokenizer"]})  # lost, not afresh


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--from", "7", "--steps", "3"], "holds no checkpoint of step 7; there are: 12, 16"),
        (["--from", "12", "--steps", "0"], "--steps 0 must be at least 1"),
        ([*NEW, "--final-learning-rate", "1"], "is 0.01, not above the final 1"),
        (
            [*NEW, "--learning-rate", "1", "--extend", "2"],
            "--learning-rate, --extend: a branch has",
        ),
        (
            [*NEW, "--schedule", "wsd"],
            "and the decay of --decay and --steps; leave it out",
        ),
        ([*NEW, "--seed", "3"], "run.seed: a branch keeps the settings of its run"),
        ([*NEW, "--recipe", "quickstart"], "--recipe: a branch has the settings of its run"),
        ([*NEW, "--run-dir", "PARENT"], "is the run itself"),
        ([*NEW, "--run-dir", "OTHER"], "holds another run"),
        ([*NEW, "--weigth-decay", "1"], "did you mean --weight-decay?"),
        ([*NEW, "--data", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_a_branch_that_cannot_be_is_one_line_and_leaves_nothing(parent, capfd, tmp_path, argv, words):
    places = {"PARENT": parent, "OTHER": tmp_path / "other"}
    shutil.copytree(parent, places["OTHER"])
    argv = [str(places.get(x, x)) for x in argv]
    argv += [] if "--run-dir" in argv else ["--run-dir", str(tmp_path / "child")]
    before = hashes(tmp_path), hashes(parent)
    assert run_main(lambda: command("anneal", [str(parent), *argv], "smollm")) == 2
    assert words in capfd.readouterr().err.splitlines()[-1]
    assert (hashes(tmp_path), hashes(parent)) == before
    assert os.listdir(tmp_path) == ["other"]


def test_a_branch_of_a_damaged_checkpoint_is_refused_and_leaves_nothing(parent, capfd, tmp_path):
    shutil.copytree(parent, tmp_path / "run")
    file = max((tmp_path / "run" / "checkpoints" / "12" / "params").rglob("*"), key=lambda x: x.stat().st_size)
    file = next(x for x in file.rglob("*") if x.is_file()) if file.is_dir() else file
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    argv = [str(tmp_path / "run"), *NEW, "--run-dir", str(tmp_path / "child")]
    assert run_main(lambda: command("anneal", argv, "smollm")) == 2
    assert "checkpoint 12 in" in (said := capfd.readouterr().err.splitlines()[-1])
    assert "is damaged" in said
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_the_rate_of_a_branch_is_the_rate_of_its_step_whatever_the_schedule(tmp_path, schedule):
    config = parse(["--phases", "10x4,6x2", "--warmup-steps", "3", "--schedule", schedule])
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    for step in (1, 5, 11, 15):
        branch = Branch(parent=tmp_path, step=step, steps=20, shape="cosine")
        now = settled(branch, tmp_path / "child")
        rate = np.float32(learning_rate_schedule(config)(jnp.int32(step - 1)))
        rates = learning_rate_schedule(now)
        assert np.float32(rates(jnp.int32(step))) == rate
        np.testing.assert_allclose(rates(jnp.int32(step + 10)), rate / 2, rtol=1e-5)
        assert now.total_steps == step + 20
        kept = range(1, step + 1)
        assert [now.batch_size_at(n) for n in kept] == [config.batch_size_at(n) for n in kept]
    assert default_settings(resume=str(tmp_path)).optimizer.schedule == schedule  # the parent's own


def test_pairs_keep_their_data_and_an_import_has_no_branch(parent, tmp_path):
    config = parse(["--recipe", "dpo", "--data", "a.jsonl", "--steps", "9"])
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    with pytest.raises(UserError, match="pairs keep the reference log-probs of the run's own data"):
        settled(Branch(parent=tmp_path, step=3, steps=2), tmp_path / "child", "--data", "b.jsonl")
    checkpoints = CheckpointManager(tmp_path / "checkpoints", keep_last=1, keep_every=0)
    checkpoints.save(3, {"params": {"x": np.zeros(3, np.float32)}}, {"imported_from": "x"})
    assert checkpoints.wait()
    shutil.copytree(parent / "tokenizer", tmp_path / "tokenizer")
    (tmp_path / "config.json").write_text((parent / "config.json").read_text())
    branch = Branch(parent=tmp_path, step=3, steps=2)
    (tmp_path / "child").mkdir()
    with pytest.raises(UserError, match="is an import, without optimizer and data"):
        branch.begin(tmp_path / "child", settled(branch, tmp_path / "child"))
