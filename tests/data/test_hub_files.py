"""A dataset on a Hub that fails: the same batches as without faults, or an error in one clear line."""

import io
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from smollm_jax.config.settings import Config, DataConfig, RunConfig
from smollm_jax.data import hub_files, sources
from smollm_jax.data.loader import Loader, PrefetchLoader
from smollm_jax.data.sources import open_source
from smollm_jax.runtime import retry
from smollm_jax.runtime.errors import SourceTimeout
from smollm_jax.tokenizer.load import load_tokenizer
from tests.support.hub import KINDS, Hub
from tests.support.paths import ROOT
from tests.support.texts import make_texts, small_tokenizer, write_jsonl, write_parquet

README = """---
configs:
- config_name: parquet
  data_files: [{split: train, path: parquet/train-*}, {split: test, path: parquet/test-*}]
- config_name: lines
  data_files: [{split: train, path: lines/*.jsonl}]
---
"""
TEXTS = make_texts(90, longest=120)


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """The files of the repository `me/texts`."""
    folder = tmp_path_factory.mktemp("repository")
    files = {"README.md": README.encode()}
    for i in range(3):
        part = TEXTS[30 * i : 30 * (i + 1)]
        files[f"parquet/train-{i}.parquet"] = write_parquet(folder / "a.parquet", part).read_bytes()
        files[f"lines/{i}.jsonl"] = write_jsonl(folder / "a.jsonl", part).read_bytes()
    files["parquet/test-0.parquet"] = write_parquet(folder / "a.parquet", TEXTS[:9]).read_bytes()
    return files


@pytest.fixture
def hub(content, tmp_path, monkeypatch):
    """A fresh Hub for the libraries of this process, and short waits."""
    import datasets
    import huggingface_hub

    hub = Hub()
    hub.files["datasets/me/texts"] = dict(content)
    constants = huggingface_hub.constants
    template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(retry, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(retry, "LONGEST_WAIT_SECONDS", 0.2)
    monkeypatch.setattr(sources, "FRESH_SECONDS", 0.5)
    monkeypatch.setattr(retry, "FRESH_SECONDS", 0.5)
    hub_files.list_files.cache_clear()
    yield hub
    hub.stop()


def config_of(name="parquet", **changes):
    return DataConfig(**({"data": f"me/texts:{name}", "seq_len": 32, "shuffle_window": 16, "epochs": 1} | changes))


def texts_of(name="parquet", **changes):
    config = config_of(name, **changes)
    return [document.text for document in open_source(config.data, config).documents()]


def prefetch(config, tokenizer, cursor=None):
    run = RunConfig(seed=1, phases="1000000x4")
    return PrefetchLoader(Loader(Config(data=config, run=run), tokenizer, resumes=cursor is not None), cursor)


def take(config, tokenizer, cursor=None, count=10**6):
    stream = prefetch(config, tokenizer, cursor)
    taken = []
    try:
        while len(taken) < count:
            item = stream.get(timeout=60)
            assert item is not None
            taken.append(item)
    except StopIteration:
        pass
    finally:
        stream.close()
    return taken


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for (batch, cursor), (other, other_cursor) in zip(batches, expected, strict=True):
        assert np.array_equal(batch.tokens, other.tokens)
        assert cursor == other_cursor


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("name", ["parquet", "lines"])
def test_a_dataset_is_read_split_by_split_and_file_by_file(name):
    assert texts_of(name) == TEXTS
    if name == "parquet":
        assert texts_of(name, split="test") == TEXTS[:9]


def test_a_resume_opens_one_file_at_one_row_group(hub):
    source = open_source("me/texts:parquet", config_of())
    documents = list(source.documents())
    hub.ranges = 0
    rest = list(source.documents(documents[76].cursor))
    assert rest == documents[77:]
    assert hub.ranges <= 6  # the footer, and two row groups of seven rows


@pytest.mark.parametrize("name", ["parquet", "lines"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "stall"])
def test_no_fault_changes_the_texts(hub, name, kind):
    hub.faults = [(kind, 0.3)]
    for _ in range(6):
        assert texts_of(name) == TEXTS
    assert hub.met[kind] > 2


@pytest.mark.parametrize("share", [0.05, pytest.param(0.3, marks=pytest.mark.slow)])
def test_faults_of_every_kind_change_no_batch(hub, tokenizer, share):
    config = config_of(epochs=3)
    expected = take(config, tokenizer)
    hub.stall_seconds = 2
    hub.faults = [(kind, share / len(KINDS)) for kind in KINDS]
    assert_same(take(config, tokenizer), expected)
    middle = len(expected) // 2
    assert_same(take(config, tokenizer, expected[middle][1]), expected[middle + 1 :])
    assert sum(hub.met.values()) > 0


def test_a_stalled_read_is_abandoned_and_retried(hub):
    source = open_source("me/texts:lines", config_of("lines"))
    hub.stall_seconds = 60
    hub.faults = [("stall", 0.5)]
    began = time.monotonic()
    assert [document.text for document in source.documents()] == TEXTS
    assert hub.met["stall"] >= 1
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("name", ["parquet", "lines"])
def test_closing_does_not_wait_for_a_stalled_read_and_leaves_no_thread_in_it(hub, tokenizer, monkeypatch, name):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 30)
    config = config_of(name)
    stream = prefetch(config, tokenizer)
    stream.close()
    hub.stall_seconds, hub.faults = 30, [("stall", 1.0)]
    stream = prefetch(config, tokenizer)
    while not hub.met:
        time.sleep(0.01)
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < 2
    assert not stream._thread.is_alive()


EXIT_IN_A_STALL = """
import sys, time
from tests.support.texts import small_tokenizer
from smollm_jax.config.settings import Config, DataConfig, RunConfig
from smollm_jax.data.loader import BatchIterator, Loader, PrefetchLoader
data = DataConfig(data="me/texts:parquet", seq_len=32, shuffle_window=16)
loader = Loader(Config(data=data, run=RunConfig(phases="9x1")), small_tokenizer())
if sys.argv[1] == "prefetch":
    stream = PrefetchLoader(loader, None)
else:
    next(BatchIterator(loader, None))
time.sleep(1)
sys.exit(3)
"""


# the second file is in the window that is read ahead
@pytest.mark.parametrize(("what", "faulty"), [("prefetch", "train-0"), ("batches", "train-1")])
def test_a_process_that_ends_in_a_stalled_read_ends_with_its_own_exit_code(hub, tmp_path, what, faulty):
    hub.stall_seconds = 30
    hub.faults, hub.faulty = [("stall", 1.0)], faulty
    env = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", EXIT_IN_A_STALL, what]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert hub.met["stall"] >= 1


def test_a_read_that_arrives_byte_by_byte_is_abandoned(hub, content, monkeypatch):
    monkeypatch.setattr(hub_files, "BLOCK_SECONDS", 0.3)
    hub.faults = [("drip", 1.0)]
    url, size = hub.endpoint + "/datasets/me/texts/resolve/main/lines/0.jsonl", len(content["lines/0.jsonl"])
    began = time.monotonic()
    with pytest.raises(OSError, match=rf"\d+ bytes came where {size} were asked for"):
        hub_files.fetch_range(hub_files.HubFile("x", url, size, ""), 0, size)
    assert time.monotonic() - began < 5


def test_the_loader_waits_for_a_hub_that_goes_down_and_logs_the_wait(hub, tokenizer, caplog):
    config = config_of(epochs=2)
    expected = take(config, tokenizer)
    stream = prefetch(config, tokenizer)
    taken = [stream.get(timeout=60)]
    with hub.down():
        while (item := stream.get(timeout=1.5)) is not None:
            taken.append(item)
        assert len(taken) < len(expected)
    while len(taken) < len(expected):
        taken.append(stream.get(timeout=60))
    stream.close()
    assert_same(taken, expected)
    assert "waiting for" in caplog.text
    assert "trying again in" in caplog.text


def test_a_hub_that_stays_down_past_the_timeout_is_a_source_timeout(hub, tokenizer):
    config = config_of(epochs=0, data_timeout=0.5)
    stream = prefetch(config, tokenizer)
    assert stream.get(timeout=60) is not None
    began, taken = time.monotonic(), []
    with hub.down():
        with pytest.raises(SourceTimeout, match=r"has not answered for \d+ s"):
            taken.extend(iter(lambda: stream.get(timeout=30), None))
        assert time.monotonic() - began < 15
        stream.close()


def test_a_resumed_run_waits_for_the_list_of_files_and_a_new_one_does_not(hub, tokenizer):
    config = config_of(epochs=1, data_timeout=20)
    expected = take(config, tokenizer)
    hub_files.list_files.cache_clear()
    with hub.down():
        began = time.monotonic()
        with pytest.raises(ValueError, match=r"has not answered for \d+ s .*--recipe quickstart") as caught:
            open_source(config.data, config)
        assert "\n" not in str(caught.value)
        assert time.monotonic() - began < 5
        with pytest.raises(SourceTimeout):
            open_source(config.data, config_of(data_timeout=0.5), resumes=True)
        result = []
        thread = threading.Thread(target=lambda: result.extend(take(config, tokenizer, expected[2][1])))
        thread.start()
        thread.join(1)
        assert thread.is_alive()
    thread.join(60)
    assert_same(result, expected[3:])


@pytest.mark.usefixtures("hub")
def test_a_listing_that_stalls_ends_too(monkeypatch):
    monkeypatch.setattr(hub_files, "LISTING_SECONDS", 0.2)
    release = threading.Event()
    monkeypatch.setattr(hub_files, "_list", lambda *_: release.wait(30))
    with pytest.raises(ValueError, match=r"has not answered for \d+ s"):
        open_source("me/texts:parquet", config_of())
    release.set()


def test_files_that_changed_on_the_hub_are_refused_by_name(hub, content, tokenizer):
    config = config_of()
    cursor = take(config, tokenizer, count=2)[1][1]
    hub_files.list_files.cache_clear()
    hub.commit = "d" * 40  # a new commit that leaves the data alone changes nothing
    assert len(take(config, tokenizer, cursor, 1)) == 1
    hub.files["datasets/me/texts"]["parquet/train-3.parquet"] = content["parquet/test-0.parquet"]
    hub.commit = "e" * 40
    hub_files.list_files.cache_clear()
    with pytest.raises(ValueError, match=r"me/texts:parquet changed .*new or changed: .*train-3\.parquet"):
        take(config, tokenizer, cursor)


@pytest.mark.usefixtures("hub")
def test_a_mistake_in_the_name_is_one_clear_line_at_once():
    for data, split, match in (
        ("me/nothing:parquet", "train", "me/nothing:parquet: no such file here and no such dataset on the Hub"),
        ("me/texts:nothing", "train", "'nothing' not found. Available: .*parquet"),
        ("me/texts:parquet", "nothing", "no split 'nothing' but train, test"),
    ):
        began = time.monotonic()
        with pytest.raises(ValueError, match=match) as caught:
            open_source(data, config_of(data=data, split=split))
        assert "\n" not in str(caught.value)
        assert time.monotonic() - began < 10


def test_a_file_that_the_hub_refuses_stops_the_run_even_if_bad_data_is_skipped(hub):
    config = config_of(on_bad_data="skip")
    source = open_source(config.data, config)
    del hub.files["datasets/me/texts"]["parquet/train-1.parquet"]
    documents = source.documents()
    assert [next(documents).text for _ in range(30)] == TEXTS[:30]
    with pytest.raises(ValueError, match=r"the Hub refuses .*train-1\.parquet: .*404"):
        next(documents)


def test_a_listing_survives_a_hub_that_fails_one_answer_in_three(hub):
    hub.api_faults = hub.faults = [("503", 0.2), ("reset", 0.1)]
    assert texts_of() == TEXTS
    assert sum(hub.met.values()) > 1


@pytest.mark.parametrize("faults", [[], [("truncate", 0.3)]])
def test_a_corrupt_file_on_the_hub_is_named_and_not_retried_for_ever(hub, faults):
    files = hub.files["datasets/me/texts"]
    files["parquet/train-1.parquet"] = b"PAR1" + b"\0" * 400 + b"PAR1"
    hub.faults = faults
    with pytest.raises(ValueError, match=r"train-1\.parquet, from row 0 on, cannot be read"):
        texts_of()
    assert texts_of(on_bad_data="skip") == TEXTS[:30] + TEXTS[60:]


def test_a_remote_file_reads_like_the_bytes_it_holds(hub, content, monkeypatch):
    monkeypatch.setattr(hub_files, "BLOCK_BYTES", 100)
    expected = content["lines/0.jsonl"]
    url = hub.endpoint + "/datasets/me/texts/resolve/main/lines/0.jsonl"
    file = hub_files.HubReader(hub_files.HubFile("x", url, len(expected), ""), timeout=5, closed=threading.Event())
    assert file.read(250) == expected[:250]
    assert file.seek(-30, io.SEEK_END) == len(expected) - 30
    assert file.read(100) == expected[-30:]
    assert file.read(1) == b""
    file.seek(0)
    assert file.read() == expected
    hub.ranges = 0
    file.seek(7)
    assert list(io.BufferedReader(file, 64)) == list(io.BytesIO(expected[7:]))


def test_a_tokenizer_comes_from_the_hub_or_not_within_seconds(hub, tokenizer):
    hub.files["models/me/tok"] = dict(tokenizer.files) | {"model.safetensors": b"\0" * 1_000}
    hub.faults = [("503", 0.2), ("reset", 0.1)]
    assert load_tokenizer("me/tok").files == tokenizer.files
    hub.faults = []
    with pytest.raises(ValueError, match="no such folder here and no such repository"):
        load_tokenizer("me/other")
    with hub.down():
        assert load_tokenizer("me/tok").files == tokenizer.files  # from the cache
        began = time.monotonic()
        with pytest.raises(
            ValueError, match=r"--tokenizer me/third has not answered .*--recipe quickstart"
        ) as caught:
            load_tokenizer("me/third")
        assert "\n" not in str(caught.value)
        assert time.monotonic() - began < 10


@pytest.mark.parametrize(("card", "license_"), [
    (None, None), ({}, None), ({"license": "odc-by"}, "odc-by"), ({"license": ["mit", "cc0-1.0"]}, "mit, cc0-1.0"),
])  # fmt: skip
def test_a_source_knows_revision_and_license(hub, card, license_):
    hub.card = card
    config = config_of()
    source = open_source(config.data, config)
    assert (source.revision, source.license) == (hub.commit, license_)
