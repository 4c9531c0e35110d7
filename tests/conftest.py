"""Settings for every test: CPU only, no network, numbers that do not depend on the machine's accelerator."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.pop("HF_HUB_OFFLINE", None)  # the tests of the Hub bring their own, on loopback
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
