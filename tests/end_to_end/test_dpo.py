"""Training on pairs of answers: the first loss, the figures, the reference log-probs, resume and export."""

import json
import math
import re
from dataclasses import replace

import jax
import numpy as np
import pytest

from smollm_jax.cli.arguments import parse
from smollm_jax.cli.main import command
from smollm_jax.config.serialization import from_dict
from smollm_jax.data.heldout import held_out
from smollm_jax.data.loader import BatchIterator, Loader
from smollm_jax.hf.export import export_folder
from smollm_jax.model.transformer import init_params
from smollm_jax.runs.records import read_metrics
from smollm_jax.runtime.errors import UserError, run_main
from smollm_jax.runtime.signals import StopRequest
from smollm_jax.tokenizer.load import load_tokenizer, train_tokenizer
from smollm_jax.training.fit import fit
from smollm_jax.training.reference import FIGURES, Reference, pair_keys
from smollm_jax.training.step import make_logprobs
from tests.end_to_end.test_sft import MODEL
from tests.support.texts import make_pairs, make_texts, write_rows

pytestmark = pytest.mark.usefixtures("settings_restored")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model to begin with, and pairs of which every tenth has equal answers."""
    path = tmp_path_factory.mktemp("dpo")
    train_tokenizer(make_texts(50), 300, chat=True).save(path / "tokenizer")
    export_folder(init_params(MODEL, 0), MODEL, path / "base", tokenizer_folder=path / "tokenizer", verify=False)
    write_rows(path / "pairs.jsonl", make_pairs(120))
    return path


def flags_of(place, run, *more):
    return [
        "--recipe", "dpo", "--init-from", str(place / "base"), "--data", str(place / "pairs.jsonl"),
        "--seq-len", "192", "--batch-size", "4", "--run-dir", str(place / run), "--mesh", "data=1",
        "--eval-documents", "8", "--eval-every", "10", "--log-every", "1", "--sample-tokens", "4",
        "--learning-rate", "1e-3", "--sample-prompts", "the cat",
        "--compilation-cache-dir", str(place.parent / "compiled"), *more,
    ]  # fmt: skip


def run_of(place, run, *more):
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("smollm_jax.runs.metrics.say", lines.append)
        code = run_main(lambda: fit(parse(flags_of(place, run, *more)), StopRequest()))
    return code, "\n".join(lines)


@pytest.fixture(scope="module")
def finished(place):
    code, told = run_of(place, "run")
    assert code == 0, told
    return place / "run", told


def settings_of(run):
    return from_dict(json.loads((run / "config.json").read_text()))


def first_batch(run):
    config, tokenizer = settings_of(run), load_tokenizer(str(run / "tokenizer"))
    return next(BatchIterator(Loader(config, tokenizer, held_out(config.data, tokenizer)), None))[0]


def test_the_first_loss_is_ln_2_and_training_parts_the_answers(finished):
    run, told = finished
    lines = [line for line in read_metrics(run) if "loss" in line]
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert lines[0]["rewards/margins"] == lines[0]["rewards/accuracies"] == 0
    assert np.mean([line["loss"] for line in lines[-5:]]) < 0.6
    assert np.mean([line["rewards/accuracies"] for line in lines[-5:]]) > 0.7
    config = settings_of(run)
    assert lines[-1]["step"] == config.total_steps
    assert f"by 4: {config.total_steps:,} steps" in told
    assert "pairs, by all data" in told
    assert re.search(r"step +\d+/\d+  loss 0\.\d+, chosen preferred \d+\.\d% \(margin ", told)
    assert "held-out loss 0.6931, chosen preferred 0.0% (margin 0.000), " in told


def test_metrics_hold_the_figures_of_both_answers_and_the_dropped_pairs(finished):
    run, _ = finished
    before, *lines = read_metrics(run)
    batch = first_batch(run)
    assert (before["step"], before["eval_loss"]) == (0, pytest.approx(math.log(2), abs=1e-6))
    assert set(FIGURES) | {"pairs", "padding_share", "dropped_pairs"} <= lines[0].keys()
    params = init_params(MODEL, 0)
    sums = jax.jit(make_logprobs(settings_of(run), dtype=np.float32))(params, batch.tokens, batch.segment_ids)
    pairs = len(list(pair_keys(batch)))
    assert lines[0]["pairs"] == pairs
    assert lines[0]["logps/chosen"] == pytest.approx(float(sums[..., 0].sum()) / pairs, rel=1e-5)
    assert lines[0]["logps/rejected"] == pytest.approx(float(sums[..., 1].sum()) / pairs, rel=1e-5)
    assert lines[0]["tokens"] == np.sum(batch.segment_ids[:, 1:] > 0)
    assert lines[-2]["dropped_pairs"] >= 2 * 10
    last = [line for line in lines if "eval_loss" in line][-1]
    assert {f"eval_{name}" for name in FIGURES} <= last.keys()
    assert last["eval_loss"] != pytest.approx(math.log(2), abs=1e-3)
    parted = last["eval_rewards/chosen"] - last["eval_rewards/rejected"]
    assert last["eval_rewards/margins"] == pytest.approx(parted, rel=1e-5)
    assert last["eval_bits_per_byte"] > 0
    assert any(b"train/rewards/margins" in file.read_bytes() for file in (run / "tensorboard").iterdir())


def test_the_reference_is_the_model_the_run_began_with_on_every_pair(finished):
    run, _ = finished
    config, reference = settings_of(run), Reference.load(run / "reference.npz")
    tokenizer = load_tokenizer(str(run / "tokenizer"))
    batches = BatchIterator(Loader(config, tokenizer, held_out(config.data, tokenizer)), None)
    logprobs = jax.jit(make_logprobs(config, dtype=np.float32))
    params, seen = init_params(MODEL, 0), set()
    while (item := next(batches, None)) is not None:
        batch, _ = item
        sums = logprobs(params, batch.tokens, batch.segment_ids)
        np.testing.assert_allclose(reference.of(batch), sums, rtol=1e-5, atol=1e-5)
        seen |= {key for _, _, key in pair_keys(batch)}
    assert seen < set(reference.sums), "the held-out pairs are missing"
    assert reference.about["complete"]


def test_the_card_says_how_it_was_trained(finished):
    run, _ = finished
    card = (run / "export" / "README.md").read_text()
    assert "direct preference optimization" in card
    assert "`sigmoid, beta 0.5`" in card
    assert "Held-out accuracy" in card
    assert json.loads((run / "export" / "generation_config.json").read_text())["eos_token_id"] == 2


@pytest.mark.slow
def test_a_resumed_run_needs_its_own_reference(finished, place, capfd):
    run, _ = finished
    path = run / "reference.npz"
    whole = path.read_bytes()
    reference = Reference.load(path)
    assert run_of(place, "run")[0] == 0
    other = Reference(reference.about, dict.fromkeys(reference.sums, (0.0, 0.0)))
    other.save(path)
    capfd.readouterr()
    try:
        assert run_of(place, "run")[0] == 2
        assert "is of other weights or data than checkpoint" in capfd.readouterr().err
        path.write_bytes(whole[:100])
        assert run_of(place, "run")[0] == 2
        assert "reference.npz is damaged" in capfd.readouterr().err
        path.unlink()
        assert run_of(place, "run")[0] == 2
        assert "reference.npz is missing, which holds the reference log-probs" in capfd.readouterr().err
    finally:
        path.write_bytes(whole)
    assert run_of(place, "run", "--beta", "0.1")[0] == 2
    assert "preference.beta was 0.5, is 0.1" in capfd.readouterr().err


@pytest.mark.release
def test_a_start_before_the_first_checkpoint_takes_what_is_there_if_it_fits(place):
    flags = ("--steps", "4", "--no-export", "--eval-every", "0", "--pair-loss", "ipo", "--stop-after", "2")
    _, told = run_of(place, "again", *flags)
    assert "reference   computing" in told
    for name in ("checkpoints", "metrics.jsonl", "config.json"):
        path = place / "again" / name
        path.rename(place / f"away-{name}")
    _, told = run_of(place, "again", *flags)
    assert "reference   computing" not in told
    assert "reference   log-probs of" in told
    lines = [line for line in read_metrics(place / "again") if "loss" in line]
    assert lines[0]["loss"] == pytest.approx((1 / (2 * 0.5)) ** 2, rel=1e-6)
    (place / "again" / "checkpoints").rename(place / "away-too")
    _, told = run_of(place, "again", *flags, "--batch-size", "8", "--mesh", "data=2", "--grad-accum", "2")
    assert "reference   computing" in told, "other rows need other pairs"


@pytest.mark.release
def test_what_computes_the_reference_leaves_the_training_data_open(place):
    """A source that is closed ends a slow read of the Hub, and the run with it."""
    closed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("smollm_jax.training.reference.heldout_batches", lambda run: closed.extend(
            source.closed.is_set() for source, _ in run.stream.loader.mixture
        ) or iter([]))  # fmt: skip
        run_of(place, "open", "--steps", "1", "--no-export", "--eval-every", "0")
    assert closed == [False]


def test_pairs_are_known_by_their_tokens_and_targets(finished):
    batch = first_batch(finished[0])
    keys = [key for _, _, key in pair_keys(batch)]
    turned = replace(batch, segment_ids=np.where(batch.segment_ids == 2, -2, batch.segment_ids))
    assert len(set(keys)) == len(keys)
    assert [key for _, _, key in pair_keys(turned)] != keys
    upside = replace(batch, tokens=batch.tokens[::-1], segment_ids=batch.segment_ids[::-1])
    assert {key for _, _, key in pair_keys(upside)} == set(keys)
    with pytest.raises(UserError, match="no reference log-probs"):
        Reference({}).of(batch)
    with pytest.raises(UserError, match="is missing"):
        Reference.load(finished[0] / "nothing.npz")


@pytest.mark.slow
@pytest.mark.release
def test_pairs_are_annealed_against_the_reference_of_their_run(place):
    assert run_of(place, "stopped", "--stop-after", "6")[0] == 0
    argv = [str(place / "stopped"), *"--from 6 --steps 4 --run-dir".split(), str(place / "annealed")]
    assert run_main(lambda: command("anneal", argv, "smollm")) == 0
    lines = [line for line in read_metrics(place / "annealed") if "loss" in line]
    assert [line["step"] for line in lines] == [7, 8, 9, 10]
    assert lines[0]["rewards/margins"] != 0  # against the start of the run, not of the branch
    one, other = (Reference.load(place / run / "reference.npz").digest for run in ("stopped", "annealed"))
    assert one == other
