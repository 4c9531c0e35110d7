"""A plan in words and as a dict: what fits, what is said between chips, and the estimate with its model."""

from __future__ import annotations

from typing import Any

from smollm_jax.config.settings import Config
from smollm_jax.distributed.sharding import padded_rows
from smollm_jax.planning.estimate import (
    BANDWIDTH_SHARE,
    COMPUTE_SHARE,
    INTERCONNECT_SHARE,
    Estimate,
    estimate,
    rows_a_chip,
    traffic_bytes,
    utilisation,
)
from smollm_jax.planning.hlo import Collective
from smollm_jax.planning.plan import Plan, largest_batch
from smollm_jax.planning.topology import Chip
from smollm_jax.runtime.devices import peak_flops

WIDTH = 14


def table(plan: Plan) -> str:
    """Lines of a name and what is to be said of it."""
    config, mesh = plan.attempt.config, plan.attempt.mesh
    rows = [
        ("topology", f"{plan.target.name}: {mesh.size} of {len(plan.target.devices)} chips, mesh {axes(plan)}"),
        ("parameters", f"{config.model.num_parameters:,}"),
        ("step", _step_line(plan)),
        ("a token", _token_line(plan)),
        ("memory", _memory_line(plan)),
    ]
    if plan.fits:
        rows += [("attention", _attention_line(plan)), *_message_rows(plan), *_estimate_rows(plan)]
    else:
        rows.append(("does not fit", _remedy_line(plan)))
    return "\n".join(f"{name:<{WIDTH}}{text}" for name, text in rows)


def as_dict(plan: Plan) -> dict[str, Any]:
    """The same for a program to read: bytes, seconds, FLOPs; estimates under "estimate"."""
    tried, config, mesh = plan.attempt, plan.attempt.config, plan.attempt.mesh
    found = {
        "topology": plan.target.name,
        "chips": mesh.size,
        "mesh": dict(mesh.shape),
        "parameters": config.model.num_parameters,
        "batch_size": largest_batch(config),
        "batch_a_chip": rows_a_chip(config, mesh, largest_batch(config)),
        "seq_len": config.data.seq_len,
        "grad_accum": config.compute.grad_accum,
        "dtype": plan.dtype,
        "remat": tried.remat,
        "attention": plan.attention,
        "compiled": plan.target.compiles,
        "read": plan.attempt.program is not None,
        "flops_per_token": config.model.flops_per_token(config.data.seq_len),
        "bytes_per_token": bytes_per_token(plan),
        "memory_bytes": tried.memory_bytes,
        "memory_limit_bytes": plan.target.memory_bytes,
        "fits": plan.fits,
        "remedy": plan.remedy,
    }
    if not plan.fits:
        return found
    messages = [vars(message) | {"bytes_sent": message.bytes_sent} for message in plan.messages]
    return found | {"collectives": messages, "kernels": plan.kernels, "estimate": estimated(plan)}


def estimated(plan: Plan) -> dict[str, Any] | None:
    """Of the largest step and the whole recipe; None where the chip's speed in the dtype is not known."""
    config, chip, mesh = plan.attempt.config, plan.target.chip, plan.attempt.mesh
    if chip is None or plan.dtype != "bfloat16":
        return None
    rows = largest_batch(config)
    of_step = estimate_of(plan, chip, rows)
    seconds = sum(phase.steps * estimate_of(plan, chip, phase.batch_size).step for phase in config.phases)
    return {
        "compute_seconds": of_step.compute,
        "memory_seconds": of_step.memory,
        "interconnect_seconds": of_step.interconnect,
        "step_seconds": of_step.step,
        "tokens_per_second": rows * config.data.seq_len / of_step.step,
        "mfu": utilisation(config, chip, mesh, batch_size=rows, seconds=of_step.step),
        "recipe_tokens": recipe_tokens(config),
        "recipe_seconds": seconds,
    }


def estimate_of(plan: Plan, chip: Chip, batch_size: int) -> Estimate:
    tried = plan.attempt
    return estimate(tried.config, chip, tried.mesh, tried.remat, batch_size=batch_size, messages=plan.messages)


def recipe_tokens(config: Config) -> int:
    return sum(phase.steps * phase.batch_size for phase in config.phases) * config.data.seq_len


def bytes_per_token(plan: Plan) -> float:
    """Between a chip and its memory, for each token that the chip sees."""
    tried, rows = plan.attempt, largest_batch(plan.attempt.config)
    traffic = traffic_bytes(tried.config, tried.mesh, tried.remat, rows)
    return traffic / (rows_a_chip(tried.config, tried.mesh, rows) * tried.config.data.seq_len)


def axes(plan: Plan) -> str:
    sizes = {axis: size for axis, size in plan.attempt.mesh.shape.items() if size > 1}
    return ",".join(f"{axis}={size}" for axis, size in sizes.items()) or "data=1"


def _step_line(plan: Plan) -> str:
    config, rows = plan.attempt.config, largest_batch(plan.attempt.config)
    micros = f" in {config.compute.grad_accum} micro-batches" if config.compute.grad_accum > 1 else ""
    smaller = "" if len({p.batch_size for p in config.phases}) == 1 else ", the largest of the phases"
    mesh = plan.attempt.mesh
    padding = ", padding included" if padded_rows(rows, mesh, config.compute.grad_accum) > rows else ""
    return (
        f"{rows:,} x {config.data.seq_len:,} = {rows * config.data.seq_len:,} tokens{micros}{smaller}; "
        f"{rows_a_chip(config, mesh, rows):,} rows a chip{padding}, {plan.dtype}, remat {plan.attempt.remat}"
    )


def _token_line(plan: Plan) -> str:
    flops = plan.attempt.config.model.flops_per_token(plan.attempt.config.data.seq_len)
    traffic = bytes_per_token(plan)
    return (
        f"{flops / 1e6:,.0f} MFLOP (causal, remat not counted), {traffic / 1e6:,.2f} MB between chip and memory; "
        "both by formula, XLA's own count takes a loop's body once"
    )


def _memory_line(plan: Plan) -> str:
    needed, limit = plan.attempt.memory_bytes, plan.target.memory_bytes
    beside = ", and what a run's process takes besides" if plan.target.devices[0].platform == "cpu" else ""
    source = f"by the compiled program{beside}" if plan.target.compiles else "by formula; no compiler for it here"
    if plan.attempt.refused:
        source = "by the compiler, which refused it"
    return f"{needed / 2**30:.2f} of {limit / 2**30:.2f} GiB a chip ({needed / limit:.0%}), {source}"


def _attention_line(plan: Plan) -> str:
    if plan.kernels is None:
        unread = "; this jaxlib cannot read the program that this libtpu wrote" if plan.target.compiles else ""
        return plan.attention + unread
    found = f"{plan.kernels} fused kernels in the program" if plan.kernels else "no fused kernel in the program"
    return f"{plan.attention}, {found}"


def _remedy_line(plan: Plan) -> str:
    if plan.remedy is None:
        return "nor with more remat, micro-batches or fsdp; give a smaller --batch-size, or more chips"
    return f"it would with {plan.remedy}"


def _message_rows(plan: Plan) -> list[tuple[str, str]]:
    if not plan.messages:
        return [("collectives", "none")]
    source = "" if plan.attempt.program else ", by formula"
    lines = [_message_line(message) + source for message in plan.messages]
    return [("collectives" if i == 0 else "", line) for i, line in enumerate(lines)]


def _message_line(message: Collective) -> str:
    return (
        f"{message.count:,} {message.kind} among {message.group}: {message.bytes / 1e6:,.1f} MB a step, "
        f"{message.bytes_sent / 1e6:,.1f} MB sent by each chip"
    )


def _estimate_rows(plan: Plan) -> list[tuple[str, str]]:
    found, chip, config = estimated(plan), plan.target.chip, plan.attempt.config
    if found is None or chip is None:
        return [("ESTIMATE", "none: no peak is known for this device and dtype")]
    peak = (peak_flops(chip) or 0) / 1e12
    parts = (
        f"computing {found['compute_seconds']:.3g} s at {COMPUTE_SHARE:.0%} of {peak:,.0f} TFLOP/s, "
        f"memory {found['memory_seconds']:.3g} s at {BANDWIDTH_SHARE:.0%} of "
        f"{chip.memory_bytes_per_second / 1e9:,.0f} GB/s, interconnect {found['interconnect_seconds']:.3g} s at "
        f"{INTERCONNECT_SHARE:.0%} of {chip.interconnect_bytes_per_second / 1e9:,.0f} GB/s"
    )
    step = (
        f"{found['step_seconds']:.3g} s a step: the longer of the first two, and then the third; "
        f"{found['tokens_per_second']:,.0f} tokens/s, MFU {found['mfu']:.0%}"
    )
    recipe = (
        f"{config.total_steps:,} steps, {found['recipe_tokens']:,} tokens: {duration(found['recipe_seconds'])} "
        "of steps; evaluations, checkpoints and the start not counted"
    )
    return [("ESTIMATE", parts), ("", step), ("recipe", recipe)]


def duration(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.1f} seconds"
