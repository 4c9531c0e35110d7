"""What a run would need of devices that are not here: the train step compiled ahead of time, or reckoned.

For a TPU the very step of a run is compiled by libtpu for the topology asked for, without a TPU and without
the network; memory, collectives and kernels are read from the program. For GPUs, whose compiler wants one at
hand, and for more CPU devices than the process has, they come from roofline.py's formulas. The time of a step
is an estimate in both cases. Knows no data, no tokenizer and no run folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from smollm_jax.config.settings import Config, Remat
from smollm_jax.distributed.sharding import make_mesh
from smollm_jax.kernels.select import choose
from smollm_jax.model.transformer import Policy
from smollm_jax.planning.estimate import collectives_by_formula, memory_by_formula
from smollm_jax.planning.hlo import Collective, collectives, kernels
from smollm_jax.planning.topology import Topology, topology_of
from smollm_jax.runtime.devices import MEMORY_SHARE, beside_the_step, compute_dtype, use_precision_of
from smollm_jax.runtime.errors import UserError
from smollm_jax.training.compile import compile_step, compiled_bytes

POLICIES: tuple[Policy, ...] = ("none", "dots", "full")
HOPELESS = 1.5  # times the memory: a setting that by formula needs more is not compiled


@dataclass(frozen=True, kw_only=True)
class CompileResult:
    """What became of one setting: the bytes a chip needs, and the program unless it was refused or reckoned."""

    config: Config
    mesh: Mesh
    remat: Policy
    memory_bytes: int
    refused: bool = False
    program: str | None = None
    """Text of the compiled module; also None where jaxlib could not read it."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The outcome. `remedy` is the flags that would make it fit, where it does not and some would."""

    target: Topology
    attempt: CompileResult
    dtype: str
    attention: str
    fits: bool
    messages: list[Collective]
    kernels: int | None
    """Fused attention kernels in the program; None where there is no program."""
    remedy: str | None = None


def make_plan(config: Config, topology: str) -> Plan:
    """Plan a run of `config` on `topology`; raises `ValueError` for devices or a mesh that cannot be."""
    target = topology_of(topology)
    dtype = compute_dtype(config.compute.dtype, target.devices[0].platform)
    use_precision_of(dtype)
    plan = plan_of(target, first_that_fits(config, target, dtype), dtype)
    return plan if plan.fits else replace(plan, remedy=find_remedy(config, target, dtype))


def plan_of(target: Topology, attempt: CompileResult, dtype: Any) -> Plan:
    """What an attempt shows, without a remedy."""
    config, mesh, program = attempt.config, attempt.mesh, attempt.program
    if program is None:
        messages = collectives_by_formula(config, mesh, attempt.remat, largest_batch(config))
    else:
        messages = collectives(program, mesh.size)
    return Plan(
        target=target,
        attempt=attempt,
        dtype=dtype.name,
        attention=choose(config.compute.attention, target.devices[0], dtype)[0],
        fits=attempt.memory_bytes <= target.memory_bytes,
        messages=messages,
        kernels=None if program is None else kernels(program),
    )


def largest_batch(config: Config) -> int:
    """Rows of the largest phase: the one that needs the memory."""
    return max(phase.batch_size for phase in config.phases)


def policies_of(remat: Remat) -> tuple[Policy, ...]:
    return POLICIES if remat == "auto" else (remat,)


def first_that_fits(config: Config, target: Topology, dtype: Any) -> CompileResult:
    """By the rule of a run's start: the first remat policy that leaves the runtime its share, or else the last."""
    attempts = (attempt(config, target, dtype, remat) for remat in policies_of(config.compute.remat))
    for each in attempts:
        if each.memory_bytes < target.memory_bytes * MEMORY_SHARE:
            break
    return each


def attempt(config: Config, target: Topology, dtype: Any, remat: Policy) -> CompileResult:
    """Compile the step of the largest phase, or reckon its memory; raises `ValueError` for an impossible mesh."""
    mesh = mesh_of(config, target)
    outcome = partial(CompileResult, config=config, mesh=mesh, remat=remat)
    parameters, devices = config.model.num_parameters, len(target.devices)
    beside = beside_the_step(target.devices[0].platform, parameters, devices=devices)
    if not target.compiles:
        needed = memory_by_formula(config, mesh, remat, largest_batch(config), dtype_bytes=dtype.itemsize)
        return outcome(memory_bytes=needed + beside)
    try:
        compiled = compile_step(config, mesh, largest_batch(config), dtype=dtype, remat=remat)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return outcome(memory_bytes=max(needed_by(str(error)), target.memory_bytes + 1), refused=True)
    return outcome(memory_bytes=compiled_bytes(compiled) + beside, program=text_of(compiled))


def text_of(compiled: jax.stages.Compiled) -> str | None:
    """The program as text; None where jaxlib cannot read what libtpu wrote.

    Seen with jaxlib 0.10.2, libtpu 0.0.52 and v5p; libtpu 0.0.42, which jax[tpu] 0.10.2 asks for, is read.
    """
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        if "RET_CHECK" not in str(error):
            raise
        return None


def needed_by(refusal: str) -> int:
    """Bytes that the TPU's compiler says it would have needed; 0 where it does not say."""
    said = re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM|Used ([\d.]+)([KMGT]) of", refusal)
    if said is None:
        return 0
    number, unit = said[1] or said[3], said[2] or said[4]
    return int(float(number) * 2 ** (10 * ("KMGT".index(unit) + 1)))


def mesh_of(config: Config, target: Topology) -> Mesh:
    """The mesh of --mesh over the target's devices; raises `ValueError`."""
    try:
        return make_mesh(config, target.devices)
    except NotImplementedError as error:  # JAX finds no way to lay the axes along the torus
        raise UserError(f"--mesh {config.compute.mesh} on {target.name}: {error}") from None


def find_remedy(config: Config, target: Topology, dtype: Any) -> str | None:
    """Flags with which it fits: more remat, then micro-batches, then parameters divided among the chips."""
    for remedy in remedies(config, len(target.devices)):
        try:
            mesh = mesh_of(remedy, target)
        except ValueError:
            continue
        remat = policies_of(remedy.compute.remat)[-1]
        needed = memory_by_formula(remedy, mesh, remat, largest_batch(config), dtype_bytes=dtype.itemsize)
        if needed > HOPELESS * target.memory_bytes:
            continue
        if attempt(remedy, target, dtype, remat).memory_bytes <= target.memory_bytes:
            return flags_of(config, remedy)
    return None


def remedies(config: Config, devices: int) -> Iterator[Config]:
    """Other settings to try, the cheapest in time first."""

    def changed(**settings: Any) -> Config | None:
        try:
            return replace(config, compute=replace(config.compute, **settings))
        except ValueError:  # it divides no batch
            return None

    given = config.compute.remat
    tried = [] if given == "auto" else [changed(remat=remat) for remat in POLICIES[POLICIES.index(given) + 1 :]]
    now, sizes = config.compute.grad_accum, config.compute.mesh_sizes
    accums = [now * 2**n for n in range(1, 8)]
    tried += [changed(remat="full", grad_accum=accum) for accum in accums]
    tensor = sizes.get("tensor", 1)
    for fsdp in (2**n for n in range(1, 9)):
        if devices % (fsdp * tensor) or fsdp <= sizes.get("fsdp", 1):
            continue
        mesh = f"data={devices // (fsdp * tensor)},fsdp={fsdp}" + (f",tensor={tensor}" if tensor > 1 else "")
        tried += [changed(remat="full", mesh=mesh, grad_accum=accum) for accum in [now, *accums]]
    yield from (each for each in tried if each is not None)


def flags_of(before: Config, after: Config) -> str:
    names = {"remat": "--remat", "grad_accum": "--grad-accum", "mesh": "--mesh"}
    return " ".join(
        f"{flag} {getattr(after.compute, name)}"
        for name, flag in names.items()
        if getattr(after.compute, name) != getattr(before.compute, name)
    )
