"""Settings for every test: eight CPU devices, strict rank promotion, no network, no accelerator."""

import json
import logging
import os
import random
import subprocess
import sys

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # half the time goes into compiling; read on import

import jax
import pytest

from smollm_jax.tokenizer.load import train_tokenizer
from tests.support.paths import ROOT
from tests.support.runs import TINY

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.pop("HF_HUB_OFFLINE", None)  # the tests of the Hub bring their own, on loopback
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
# by jax.config: JAX has read its variables already, and the processes that tests start would inherit XLA_FLAGS
jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def _no_more_memory_than_one_file_needs():
    """Drop compiled programs after each file: JAX keeps every one, 7 GB at the end of all tests."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def settings_restored():
    """Put back what a run sets in its process."""
    options = ("jax_default_matmul_precision", "jax_compilation_cache_dir")
    before, handlers = {name: getattr(jax.config, name) for name in options}, logging.root.handlers[:]
    yield
    logging.root.handlers[:] = handlers
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def optimized(monkeypatch):
    """Compile as users do, here and in the processes that the test starts."""
    before = jax.config.read("jax_disable_most_optimizations")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A folder of compiled programs, shared by all workers and by the processes that tests start."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "compiled"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(autouse=True, scope="session")
def _shared_cache(cache):
    """Read and write the shared folder in this process too."""
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """120 documents of words in a random order, in two files."""
    rng = random.Random(0)
    words = "the cat sat on a mat and saw one bird fly over tall grey hills near our old red house".split()
    folder = tmp_path_factory.mktemp("corpus")
    for part in range(2):
        lines = [
            json.dumps({"text": f"{part}-{i} " + " ".join(rng.choices(words, k=rng.randint(5, 60)))})
            for i in range(60)
        ]
        (folder / f"part-{part}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory, corpus):
    texts = [json.loads(line)["text"] for path in corpus.iterdir() for line in path.read_text().splitlines()]
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(texts, 300).save(folder)
    return folder


@pytest.fixture(scope="session")
def train_in(cache, corpus, tokenizer):
    """Starts `train_jax.py` on the corpus, in a run folder."""

    def start(folder, *flags, data=None):
        command = [
            sys.executable, str(ROOT / "train_jax.py"), "--data", data or f"{corpus}/*.jsonl", *TINY,
            "--tokenizer", str(tokenizer), "--compilation-cache-dir", str(cache), "--run-dir", str(folder), *flags,
        ]  # fmt: skip
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )

    return start


@pytest.fixture
def train(tmp_path, train_in):
    """Starts `train_jax.py` on the corpus in a folder of the test's own."""
    return lambda *flags, run="run", data=None: train_in(tmp_path / run, *flags, data=data)
