"""Find the largest batch per chip that fits TPU slices which are not here: `python -m benchmarks.plan`.

The batch is a power of two whose step the TPU's compiler accepts; the search starts at the size that the formulas
give. No TPU has run any of it: memory is the compiled program's; messages and speed are estimates.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from benchmarks.harness.tables import Row, as_command, finish, gib
from benchmarks.harness.workload import Preset, config_of
from smollm_jax.config.architecture import MODELS
from smollm_jax.config.settings import ComputeConfig, Config

if TYPE_CHECKING:
    from smollm_jax.planning.topology import Topology

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v5e:4x4", "v5e:16x16", "v5p:4x4x4")
PRESETS: tuple[Preset, ...] = ("135M", "360M", "1.7B")


def plan(
    *,
    presets: tuple[Preset, ...] = PRESETS,
    topologies: tuple[str, ...] = TOPOLOGIES,
    seq_len: int = 2_048,
    minutes: float = 60.0,
) -> int:
    """Plan each preset on each topology at the largest batch that fits, with remat full.

    Args:
        presets: Architectures.
        topologies: As `python -m smollm_jax plan` takes them.
        seq_len: Tokens per row.
        minutes: No row begins after this time.
    """
    import jax

    jax.config.update("jax_platforms", "cpu")
    began, rows = time.monotonic(), []
    for topology in topologies:
        for preset in presets:
            if time.monotonic() - began > 60 * minutes:
                print(f"no time for {preset} on {topology}", file=sys.stderr)
                continue
            rows.append(at_the_limit(preset, topology, seq_len))
            print(rows[-1], file=sys.stderr, flush=True)
    finish("plan", rows, seq_len=seq_len)
    return 0


def at_the_limit(preset: Preset, topology: str, seq_len: int) -> Row:
    """Return a row of the table: the plan with the largest batch that fits."""
    from smollm_jax.planning.plan import Plan, as_dict, attempt
    from smollm_jax.planning.topology import topology_of

    began, target = time.monotonic(), topology_of(topology)
    chips = len(target.devices)
    mesh = mesh_for(preset, chips, target.memory_bytes)

    def config_for(batch_per_chip: int) -> Config:
        compute = ComputeConfig(mesh=mesh, remat="full")
        return config_of(preset, batch_per_chip * chips, seq_len, compute)

    def tried(batch_per_chip: int) -> Plan:
        return attempt(config_for(batch_per_chip), target, "full")

    batch = first_guess(config_for, target)
    best = tried(batch)
    if best.fits:
        while (larger := tried(2 * batch)).fits:
            best, batch = larger, 2 * batch
    else:
        while not best.fits and batch > 1:
            batch //= 2
            best = tried(batch)
    row, found = {"model": preset, "topology": topology, "mesh": mesh}, as_dict(best)
    if not found["fits"]:
        return row | {"batch a chip": "none"}
    speed = found["estimate"]
    return row | {
        "batch a chip": batch,
        "memory, GiB": gib(found["memory_bytes"]),
        "of": gib(found["memory_limit_bytes"]),
        "estimated MB sent a chip": sum(found["bytes_sent_per_step"].values()) / 1e6,
        "estimated step, s": speed["step_seconds"],
        "estimated tokens/s": speed["tokens_per_second"],
        "estimated MFU": speed["mfu"],
        "took, s": time.monotonic() - began,
    }


def mesh_for(preset: Preset, chips: int, memory_bytes: int) -> str:
    """Return all chips on data, or the smallest fsdp that leaves half the memory beside state and gradients."""
    needed, fsdp = 18 * MODELS[preset].num_parameters, 1
    while needed / fsdp > memory_bytes / 2 and fsdp < chips:
        fsdp *= 2
    return f"data={chips // fsdp}" + (f",fsdp={fsdp}" if fsdp > 1 else "")


def first_guess(config_for: Callable[[int], Config], target: Topology) -> int:
    """Return the largest power of two that by formula fits the memory."""
    from smollm_jax.planning.estimate import memory_bytes
    from smollm_jax.planning.plan import step_of

    batch = 1
    while batch < 4_096 and memory_bytes(step_of(config_for(2 * batch), target, "full")) <= target.memory_bytes:
        batch *= 2
    return batch


if __name__ == "__main__":
    as_command(plan, "plan")
