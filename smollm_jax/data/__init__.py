"""Make training batches from documents, each with the cursor from which the next batch follows. No JAX."""

from smollm_jax.data.heldout import held_out
from smollm_jax.data.loader import Loader
from smollm_jax.data.packing import Batch
from smollm_jax.data.sources import open_source

__all__ = ["Batch", "Loader", "held_out", "open_source"]
