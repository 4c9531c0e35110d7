"""Plan a run on absent devices: compile its train step, check that it fits, report.

The compiler libtpu compiles the run's very step for a TPU slice, without a TPU and without the network. The
compiler's verdict on memory is the plan's. GPUs, and more CPU devices than the process has, have no compiler here.
Their memory is estimated by formula. Data, tokenizer and run folder are not used.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax

from smollm_jax.config.settings import Config
from smollm_jax.distributed.sharding import bytes_of, make_mesh
from smollm_jax.model.transformer import POLICIES, Policy
from smollm_jax.planning.estimate import Step, estimate, memory_bytes, sent_bytes, traffic_bytes
from smollm_jax.planning.topology import Topology, topology_of
from smollm_jax.runtime.devices import MEMORY_SHARE, beside_the_step, peak_flops, use_precision_of
from smollm_jax.runtime.errors import UserError
from smollm_jax.training.compile import compile_step, compiled_bytes
from smollm_jax.training.step import select_step_ops, trained_part

HOPELESS = 1.5  # times the memory: a setting that needs more by formula is not compiled
WIDTH = 34  # of the names in a table


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The verdict on a step. If it does not fit, `remedy` has the flags that make it fit, if any do."""

    topology: Topology
    step: Step
    memory_bytes: int
    """Per chip: of the compiled program, or by formula; on a CPU with the rest of the run's process."""
    remedy: str | None = None

    @property
    def fits(self) -> bool:
        return self.memory_bytes <= self.topology.memory_bytes


def make_plan(config: Config, topology: str) -> Plan:
    """Plan a run of `config` on `topology`. Raises `UserError` for impossible devices or mesh.

    Tries the remat policies as a run does. Keeps the first that leaves the runtime its share, else the last.
    """
    target, remat = topology_of(topology), config.compute.remat
    for policy in POLICIES if remat == "auto" else (remat,):
        plan = attempt(config, target, policy)
        if plan.memory_bytes < target.memory_bytes * MEMORY_SHARE:
            break
    return plan if plan.fits else replace(plan, remedy=find_remedy(config, target))


def attempt(config: Config, topology: Topology, remat: Policy) -> Plan:
    """Compile the step for its memory, or estimate if the topology has no compiler here."""
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
    devices = topology.devices
    saved = bytes_of(trained_part(step.state), step.state["opt_state"])
    needed += beside_the_step(devices[0].platform, saved, devices=len(devices))
    return Plan(topology=topology, step=step, memory_bytes=needed)


def step_of(config: Config, topology: Topology, remat: Policy) -> Step:
    """Return the step of the largest phase, which needs the most memory. Raises `UserError` for its mesh."""
    try:
        mesh = make_mesh(config, topology.devices)
    except NotImplementedError as error:  # JAX cannot lay the axes along the torus
        raise UserError(f"--mesh {config.compute.mesh} on {topology.name}: {error}") from None
    return Step(config, mesh, remat, max(phase.batch_size for phase in config.phases))


def needed_by(refusal: str) -> int:
    """Read the bytes that a step needs from the TPU compiler's refusal, 0 if none."""
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


def table(plan: Plan) -> str:
    """Return a line per fact, its unit in its name. ESTIMATE marks facts without a compiler or device."""
    facts = as_dict(plan)
    speeds = facts.pop("estimate", None) or {}
    estimates = {"bytes_per_token", "bytes_sent_per_step", *speeds}
    if not plan.topology.compiles:
        estimates.add("memory_bytes")
    return "\n".join(
        f"{'ESTIMATE ' * (name in estimates) + name.replace('_', ' '):<{WIDTH}}{_readable(name, value)}"
        for name, value in (facts | speeds).items()
    )


def _readable(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_readable(name, entry)}" for key, entry in value.items())
    if isinstance(value, str | bool | None):
        return str(value)
    if "memory" in name and "bytes" in name:
        return f"{value:,} ({value / 2**30:.2f} GiB per chip)"
    return f"{value:,.4g}" if abs(value) < 1_000 else f"{value:,.0f}"


def as_dict(plan: Plan) -> dict[str, Any]:
    """Return the facts as bytes, seconds and FLOPs, ready for JSON. Without speed if the run does not fit."""
    step, config, model = plan.step, plan.step.config, plan.step.config.model
    facts = {
        "topology": plan.topology.name,
        "chips": step.mesh.size,
        "mesh": dict(step.mesh.shape),
        "parameters": model.num_parameters,
        "trained_parameters": config.adapter.trained_parameters(config.model),
        "optimizer_memory_bytes": step.optimizer_bytes,
        "average_memory_bytes": step.average_bytes,
        "batch_size": step.batch_size,
        "batch_a_chip": step.rows_per_chip,
        "seq_len": config.data.seq_len,
        "grad_accum": config.compute.grad_accum,
        "dtype": step.dtype.name,
        "remat": step.remat,
        "attention": select_step_ops(config, step.mesh, step.dtype).kernels,
        "compiled": plan.topology.compiles,
        "flops_per_token": model.flops_per_token(config.data.seq_len),
        "bytes_per_token": traffic_bytes(step) / step.tokens_per_chip,
        "memory_bytes": plan.memory_bytes,
        "memory_limit_bytes": plan.topology.memory_bytes,
        "fits": plan.fits,
        "remedy": plan.remedy,
        "verdict": verdict(plan),
    }
    return facts | ({"bytes_sent_per_step": sent_bytes(step), "estimate": speed(plan)} if plan.fits else {})


def verdict(plan: Plan) -> str:
    """Return whether the run fits, how this was found, and any remedy."""
    source = "by the compiler" if plan.topology.compiles else "by formula only: there is no compiler for it here"
    if plan.fits:
        return f"fits, {source}"
    if plan.memory_bytes == plan.topology.memory_bytes + 1:  # the least that does not fit: no size was named
        source += ", which refused it without naming a size"
    nothing = "no more remat, microbatches or fsdp helps; give a smaller --batch-size, or more chips"
    return f"does not fit, {source}; {f'it would with {plan.remedy}' if plan.remedy else nothing}"


def speed(plan: Plan) -> dict[str, float] | None:
    """Estimate the largest step and the whole recipe. None if no peak is known for the device and dtype."""
    chip, phases = plan.topology.chip, plan.step.config.phases
    if chip is None or peak_flops(chip, plan.step.dtype) is None:
        return None
    by_size = {
        phase.batch_size: estimate(replace(plan.step, batch_size=phase.batch_size), chip) for phase in phases
    }
    return by_size[plan.step.batch_size] | {
        "recipe_tokens": sum(phase.steps * phase.batch_size for phase in phases) * plan.step.config.data.seq_len,
        "recipe_seconds": sum(phase.steps * by_size[phase.batch_size]["step_seconds"] for phase in phases),
    }
