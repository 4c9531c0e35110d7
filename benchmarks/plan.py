"""Plans at the limit of memory: the largest batch a chip, a power of two, whose step the TPU's compiler accepts.

No TPU has run any of it: memory and collectives are those of the compiled program, speed is an estimate. The
search begins at what the formulas say and goes up or down from there.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from benchmarks.measure import Row, as_command, finish, gib
from benchmarks.work import Preset, config_of
from smollm_jax.config.architecture import MODELS
from smollm_jax.config.settings import ComputeConfig, Config

if TYPE_CHECKING:
    from smollm_jax.planning.plan import CompileResult
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
        seq_len: Tokens a row.
        minutes: No row is begun after so many.
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
    """A row of the table: the plan with the largest batch that fits."""
    import jax.numpy as jnp

    from smollm_jax.planning.plan import attempt, plan_of
    from smollm_jax.planning.report import as_dict
    from smollm_jax.planning.topology import topology_of

    began, target, dtype = time.monotonic(), topology_of(topology), jnp.dtype("bfloat16")
    chips = len(target.devices)
    mesh = mesh_for(preset, chips, target.memory_bytes)

    def config_for(batch_a_chip: int) -> Config:
        return config_of(preset, batch_a_chip * chips, seq_len, ComputeConfig(mesh=mesh, remat="full"))

    def tried(batch_a_chip: int) -> CompileResult:
        return attempt(config_for(batch_a_chip), target, dtype, "full")

    batch = first_guess(config_for, target)
    best = tried(batch)
    if best.memory_bytes <= target.memory_bytes:
        while (larger := tried(2 * batch)).memory_bytes <= target.memory_bytes:
            best, batch = larger, 2 * batch
    else:
        while best.memory_bytes > target.memory_bytes and batch > 1:
            batch //= 2
            best = tried(batch)
    found = as_dict(plan_of(target, best, dtype))
    if not found["fits"]:
        return {"model": preset, "topology": topology, "mesh": mesh, "batch a chip": "none"}
    speed = found["estimate"]
    return {
        "model": preset,
        "topology": topology,
        "mesh": mesh,
        "batch a chip": batch,
        "memory, GiB": gib(found["memory_bytes"]),
        "of": gib(found["memory_limit_bytes"]),
        "collectives a step": sum(each["count"] for each in found["collectives"]),
        "their MB": sum(each["bytes"] for each in found["collectives"]) / 1e6,
        "MB sent a chip": sum(each["bytes_sent"] for each in found["collectives"]) / 1e6,
        "kernels": found["kernels"],
        "estimated step, s": speed["step_seconds"],
        "estimated tokens/s": speed["tokens_per_second"],
        "estimated MFU": speed["mfu"],
        "took, s": time.monotonic() - began,
    }


def mesh_for(preset: Preset, chips: int, memory_bytes: int) -> str:
    """All on data, or the smallest fsdp with which the state and its gradients take half the memory."""
    needed, fsdp = 18 * MODELS[preset].num_parameters, 1
    while needed / fsdp > memory_bytes / 2 and fsdp < chips:
        fsdp *= 2
    return f"data={chips // fsdp}" + (f",fsdp={fsdp}" if fsdp > 1 else "")


def first_guess(config_for: Callable[[int], Config], target: Topology) -> int:
    """The largest power of two that by formula takes no more than the memory."""
    from smollm_jax.planning.estimate import memory_by_formula
    from smollm_jax.planning.plan import mesh_of

    batch = 1
    while batch < 4_096:
        config = config_for(2 * batch)
        needed = memory_by_formula(config, mesh_of(config, target), "full", config.main_batch_size, dtype_bytes=2)
        if needed > target.memory_bytes:
            break
        batch *= 2
    return batch


if __name__ == "__main__":
    as_command(plan, "plan")
