"""Mistakes in the places of a run are told at once: before JAX, the network and the first file."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from smollm_jax.config.settings import Config
from smollm_jax.distributed.processes import Processes
from smollm_jax.runs.places import check_places
from smollm_jax.runtime.errors import UserError
from smollm_jax.training.fit import acquire_run_dir
from tests.support.paths import ROOT

WRONG = {
    "--data /no/such": "matches no file",
    "--data builtin:x": "built-in sources are",
    "--data builtin:python-docs --eval-data /no/such": "matches no file",
    "--tokenizer /no/such": "no tokenizer folder",
    "--tokenizer train:3": "expected train:VOCAB",
    "--init-from /no/such": "there is no folder /no/such",
}


@pytest.mark.parametrize("flags", WRONG)
def test_a_wrong_place_is_told_before_jax_is_imported_and_leaves_nothing(tmp_path, flags):
    code = (
        "import sys\n"
        "from smollm_jax.cli.main import train\n"
        "import smollm_jax.cli.main as main\n"
        "main.leave = lambda code: print(code, 'jax' in sys.modules)\n"
        f"train({flags.split()!r}, 'train_jax.py')"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env, cwd=tmp_path
    )
    assert done.stdout == "2 False\n", done.stderr
    assert WRONG[flags] in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def config_of(run_dir, **data):
    config = Config()
    data = {"data": "builtin:python-docs", "tokenizer": "train:300"} | data
    return replace(config, data=replace(config.data, **data), run=replace(config.run, run_dir=str(run_dir)))


def test_a_run_that_resumes_needs_neither_its_first_tokenizer_nor_its_first_weights(tmp_path):
    gone = config_of(tmp_path, tokenizer="/no/such")
    with pytest.raises(UserError, match="no tokenizer folder"):
        check_places(gone)
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    check_places(replace(gone, run=replace(gone.run, init_from="/no/such")))
    with pytest.raises(UserError, match="matches no file"):
        check_places(config_of(tmp_path, data="/no/such"))
    with pytest.raises(UserError, match="no tokenizer folder"):
        check_places(replace(gone, run=replace(gone.run, new_run=True)))


@pytest.mark.parametrize("began", [False, True])
def test_an_old_run_comes_back_if_the_new_one_is_refused_before_it_begins(tmp_path, began):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("old")
    config = config_of(run)
    config = replace(config, run=replace(config.run, new_run=True))

    def start():
        with acquire_run_dir(config, Processes()) as folder:
            (Path(folder) / "config.json").write_text("new")
            if began:
                (Path(folder) / "metrics.jsonl").write_text("")
            raise UserError("refused")

    with pytest.raises(UserError, match="refused"):
        start()
    assert (run / "config.json").read_text() == ("new" if began else "old")
    assert (tmp_path / "run.old1").exists() == began
