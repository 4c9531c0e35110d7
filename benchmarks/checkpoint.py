"""Time checkpoints and the batch hash: `python -m benchmarks.checkpoint`.

The state is a model's parameters and both moments in f32. A save blocks the loop for a short time, is written and
verified in the background, and is restored; the ledger hashes a batch.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.harness.tables import as_command, finish, spread
from benchmarks.harness.workload import Preset
from smollm_jax.config.architecture import MODELS
from smollm_jax.config.recipes import RECIPES
from smollm_jax.config.settings import DataConfig


def checkpoint(*, preset: Preset = "135M", rounds: int = 5, folder: str | None = None) -> int:
    """Time saving, verifying and restoring a training state, and hashing a batch.

    Args:
        preset: Architecture.
        rounds: Rounds counted.
        folder: Where to write; default: the temporary folder.
    """
    import jax

    from smollm_jax.checkpoint.listing import list_checkpoints
    from smollm_jax.checkpoint.manager import CheckpointManager
    from smollm_jax.data.batch_hash import batch_hash, extend
    from smollm_jax.data.packing import Batch
    from smollm_jax.distributed.sharding import make_mesh
    from smollm_jax.training.step import abstract_state, init_state

    model = MODELS[preset]
    data = DataConfig(seq_len=min(DataConfig().seq_len, model.max_seq_len))
    config = replace(RECIPES["replica"], preset=preset, model=model, data=data)
    mesh = make_mesh(config)
    state = jax.block_until_ready(init_state(config, mesh))
    rows, length = config.main_batch_size, config.data.seq_len + 1
    batch = Batch(np.ones((rows, length), np.int32), np.ones((rows, length), np.int32))
    where = Path(tempfile.mkdtemp(prefix="checkpoint-benchmark-", dir=folder))
    seconds: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], object]) -> None:
        began = time.perf_counter()
        work()
        seconds.setdefault(name, []).append(time.perf_counter() - began)

    def counted() -> str:
        return extend("0" * 32, batch_hash(batch.tokens, batch.segment_ids))

    try:
        checkpoints = CheckpointManager(where, keep_last=1, keep_every=0)
        checkpoints.prepare(state)
        timed("memory made ready, while the compiler is at work", checkpoints.copies.wait)
        for step in range(1, rounds + 1):
            timed("the loop stands still", lambda step=step: checkpoints.save(step, state, {}))  # type: ignore[misc]
            timed("written behind it", checkpoints.wait)
            timed("verified", lambda: list_checkpoints(where))
            timed("restored", lambda step=step: checkpoints.restore(step, abstract_state(config, mesh)))  # type: ignore[misc]
            timed(f"ledger of a batch of {rows} x {length - 1}", counted)
        size = sum(path.stat().st_size for path in where.rglob("*") if path.is_file())
    finally:
        shutil.rmtree(where)
    table = [{"what": name, "seconds": spread(values)} for name, values in seconds.items()]
    finish(f"checkpoint, {preset}", table, rounds=rounds, bytes=size)
    return 0


if __name__ == "__main__":
    as_command(checkpoint, "checkpoint")
