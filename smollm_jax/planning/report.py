"""Report a plan: one list of named facts, as a table or as JSON."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from smollm_jax.planning.estimate import estimate, sent_bytes, traffic_bytes
from smollm_jax.planning.plan import Plan

WIDTH = 34


def table(plan: Plan) -> str:
    """Return a line per fact, its unit in its name; facts that no compiler or device confirms say ESTIMATE."""
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
    if not isinstance(value, int | float) or isinstance(value, bool):
        return str(value)
    if "memory" in name and "bytes" in name:
        return f"{value:,} ({value / 2**30:.2f} GiB per chip)"
    return f"{value:,.4g}" if abs(value) < 1_000 else f"{value:,.0f}"


def as_dict(plan: Plan) -> dict[str, Any]:
    """Return the facts as bytes, seconds and FLOPs, ready for JSON; without speed if the run does not fit."""
    step, config, model = plan.step, plan.step.config, plan.step.config.model
    facts = {
        "topology": plan.topology.name,
        "chips": step.mesh.size,
        "mesh": dict(step.mesh.shape),
        "parameters": model.num_parameters,
        "batch_size": step.batch_size,
        "batch_a_chip": step.rows_per_chip,
        "seq_len": config.data.seq_len,
        "grad_accum": config.compute.grad_accum,
        "dtype": step.dtype.name,
        "remat": step.remat,
        "attention": plan.attention,
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
    """Return whether the run fits, who says so, and what to do if it does not."""
    source = "by the compiler" if plan.topology.compiles else "by formula only: there is no compiler for it here"
    if plan.fits:
        return f"fits, {source}"
    if plan.memory_bytes == plan.topology.memory_bytes + 1:  # the least that does not fit: no size was named
        source += ", which refused it without naming a size"
    nothing = "no more remat, microbatches or fsdp helps; give a smaller --batch-size, or more chips"
    return f"does not fit, {source}; {f'it would with {plan.remedy}' if plan.remedy else nothing}"


def speed(plan: Plan) -> dict[str, float] | None:
    """Estimate the largest step and the whole recipe; None if no peak is known for the device and dtype."""
    chip, config = plan.topology.chip, plan.step.config
    if chip is None or plan.step.dtype.name != "bfloat16":
        return None
    steps = [(phase, estimate(replace(plan.step, batch_size=phase.batch_size), chip)) for phase in config.phases]
    return estimate(plan.step, chip) | {
        "recipe_tokens": sum(phase.steps * phase.batch_size for phase in config.phases) * config.data.seq_len,
        "recipe_seconds": sum(phase.steps * each["step_seconds"] for phase, each in steps),
    }
