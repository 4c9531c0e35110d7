"""Plan a run on devices that are not here: compile its train step ahead of time and see if it fits.

libtpu compiles the very step of the run for a TPU slice, without a TPU and without the network, and its verdict
on memory is the plan's. GPUs and more CPU devices than the process has have no compiler here: their memory is
estimated by formula. Knows no data, no tokenizer and no run folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax

from smollm_jax.config.settings import Config
from smollm_jax.distributed.sharding import make_mesh
from smollm_jax.model.transformer import Policy
from smollm_jax.planning.estimate import Step, memory_bytes
from smollm_jax.planning.topology import Topology, topology_of
from smollm_jax.runtime.devices import MEMORY_SHARE, beside_the_step, use_precision_of
from smollm_jax.runtime.errors import UserError
from smollm_jax.training.compile import compile_step, compiled_bytes
from smollm_jax.training.step import select_step_ops

POLICIES: tuple[Policy, ...] = ("none", "dots", "full")
HOPELESS = 1.5  # times the memory: a setting that needs more by formula is not compiled


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The verdict on a step; `remedy` has the flags that make it fit, if it does not and any do."""

    topology: Topology
    step: Step
    memory_bytes: int
    """Per chip: of the compiled program, or by formula; on a CPU with the rest of the run's process."""
    remedy: str | None = None

    @property
    def fits(self) -> bool:
        return self.memory_bytes <= self.topology.memory_bytes

    @property
    def attention(self) -> str:
        return select_step_ops(self.step.config, self.step.mesh, self.step.dtype).kernels


def make_plan(config: Config, topology: str) -> Plan:
    """Plan a run of `config` on `topology`; raises `UserError` for impossible devices or an impossible mesh.

    Tries the remat policies as a run does: the first that leaves the runtime its share of memory, else the last.
    """
    target, remat = topology_of(topology), config.compute.remat
    for policy in POLICIES if remat == "auto" else (remat,):
        plan = attempt(config, target, policy)
        if plan.memory_bytes < target.memory_bytes * MEMORY_SHARE:
            break
    return plan if plan.fits else replace(plan, remedy=find_remedy(config, target))


def attempt(config: Config, topology: Topology, remat: Policy) -> Plan:
    """Compile the step for its memory, or estimate the memory if the topology has no compiler here."""
    step = step_of(config, topology, remat)
    use_precision_of(step.dtype)
    if topology.compiles:
        try:
            compiled = compile_step(config, step.mesh, step.batch_size, dtype=step.dtype, remat=remat)
            needed = compiled_bytes(compiled)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            needed = max(needed_by(str(error)), topology.memory_bytes + 1)
    else:
        needed = memory_bytes(step)
    devices, parameters = topology.devices, config.model.num_parameters
    needed += beside_the_step(devices[0].platform, parameters, devices=len(devices))
    return Plan(topology=topology, step=step, memory_bytes=needed)


def step_of(config: Config, topology: Topology, remat: Policy) -> Step:
    """Return the step of the largest phase, which needs the most memory; raises `UserError` for its mesh."""
    try:
        mesh = make_mesh(config, topology.devices)
    except NotImplementedError as error:  # JAX cannot lay the axes along the torus
        raise UserError(f"--mesh {config.compute.mesh} on {topology.name}: {error}") from None
    return Step(config, mesh, remat, max(phase.batch_size for phase in config.phases))


def needed_by(refusal: str) -> int:
    """Read the bytes that a step needs from the TPU compiler's refusal; 0 if it does not name them."""
    found = re.search(r"([\d.]+)([KMGT])\)? (?:exceeds available HBM|of [\d.]+\w hbm)", refusal)
    return int(float(found[1]) * 2 ** (10 * ("KMGT".index(found[2]) + 1))) if found else 0


def find_remedy(config: Config, topology: Topology) -> str | None:
    """Return the first flags of `remedies` with which the run fits, or None."""
    for settings in remedies(config, len(topology.devices)):
        remat: Policy = settings["remat"]
        try:
            remedy = replace(config, compute=replace(config.compute, **settings))
            step = step_of(remedy, topology, remat)
        except ValueError:  # the microbatches do not divide every batch, or the mesh has devices without rows
            continue
        if memory_bytes(step) <= HOPELESS * topology.memory_bytes and attempt(remedy, topology, remat).fits:
            new = {name: value for name, value in settings.items() if value != getattr(config.compute, name)}
            return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in new.items())
    return None


def remedies(config: Config, devices: int) -> Iterator[dict[str, Any]]:
    """Yield compute settings that need less memory, the cheapest in time first.

    More remat comes first, then more microbatches, then parameters divided among more chips.
    """
    given, sizes = config.compute.remat, config.compute.mesh_sizes
    accums, tensor = [config.compute.grad_accum * 2**n for n in range(8)], sizes.get("tensor", 1)
    if given != "auto":
        yield from ({"remat": remat} for remat in POLICIES[POLICIES.index(given) + 1 :])
    yield from ({"remat": "full", "grad_accum": accum} for accum in accums[1:])
    for fsdp in (2**n for n in range(1, 9)):
        data, left = divmod(devices, fsdp * tensor)
        if not left and fsdp > sizes.get("fsdp", 1):
            mesh = f"data={data},fsdp={fsdp}" + (f",tensor={tensor}" if tensor > 1 else "")
            yield from ({"remat": "full", "grad_accum": accum, "mesh": mesh} for accum in accums)
