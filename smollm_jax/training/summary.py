"""The summary a run logs before its first step."""

from __future__ import annotations

import jax

from smollm_jax.distributed.sharding import layout_table, padded_rows, row_shards
from smollm_jax.runtime.devices import peak_flops
from smollm_jax.runtime.huge_pages import hint
from smollm_jax.training.compile import compiled_bytes
from smollm_jax.training.run import Run


def log_summary(run: Run, notes: list[str]) -> None:
    """Log in a dozen lines what the run will do, and `notes`, each a line."""
    config, model, mesh, T = run.config, run.config.model, run.mesh, run.config.data.seq_len
    device, optimizer = mesh.devices.flat[0], config.optimizer
    phases = ", then ".join(f"{p.steps:,} steps of {p.batch_size} x {T}" for p in config.phases)
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    memory = compiled_bytes(run.steps[max(run.steps)]) / 2**30
    peak = peak_flops(device)
    scale = "" if peak is None else f"; peak {peak / 1e12:,.0f} TFLOP/s a device"
    fitted = " (the recipe's, at most a tenth of the steps)" if optimizer.warmup_steps is None else ""
    held_out = "none"
    if run.heldout:
        eval_tokens = config.data.eval_batches * config.main_batch_size * T
        held_out = f"{len(run.heldout):,} documents, never trained on; up to {eval_tokens:,} tokens each time"
    lines = [
        f"recipe      {config.recipe}, {config.total_steps:,} steps: {phases}",
        f"device      {mesh.size} x {device.device_kind} ({device.platform}) of {jax.device_count()}"
        f"{axes and f': {axes}'}{_shared_by(run)}",
        f"model       {model.num_parameters:,} parameters, {model.num_layers} layers, "
        f"context {model.max_seq_len:,}",
        f"compute     {run.dtype.name} over float32 parameters, remat {run.remat}, {memory:.2f} GiB a device",
        f"tokens      {config.main_batch_size * T:,} a step, "
        f"{model.flops_per_token(T) / 1e6:,.0f} MFLOP a token (causal){scale}",
        f"optimizer   AdamW, peak learning rate {optimizer.learning_rate:g}, {optimizer.schedule}, "
        f"warm-up {config.warmup_steps} steps{fitted}",
        f"data        {config.data.data}, shuffled in windows of {config.data.shuffle_window:,}",
        f"held out    {held_out}",
        f"tokenizer   {config.data.tokenizer}, {run.tokenizer.vocab_size:,} entries",
        f"writes to   {run.run_dir}, a checkpoint every {config.run.checkpoint_every:,} steps",
        f"starts      {_starting_point(run)} (ready in {run.setup_seconds:.1f} s)",
        *([f"memory      {advice}"] if (advice := hint()) else []),
        *notes,
        *_padding(run),
    ]
    if run.job.first and any(mesh.shape[axis] > 1 for axis in ("fsdp", "tensor")):
        lines += ["layout", *(f"  {line}" for line in layout_table(run.state["params"]))]
    run.report.say("\n".join(lines))


def _padding(run: Run) -> list[str]:
    """Return a line for each batch size that does not divide evenly among the devices."""
    found, shards = [], row_shards(run.mesh)
    for size in run.steps:
        rows = padded_rows(size, run.mesh, run.config.compute.grad_accum)
        idle = shards - -(-size * shards // rows)
        if rows > size:
            nothing = f"; {idle} of {shards} devices have nothing else" if idle else ""
            found.append(f"padding     {rows - size} empty rows follow the {size} of a batch{nothing}")
    return found


def _shared_by(run: Run) -> str:
    if not run.job.several:
        return ""
    count = run.job.count
    own = run.config.data.shards >= count
    reads = "its own part of the data" if own else f"all of the data: --shards {count} would divide it"
    return f", {count} processes; each reads {reads}"


def _starting_point(run: Run) -> str:
    if run.progress.step:
        return f"from checkpoint {run.progress.step:,}: {run.progress.tokens:,} tokens trained"
    source = run.config.run.init_from
    return "from fresh weights" if source is None else f"from the weights of {source}"
