"""Settings for every test: CPU only, no network, numbers that do not depend on the machine's accelerator."""

import os
import sys

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.pop("HF_HUB_OFFLINE", None)  # the tests of the Hub bring their own, on loopback
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")


@pytest.fixture(autouse=True, scope="module")
def _no_more_memory_than_one_file_needs():
    """JAX keeps every program it compiled: 7 GB at the end of all tests."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
