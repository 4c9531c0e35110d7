"""Use a run folder from the outside: lock, open, convert, replay, read metrics."""

from smollm_jax.runs.convert import export_run, import_run
from smollm_jax.runs.load import load_model
from smollm_jax.runs.lock import RunLock
from smollm_jax.runs.metrics import RunMetrics
from smollm_jax.runs.replay import replay_step

__all__ = ["RunLock", "RunMetrics", "export_run", "import_run", "load_model", "replay_step"]
