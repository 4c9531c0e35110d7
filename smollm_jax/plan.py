"""What a run would need of devices that are not here: the train step compiled ahead of time, or reckoned.

For a TPU the very step of a run is compiled by libtpu for the topology asked for, without a TPU and without
the network; memory, collectives and kernels are read from the program. For GPUs, whose compiler wants one at
hand, and for more CPU devices than the process has, they come from roofline.py's formulas. The time of a step
is an estimate in both cases. Knows no data, no tokenizer and no run folder.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from smollm_jax.attention import choose
from smollm_jax.collectives import Collective, collectives, kernels
from smollm_jax.config import Config, Remat, require
from smollm_jax.hardware import CHIPS, MEMORY_SHARE, Chip, memory_bytes, use_precision_of
from smollm_jax.model import Policy
from smollm_jax.roofline import collectives_by_formula, memory_by_formula
from smollm_jax.sharding import make_mesh
from smollm_jax.step import compile_step, compiled_bytes

POLICIES: tuple[Policy, ...] = ("none", "dots", "full")
TPUS = ("v4", "v5e", "v5p", "v6e")
GPUS = {"gpu-a100": "8.0", "gpu-h100": "9.0", "gpu-h200": "9.0"}  # compute capability
FLAT = {"v5e", "v6e"}  # tori of two dims
MOST_CHIPS = {"v4": 4_096, "v5e": 256, "v5p": 8_960, "v6e": 256}  # of a pod: Google's page of each
HOPELESS = 1.5  # times the memory: a setting that by formula needs more is not compiled
EXPECTED = (
    "expected v5e:AxB or v6e:AxB, v4:AxBxC or v5p:AxBxC, gpu-a100:N, gpu-h100:N, gpu-h200:N (gpu:N) or cpu:N"
)


@dataclass(frozen=True)
class Absent:
    """A device that is not here, as the rules of mesh and kernel look at one."""

    id: int
    platform: str
    device_kind: str
    compute_capability: str = ""
    process_index: int = 0


@dataclass(frozen=True, kw_only=True)
class Target:
    """Devices to plan for. `compiles` says whether their compiler is at hand; a CPU has no `chip`."""

    name: str
    devices: list[Any]
    memory_bytes: int
    chip: Chip | None
    compiles: bool


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """What became of one setting: the bytes a chip needs, and the program unless it was refused or reckoned."""

    config: Config
    mesh: Mesh
    remat: Policy
    memory_bytes: int
    refused: bool = False
    program: str | None = None
    """Text of the compiled module."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The outcome. `remedy` is the flags that would make it fit, where it does not and some would."""

    target: Target
    attempt: Attempt
    dtype: str
    attention: str
    fits: bool
    messages: list[Collective]
    kernels: int | None
    """Fused attention kernels in the program; None where there is no program."""
    remedy: str | None = None


def make_plan(config: Config, topology: str) -> Plan:
    """Plan a run of `config` on `topology`; raises `ValueError` for devices or a mesh that cannot be."""
    target = target_of(topology)
    dtype = dtype_for(config, target)
    use_precision_of(dtype)
    plan = plan_of(target, first_that_fits(config, target, dtype), dtype)
    return plan if plan.fits else replace(plan, remedy=find_remedy(config, target, dtype))


def plan_of(target: Target, attempt: Attempt, dtype: Any) -> Plan:
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


def target_of(topology: str) -> Target:
    """The devices called NAME:AxB, NAME:AxBxC or NAME:N; raises `ValueError` in one line."""
    name, _, shape = topology.partition(":")
    name = "gpu-h100" if name == "gpu" else name
    known = name == "cpu" or name in CHIPS
    dims = shape.split("x")
    require(known and all(dim.isdecimal() and int(dim) > 0 for dim in dims), f"--topology {topology}: {EXPECTED}")
    if name in TPUS:
        return _tpu(name, [int(dim) for dim in dims])
    require(len(dims) == 1, f"--topology {topology}: {EXPECTED}")
    return _gpu(name, int(shape)) if name in GPUS else _cpu(int(shape))


def _tpu(name: str, dims: list[int]) -> Target:
    topology = f"{name}:{'x'.join(map(str, dims))}"
    needed = 2 if name in FLAT else 3
    require(len(dims) == needed, f"--topology {topology}: {name} has {needed} dims; {EXPECTED}")
    chips = math.prod(dims)
    require(chips <= MOST_CHIPS[name], f"--topology {topology}: a pod of {name} has {MOST_CHIPS[name]:,} chips")
    require(
        importlib.util.find_spec("libtpu") is not None,
        "a plan for a TPU needs its compiler, libtpu: pip install 'smollm-jax[plan]'",
    )
    _keep_libtpu_quiet()
    # of a v4's two cores, as of a v5p's, a program sees one device
    options: dict[str, Any] = {"chip_config_name": "megacore"} if name == "v4" else {}
    if chips == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        raise ValueError(f"--topology {topology}: libtpu knows no such slice: {error}") from None
    return Target(
        name=topology,
        devices=list(devices),
        memory_bytes=CHIPS[name].memory_bytes,
        chip=CHIPS[name],
        compiles=True,
    )


def _gpu(name: str, count: int) -> Target:
    chip = CHIPS[name]
    devices = [Absent(i, "gpu", chip.device_kind, GPUS[name]) for i in range(count)]
    return Target(
        name=f"{name}:{count}", devices=devices, memory_bytes=chip.memory_bytes, chip=chip, compiles=False
    )


def _cpu(count: int) -> Target:
    here = jax.devices("cpu")
    compiles = len(here) >= count
    devices = here[:count] if compiles else [Absent(i, "cpu", "cpu") for i in range(count)]
    memory = int(memory_bytes(here[0]) / MEMORY_SHARE)
    return Target(name=f"cpu:{count}", devices=devices, memory_bytes=memory, chip=None, compiles=compiles)


def _keep_libtpu_quiet() -> None:
    """Before it is loaded: not to ask the network which TPU this is, nor complain that it is none, nor claim a TPU
    for this process alone, which another plan or a run may have.
    """
    for name, value in {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(name, value)


def dtype_for(config: Config, target: Target) -> Any:
    """The dtype that a run there would compute in."""
    if config.compute.dtype != "auto":
        return jnp.dtype(config.compute.dtype)
    return jnp.dtype(jnp.float32 if target.devices[0].platform == "cpu" else jnp.bfloat16)


def largest_batch(config: Config) -> int:
    """Rows of the largest phase: the one that needs the memory."""
    return max(phase.batch_size for phase in config.phases)


def policies_of(remat: Remat) -> tuple[Policy, ...]:
    return POLICIES if remat == "auto" else (remat,)


def first_that_fits(config: Config, target: Target, dtype: Any) -> Attempt:
    """By the rule of a run's start: the first remat policy that leaves the runtime its share, or else the last."""
    attempts = (attempt(config, target, dtype, remat) for remat in policies_of(config.compute.remat))
    for each in attempts:
        if each.memory_bytes < target.memory_bytes * MEMORY_SHARE:
            break
    return each


def attempt(config: Config, target: Target, dtype: Any, remat: Policy) -> Attempt:
    """Compile the step of the largest phase, or reckon its memory; raises `ValueError` for an impossible mesh."""
    mesh = mesh_of(config, target)
    outcome = partial(Attempt, config=config, mesh=mesh, remat=remat)
    if not target.compiles:
        needed = memory_by_formula(config, mesh, remat, largest_batch(config), dtype_bytes=dtype.itemsize)
        return outcome(memory_bytes=needed)
    try:
        compiled = compile_step(config, mesh, largest_batch(config), dtype=dtype, remat=remat)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return outcome(memory_bytes=max(needed_by(str(error)), target.memory_bytes + 1), refused=True)
    return outcome(memory_bytes=compiled_bytes(compiled), program=compiled.as_text())


def needed_by(refusal: str) -> int:
    """Bytes that the TPU's compiler says it would have needed; 0 where it does not say."""
    said = re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM|Used ([\d.]+)([KMGT]) of", refusal)
    if said is None:
        return 0
    number, unit = said[1] or said[3], said[2] or said[4]
    return int(float(number) * 2 ** (10 * ("KMGT".index(unit) + 1)))


def mesh_of(config: Config, target: Target) -> Mesh:
    """The mesh of --mesh over the target's devices; raises `ValueError`."""
    try:
        return make_mesh(config, target.devices)
    except NotImplementedError as error:  # JAX finds no way to lay the axes along the torus
        raise ValueError(f"--mesh {config.compute.mesh} on {target.name}: {error}") from None


def find_remedy(config: Config, target: Target, dtype: Any) -> str | None:
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
