"""A run with Muon, z-loss and a moving average: what is kept, recorded, exported and resumed."""

import json

import numpy as np
import pytest

from smollm_jax.checkpoint.manager import read_params
from smollm_jax.cli.arguments import parse
from smollm_jax.cli.commands import export
from smollm_jax.config.serialization import to_dict
from smollm_jax.config.settings import Config, DataConfig
from smollm_jax.hf.reader import read_folder
from smollm_jax.runs.records import evaluations, read_metrics
from smollm_jax.runtime.errors import UserError
from smollm_jax.runtime.signals import StopRequest
from smollm_jax.runtime.trees import flatten
from smollm_jax.training.evaluation import evaluate_model
from smollm_jax.training.fit import fit
from tests.support.runs import TINY, assert_same_run
from tests.support.texts import make_texts, write_rows

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("settings_restored")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Texts, and a finished run of nine steps over them."""
    folder = tmp_path_factory.mktemp("optimizers")
    write_rows(folder / "texts.jsonl", [{"text": text} for text in make_texts(60)])
    write_rows(folder / "held-out.jsonl", [{"text": text} for text in make_texts(5, seed=1)])
    assert train(folder, "run") == 0
    return folder


def train(folder, run, *more):
    flags = (
        f"--data {folder / 'texts.jsonl'} --eval-data {folder / 'held-out.jsonl'} --run-dir {folder / run} "
        "--tokenizer train:300 --optimizer muon --z-loss 0.01 --ema 0.8 --learning-rate 0.02 --steps 9 "
        "--eval-every 3 --checkpoint-every 2 --eval-batches 99 --mesh data=1 "
        f"--compilation-cache-dir {folder.parent / 'compiled'}"
    )
    with StopRequest() as stop:
        return fit(parse([*TINY, *flags.split(), *more]), stop)


def test_the_average_is_recorded_exported_and_opened(place, tmp_path, capsys):
    run = place / "run"
    last, averages = evaluations(read_metrics(run))[-1], read_params(run / "checkpoints", group="ema")[1]
    assert last["eval_ema_loss"] != last["eval_loss"]
    for exported, of in (("export", ""), ("export-ema", "ema_")):
        data = DataConfig(data=str(place / "held-out.jsonl"))
        found = evaluate_model(run / exported, data, batch_size=4, dtype="float32", seq_len=32)
        assert found["loss"] == pytest.approx(last[f"eval_{of}loss"], rel=1e-5)
        card = (run / exported / "README.md").read_text()
        assert f"| Held-out loss (nats per token) | {last[f'eval_{of}loss']:.4g} |" in card
        assert ("moving average, decay 0.8" in card) == bool(of)
        assert "Muon, momentum 0.95" in card
    assert export(str(run), out=str(tmp_path / "average"), ema=True) == 0
    capsys.readouterr()
    for folder in (tmp_path / "average", run / "export-ema"):
        params = flatten(read_folder(folder)[1], "/")
        for name, leaf in flatten(averages, "/").items():
            np.testing.assert_array_equal(params[name], leaf)


def test_the_z_loss_has_a_figure_of_its_own_in_every_line(place):
    lines = [line for line in read_metrics(place / "run") if "loss" in line]
    assert len(lines) == 9
    assert all(line["z_loss"] > 0 for line in lines)
    assert lines[0]["loss"] == pytest.approx(np.log(300), rel=0.05), "the loss is without it"


def test_a_stopped_run_resumes_exactly_and_under_no_other_optimizer(place):
    assert train(place, "pieces", "--stop-after", "5") == 0
    with pytest.raises(UserError, match=r"optimizer\.optimizer was muon, is adamw"):
        train(place, "pieces", "--optimizer", "adamw")
    with pytest.raises(UserError, match=r"optimizer\.ema was 0\.8, is 0\.9"):
        train(place, "pieces", "--ema", "0.9")
    assert train(place, "pieces") == 0
    assert_same_run(place / "run", place / "pieces")


def test_a_run_without_an_average_says_how_to_get_one(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(to_dict(Config())))
    for kind in ("hf", "gguf"):
        with pytest.raises(UserError, match="keeps no moving average of its weights; train with --ema"):
            export(str(tmp_path), out=str(tmp_path / "none"), ema=True, format=kind)
    with pytest.raises(UserError, match="--ema is for runs"):
        export(str(tmp_path / "x.gguf"), out=str(tmp_path / "none"), ema=True, format="gguf")
