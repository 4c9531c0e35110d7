"""Store training states: written asynchronously, sealed by a manifest, verified before use."""

from smollm_jax.checkpoint.listing import list_checkpoints
from smollm_jax.checkpoint.manager import CheckpointManager, read_params

__all__ = ["CheckpointManager", "list_checkpoints", "read_params"]
