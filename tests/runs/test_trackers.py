"""Trackers get every line of a run once, over resumes, and a tracker that fails ends nothing."""

import json
import sqlite3
import struct
from dataclasses import replace

import pytest

from smollm_jax.config.settings import Config, RunConfig
from smollm_jax.runs.metrics import RunMetrics
from smollm_jax.runs.places import check_places
from smollm_jax.runs.records import keep_records, record_scores
from smollm_jax.runtime.errors import UserError

SPEED = {"tokens_per_second": 1.0, "learning_rate": 0.1, "grad_norm": 1.0}


def config_for(folder, report_to):
    return Config(run=RunConfig(run_dir=str(folder), report_to=report_to))


def report(folder, report_to, *, start, last):
    """A part of a run: a line every step, an evaluation every second one."""
    written = RunMetrics(folder, start=start, config=config_for(folder, report_to))
    for step in range(start + 1, last + 1):
        written.train({"step": step, "loss": 1.0 / step, **SPEED})
        if step % 2 == 0:
            line = {"step": step, "eval_loss": 2.0 / step, "eval_bits_per_byte": 1.0, "eval_tokens": 7}
            line |= {"eval_seconds": 0.1, "tasks/quiz/acc": 0.5}
            written.evaluation(line, [("a <prompt>", " and more")])
    return written


def resumed(folder, report_to):
    """A run that stops at step 3, is killed at step 5 after a checkpoint at step 3, and ends at step 6."""
    report(folder, report_to, start=0, last=3).close()
    report(folder, report_to, start=3, last=5).close()
    keep_records(folder, 3)
    report(folder, report_to, start=3, last=6).close()


@pytest.mark.slow
def test_trackio_has_every_step_once(tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio")
    store = tmp_path / "store"
    store.mkdir()
    for module in (trackio.utils, trackio.sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", store)
    folder = tmp_path / "run"
    folder.mkdir()
    resumed(folder, "tensorboard,trackio")
    (database,) = store.rglob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert len({name for name, _, _ in rows}) == 1
    lines = [(step, json.loads(metrics)) for _, step, metrics in rows]
    losses = [(step, line["train/loss"]) for step, line in lines if "train/loss" in line]
    assert losses == [(step, pytest.approx(1 / step)) for step in range(1, 7)]
    scores = [(step, line["eval/loss"], line["tasks/quiz/acc"]) for step, line in lines if "eval/loss" in line]
    assert scores == [(step, 2 / step, 0.5) for step in (2, 4, 6)]
    assert [step for step, line in lines if "samples/a <prompt>" in line] == [2, 4, 6]
    assert sum("loss plot" in line for _, line in lines) == 3


def log_records(data):
    """The records of a file in LevelDB's log format, as wandb keeps them offline after seven bytes."""
    at, record = 7, b""
    while at + 7 <= len(data):
        if (left := 32_768 - at % 32_768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


@pytest.mark.slow
def test_wandb_has_every_step_once_in_offline_mode(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = tmp_path / "run"
    folder.mkdir()
    resumed(folder, "wandb")
    losses, ids = [], set()
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns):
        for data in log_records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            ids |= {record.run.run_id} - {""}
            items = {x.key or "/".join(x.nested_key): json.loads(x.value_json) for x in record.history.item}
            if "train/loss" in items:
                losses.append((items["step"], items["train/loss"]))
    assert losses == [(step, pytest.approx(1 / step)) for step in range(1, 7)]
    assert ids == {json.loads((folder / "trackers.json").read_text())["id"]}
    assert not (folder / "tensorboard").exists(), "not asked for"


class Fake:
    """A tracker's module that fails at a step."""

    def __init__(self, fails_at=99):
        self.lines, self.fails_at, self.finished = [], fails_at, 0

    def init(self, **about):
        self.about = about
        return self

    def Settings(self, **settings):
        return settings

    def define_metric(self, *_, **__):
        pass

    def log(self, content, step=None):
        step = content["step"] if step is None else step
        if step >= self.fails_at:
            raise ConnectionError("the network is down")
        self.lines.append((step, content))

    def finish(self):
        self.finished += 1

    def Markdown(self, text):
        return text

    Image = Html = Markdown


def test_a_tracker_that_fails_is_told_once_and_the_records_go_on(tmp_path, monkeypatch, capsys):
    fake = Fake(fails_at=3)
    monkeypatch.setattr("smollm_jax.runs.trackers.import_module", lambda _: fake)
    monkeypatch.setattr("smollm_jax.runs.trackers.find_spec", lambda _: True)
    report(tmp_path, "trackio", start=0, last=6).close()
    assert (
        capsys.readouterr().err.count("trackio gets no more of this run (ConnectionError: the network is down)")
        == 1
    )
    assert {step for step, _ in fake.lines} == {1, 2}
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 9


def test_a_tracker_asked_for_late_gets_the_lines_before(tmp_path, monkeypatch):
    fake = Fake()
    monkeypatch.setattr("smollm_jax.runs.trackers.import_module", lambda _: fake)
    monkeypatch.setattr("smollm_jax.runs.trackers.find_spec", lambda _: True)
    report(tmp_path, "tensorboard", start=0, last=3).close()
    report(tmp_path, "trackio", start=3, last=5).close()
    assert [step for step, line in fake.lines if "train/loss" in line] == [1, 2, 3, 4, 5]
    assert fake.about["resume"] == "allow"
    assert fake.about["config"]["run"]["report_to"] == "trackio"
    assert fake.finished == 1


def test_scores_of_a_checkpoint_are_sent_as_often_as_it_is_scored(tmp_path, monkeypatch):
    fake = Fake()
    monkeypatch.setattr("smollm_jax.runs.trackers.import_module", lambda _: fake)
    monkeypatch.setattr("smollm_jax.runs.trackers.find_spec", lambda _: True)
    report(tmp_path, "trackio", start=0, last=2).close()
    for task in ("quiz", "riddle"):
        record_scores(tmp_path, 2, {f"{task}/acc": 0.5}, None, None)
    for _ in range(2):
        report(tmp_path, "trackio, trackio", start=2, last=2).close()
    scored = [line for step, line in fake.lines if step == 2 and any("tasks/" in name for name in line)]
    assert [next(name for name in line if "tasks/" in name) for line in scored][-2:] == [
        "tasks/quiz/acc",
        "tasks/riddle/acc",
    ]
    assert len(scored) == 3, "the evaluation's own too"


def test_two_trackers_have_one_id_from_the_first_line_to_the_resumed_ones_and_publish_nothing(
    tmp_path, monkeypatch
):
    fakes = {"trackio": Fake(), "wandb": Fake()}
    monkeypatch.setattr("smollm_jax.runs.trackers.import_module", fakes.get)
    monkeypatch.setattr("smollm_jax.runs.trackers.find_spec", lambda _: True)
    ids = []
    for start, last in ((0, 3), (3, 5)):
        report(tmp_path, "trackio,wandb", start=start, last=last).close()
        ids += [fakes["trackio"].about["name"].removeprefix(f"{tmp_path.name}-"), fakes["wandb"].about["id"]]
    assert len(set(ids)) == 1
    assert (fakes["trackio"].about["embed"], fakes["trackio"].about["private"]) == (False, True)
    sent = fakes["wandb"].about["settings"]
    assert sent["console"] == "off"
    assert all(sent[name] for name in ("disable_git", "x_disable_meta", "x_disable_stats"))
    for fake in fakes.values():
        assert [step for step, line in fake.lines if "train/loss" in line] == [1, 2, 3, 4, 5]


def test_an_unknown_or_missing_tracker_is_told_before_the_start(tmp_path, monkeypatch):
    config = Config(data=replace(Config().data, data="builtin:python-docs"))
    for name, words in (("mlflow", "expected tensorboard, trackio, wandb"), ("wandb", "needs the package wandb")):
        monkeypatch.setattr("smollm_jax.runs.trackers.find_spec", lambda _: None)
        with pytest.raises(UserError, match=words):
            check_places(replace(config, run=RunConfig(run_dir=str(tmp_path), report_to=name)))
