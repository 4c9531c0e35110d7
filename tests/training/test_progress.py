"""Figures of metrics.jsonl against arithmetic, and what counts as a bad step."""

import dataclasses
import json
import time
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from smollm_jax.config.preference import FIGURES
from smollm_jax.config.settings import Config, DataConfig, RunConfig
from smollm_jax.distributed.processes import Processes
from smollm_jax.runtime.signals import StopRequest
from smollm_jax.training import loop, progress
from smollm_jax.training.progress import report_step, write_line
from smollm_jax.training.run import Interval, Pending, Progress, save_due
from smollm_jax.training.step import Vote


class Recorded(list):
    """A list of metrics lines in the place of the run's records."""

    train = list.append

    def say(self, message):
        """Drop what would be shown."""

    progress = say


@pytest.fixture
def run():
    config = Config(run=RunConfig(phases="100x4", log_every=1000, checkpoint_every=3), data=DataConfig(seq_len=32))
    return SimpleNamespace(
        dtype=np.dtype("float32"),
        config=config, job=Processes(), report=Recorded(), progress=Progress(), ledgers={}, interval=Interval(),
        mesh=SimpleNamespace(
            devices=np.array(jax.devices()[:1] * 4), size=4,
            local_mesh=SimpleNamespace(devices=np.array(jax.devices()[:1])),
        ), clock=time.monotonic(), saved=0,
    )  # fmt: skip


def pending(step, *, targets, finite=True, loss=2.5):
    metrics = {
        "loss": np.float32(loss), "grad_norm": np.float32(1.5), "learning_rate": np.float32(1e-3),
        "targets": np.int32(targets), "finite": np.bool_(finite), "batch_hash": np.full(4, step, np.uint32),
    }  # fmt: skip
    return Pending(step, metrics, None, {"skipped": 7}, time.monotonic())


def test_tokens_are_the_targets_of_all_steps_and_rates_those_of_the_interval(run):
    for step, targets in ((2, 100), (3, 20), (4, 60)):
        report_step(run, pending(step, targets=targets))
    run.interval.began = time.monotonic() - 10
    write_line(run)
    [line] = run.report
    assert line["step"] == 4
    assert line["tokens"] == 180
    assert line["tokens_per_second"] == pytest.approx(18, rel=0.05)
    assert line["step_seconds"] == pytest.approx(10 / 3, rel=0.05)
    assert line["skipped_documents"] == 7
    report_step(run, pending(5, targets=40))
    run.interval.began = time.monotonic() - 2
    write_line(run)
    assert run.report[1]["tokens"] == 220
    assert run.report[1]["tokens_per_second"] == pytest.approx(20, rel=0.05)


def test_figures_of_pairs_are_means_over_all_pairs_since_the_last_line(run):
    run.config = replace(run.config, data=replace(run.config.data, data_kind="pairs"))
    for step, pairs, value in ((2, 3, 0.5), (3, 1, 0.9)):
        sent = pending(step, targets=10)
        sent.metrics.update({"pairs": np.int32(pairs), "filled": np.int32(20)})
        sent.metrics.update(dict.fromkeys(FIGURES, np.float32(value)))
        report_step(run, sent)
    resumed = Progress(**dataclasses.asdict(run.progress))
    for counted in (run.progress, resumed):
        run.progress, run.interval = counted, Interval(steps=2, latest=(sent, sent.metrics))
        write_line(run)
        assert run.report[-1]["pairs"] == 4
        assert [run.report[-1][name] for name in FIGURES] == pytest.approx([(3 * 0.5 + 0.9) / 4] * len(FIGURES))
    assert run.progress.figures == {}


def test_mfu_is_the_flops_of_all_positions_over_the_peak_of_all_devices(run, monkeypatch):
    monkeypatch.setattr(progress, "peak_flops", lambda *_: 1e12)
    report_step(run, pending(2, targets=10))
    run.interval.began = time.monotonic() - 5
    write_line(run)
    model = run.config.model
    weights = model.num_parameters  # the head is tied: the embedding counts once, as the head
    attention = model.num_layers * 32 * model.num_heads * model.head_dim
    flops = 4 * 32 * 6 * (weights + attention)
    assert run.report[0]["mfu"] == pytest.approx(flops / 5 / (4 * 1e12), rel=0.05)


def test_the_loss_is_the_mean_over_the_tokens_since_the_line_before(run):
    steps = [(2, 100, 4.0), (3, 20, 1.0), (4, 60, 2.0)]
    for step, targets, loss in steps:
        report_step(run, pending(step, targets=targets, loss=loss))
    report_step(run, pending(5, targets=9, loss=np.nan, finite=False))
    write_line(run)
    report_step(run, pending(6, targets=30, loss=1.5))
    write_line(run)
    first, second = run.report
    assert first["loss"] == (100 * 4.0 + 20 * 1.0 + 60 * 2.0) / 180
    assert (first["step_loss"], second["loss"], second["step_loss"]) == (None, 1.5, 1.5)
    report_step(run, pending(7, targets=9, loss=np.nan, finite=False))
    write_line(run)
    assert run.report[2]["loss"] is None


def test_a_resume_in_the_middle_of_an_interval_gives_the_same_loss(run):
    losses = np.random.default_rng(0).uniform(1, 4, 7).astype(np.float32)
    lines = []
    for stop in (None, 3):
        run.progress, run.interval = Progress(), Interval()
        for step, loss in enumerate(losses, start=2):
            if step == stop:  # killed after a checkpoint
                saved = json.loads(json.dumps(dataclasses.asdict(run.progress)))
                run.progress, run.interval = Progress(**saved), Interval()
            report_step(run, pending(step, targets=100 + step, loss=loss))
        write_line(run)
        lines.append(run.report.pop())
    assert lines[0]["loss"] == lines[1]["loss"]
    assert lines[0]["loss"] == pytest.approx(float(np.average(losses, weights=range(102, 109))))


def test_time_and_memory_are_in_every_line(run):
    run.clock -= 5
    run.progress.elapsed_seconds = 100.0
    report_step(run, pending(2, targets=10))
    write_line(run)
    [line] = run.report
    assert abs(line["time"] - time.time()) < 5
    assert 105 <= line["elapsed_seconds"] < 110
    assert 0.05 < line["peak_memory_gib"] < 100


def test_no_mfu_where_the_peak_is_unknown(run):
    report_step(run, pending(2, targets=10))
    write_line(run)
    assert "mfu" not in run.report[0]


def test_a_line_is_written_once(run):
    report_step(run, pending(2, targets=10))
    write_line(run)
    write_line(run)
    assert len(run.report) == 1
    json.dumps(run.report[0], allow_nan=False)


def test_no_checkpoint_in_a_row_of_bad_steps_and_one_after_it(run):
    run.progress.step = 3
    assert save_due(run)
    report_step(run, pending(3, targets=10, finite=False))
    assert not save_due(run)
    report_step(run, pending(4, targets=10))
    run.progress.step = 6
    assert (run.progress.bad_steps, run.progress.bad_steps_in_a_row) == (1, 0)
    assert save_due(run)


def test_a_step_that_overflows_float16_is_skipped_and_no_bad_step(run):
    count = 2 * run.config.optimizer.max_bad_steps
    for step in range(3, 3 + count):
        one = pending(step, targets=10, finite=False)
        one.metrics |= {"overflow": np.bool(True), "loss_scale": np.float32(32_768)}
        report_step(run, one)
    assert (run.progress.bad_steps, run.progress.bad_steps_in_a_row) == (0, 0)
    write_line(run)
    line = run.report[-1]
    assert (line["loss_scale"], line["skipped_steps"], line["bad_steps"]) == (32_768, count, 0)


@pytest.mark.parametrize(
    ("bad", "saved"), [((), [3, 6, 9, 10]), ((2,), [3, 6, 9, 10]), ((5,), [3, 6, 9, 10]), ((6,), [3, 7, 9, 10]),
                       ((6, 7, 8, 9), [3, 10])]
)  # fmt: skip
def test_a_checkpoint_after_a_bad_step_of_its_own_follows_the_next_good_step(run, monkeypatch, bad, saved):
    """The loop decides while the step is on the device, and its metrics are not read."""
    steps = []

    def dispatch(run, _):
        run.progress.step += 1
        return pending(run.progress.step, targets=10, finite=run.progress.step not in bad)

    def save(run):
        if run.progress.step not in steps:
            steps.append(run.progress.step)
            run.saved = run.progress.step

    monkeypatch.setattr(loop, "next_ballot", lambda *_: loop.Ballot(Vote.GO))
    monkeypatch.setattr(loop, "dispatch", dispatch)
    monkeypatch.setattr(loop, "save", save)
    run.config = replace(run.config, run=RunConfig(phases="10x4", eval_every=0, checkpoint_every=3))
    run.evaluated, run.last_step, run.stop = 0, 10, StopRequest()
    assert loop.train(run) == Vote.GO
    assert steps == saved


def test_the_last_step_is_saved_even_if_it_is_bad(run):
    run.progress.step = 100
    report_step(run, pending(100, targets=10, finite=False))
    assert save_due(run)


def test_a_new_interval_begins_with_each_line(run):
    report_step(run, pending(2, targets=10))
    write_line(run)
    assert vars(run.interval).keys() == vars(Interval()).keys()
    assert run.interval.targets == 0


def test_the_documents_of_a_bad_step_replace_a_link_of_their_name(run, tmp_path):
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "bad_step_3.jsonl").symlink_to(tmp_path / "theirs")
    run.run_dir, run.stream = tmp_path, SimpleNamespace(documents_of=lambda _: [{"text": "a"}])
    assert "bad_step_3.jsonl" in progress.write_documents(run, SimpleNamespace(step=3, cursor_before=None))
    assert (tmp_path / "bad_step_3.jsonl").read_text() == '{"text": "a"}\n'
    assert (tmp_path / "theirs").read_text() == "theirs"
