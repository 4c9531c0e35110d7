"""Log in a dozen lines what a run will do."""

import jax

from smollm_jax.distributed.sharding import layout_table, padded_rows, row_shards
from smollm_jax.model.transformer import Policy
from smollm_jax.runs.metrics import duration
from smollm_jax.runtime.devices import lacks_bfloat16, matmul_rate, peak_flops
from smollm_jax.runtime.huge_pages import hint
from smollm_jax.training.compile import compiled_bytes
from smollm_jax.training.run import Run

# an assumption: the share of a large matmul's speed that a step reaches
MATMUL_SHARE = 0.6
LONG_SECONDS = 2 * 86_400  # for a run longer than this, the summary names the quickstart


def log_summary(run: Run, remat: Policy, notes: list[str], *, seconds: float) -> None:
    """Log in a dozen lines what the run will do, and `notes`, each a line."""
    config, model, mesh, T = run.config, run.config.model, run.mesh, run.config.data.seq_len
    device, optimizer = mesh.devices.flat[0], config.optimizer
    phases = ", then ".join(f"{p.steps:,} steps of {p.batch_size} x {T}" for p in config.phases)
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    memory = compiled_bytes(run.steps[max(run.steps)]) / 2**30
    peak = peak_flops(device, run.dtype)
    scale = "" if peak is None else f"; peak {peak / 1e12:,.0f} TFLOP/s a device"
    fitted = " (the recipe's, at most a tenth of the steps)" if optimizer.warmup_steps is None else ""
    source, count = config.run.init_from, config.adapter.trained_parameters(model)
    trained, frozen = ("parameters", "") if run.base is None else ("adapters", f" frozen, {count:,} trained")
    start = "from fresh weights" if source is None else f"from the weights of {source}"
    if run.progress.step:
        start = f"from checkpoint {run.progress.step:,}: {run.progress.tokens:,} tokens trained"
    processes = ""
    if run.job.several:
        own = config.data.shards >= (count := run.job.count)
        reads = "its own part of the data" if own else f"all of the data: --shards {count} would divide it"
        processes = f", {count} processes; each reads {reads}"
    lines = [
        f"recipe      {config.recipe}, {phases}",
        f"device      {mesh.size} x {device.device_kind} ({device.platform}) of {jax.device_count()}"
        f"{axes and f': {axes}'}{processes}",
        f"model       {model.num_parameters:,} parameters{frozen}, {model.num_layers} layers, "
        f"context {model.max_seq_len:,}",
        f"compute     {run.dtype.name} over float32 {trained}, remat {remat}, {memory:.2f} GiB a device",
        *([f"dtype       {_scaling(run)}"] if run.dtype.name == "float16" else []),
        f"tokens      {config.main_batch_size * T:,} a step, "
        f"{model.flops_per_token(T) / 1e6:,.0f} MFLOP a token (causal){scale}",
        f"optimizer   {optimizer.name}, peak learning rate {config.learning_rate:g}, {optimizer.schedule_name}, "
        f"warm-up {config.warmup_steps} steps{fitted}",
        f"data        {config.data.data}, shuffled in windows of {config.data.shuffle_window:,}",
        f"held out    {_held_out(run)}",
        f"tokenizer   {config.data.tokenizer}, {run.tokenizer.vocab_size:,} entries",
        f"writes to   {run.run_dir}, a checkpoint every {config.run.checkpoint_every:,} steps",
        f"starts      {start} (ready in {seconds:.1f} s)",
        f"time        {_time(run)}",
        *([f"memory      {advice}"] if (advice := hint()) else []),
        *notes,
        *_padding(run),
    ]
    if run.job.first and any(mesh.shape[axis] > 1 for axis in ("fsdp", "tensor")):
        lines += ["layout", *(f"  {line}" for line in layout_table(run.state["params"]))]
    run.report.say("\n".join(lines))


def _scaling(run: Run) -> str:
    """Describe how float16 is computed, and why if nobody has asked for it."""
    chosen = run.config.compute.dtype == "auto" and lacks_bfloat16(device := run.mesh.devices.flat[0])
    why = f"{device.device_kind} has no bfloat16: " if chosen else ""
    now = float(run.state["loss_scale"]["scale"])
    return f"{why}float16 with a loss scale, now {now:,g}; a step that overflows is skipped, and halves it"


def _time(run: Run) -> str:
    """Estimate how long the rest of the run takes, before its first step."""
    config, T = run.config, run.config.data.seq_len
    positions = sum(config.batch_size_at(step) for step in range(run.progress.step + 1, run.last_step + 1)) * T
    rate = matmul_rate(run.mesh.local_mesh.devices.flat[0], run.dtype) * run.mesh.size * MATMUL_SHARE
    seconds = positions * config.model.flops_per_token(T) / rate
    shorter = "; --recipe quickstart takes minutes" if seconds > LONG_SECONDS else ""
    return f"{duration(seconds)} by the speed of a matmul; the first steps will tell{shorter}"


def _held_out(run: Run) -> str:
    """Describe the held-out documents, and how much of them an evaluation reads."""
    config, tokens = run.config, sum(len(ids) for _, ids in run.heldout)
    if not tokens:
        return "none"
    read = min(config.data.eval_batches * config.main_batch_size * config.data.seq_len, tokens)
    part = "all" if read == tokens else f"the first {read:,} ({read / tokens:.0%})"
    return f"{len(run.heldout):,} documents, {tokens:,} tokens, never trained on; an evaluation reads {part}"


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
