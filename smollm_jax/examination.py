"""How a run in motion does: its held-out loss, and how it continues the sample prompts."""

from __future__ import annotations

import time
from collections.abc import Callable

from smollm_jax.evaluate import score
from smollm_jax.generation import Generator, Sampling
from smollm_jax.model import SmolLM
from smollm_jax.report import finite_or_none
from smollm_jax.sharding import on_one_device
from smollm_jax.start import Run

# greedy base models repeat themselves; this shows what was learned and is still nearly deterministic
SAMPLE_TEMPERATURE, SAMPLE_TOP_P = 0.7, 0.95


def examine(run: Run, save: Callable[[], None]) -> None:
    """Held-out loss, samples and loss.png; left for the next start when asked to stop on the way.

    A stop that comes while there is much to compile is met by another thread, which calls `save`.
    """
    if run.heldout is None or run.interrupted:
        return
    began, config, step = time.monotonic(), run.config, run.progress.step
    parts = config.compute.grad_accum
    batches = run.heldout.batches(config.main_batch_size // parts, config.data.eval_batches * parts)

    def stopped() -> bool:
        run.processes.watch.moved()
        return run.interrupted

    away = run.stop.away(None if run.processes.several else save)
    with away, run.processes.watch.long("a batch of an evaluation, or samples"):
        result = score(run.nll, run.state["params"], batches, run.tokenizer.token_bytes, stopped=stopped)
        if result is None:
            return
        texts = sample(run)
    line = {
        "step": step,
        "eval_loss": finite_or_none(result.loss),
        "eval_bits_per_byte": finite_or_none(result.bits_per_byte),
        "eval_tokens": result.tokens,
        "eval_seconds": time.monotonic() - began,
    }
    if run.interrupted:
        return
    with run.processes.watch.long("drawing loss.png"):
        run.report.evaluation(line, texts)
    run.evaluated = step


def sample(run: Run) -> list[tuple[str, str]]:
    """The sample prompts and their continuations; those that were made when a stop was requested."""
    settings = run.config.run
    if not settings.sample_tokens or run.interrupted:
        return []
    params = on_one_device(run.state["params"], run.mesh)
    if not run.processes.first:
        return []
    model = SmolLM.from_params(run.config.model, params, dtype=run.dtype)
    if run.generator is None:
        run.generator = Generator(model, kernels=run.kernels)
    else:
        run.generator.load(model)
    sampling = Sampling(
        max_new_tokens=settings.sample_tokens,
        temperature=SAMPLE_TEMPERATURE,
        top_p=SAMPLE_TOP_P,
        seed=settings.seed,
        stop_ids=(run.tokenizer.eos_id,),
    )
    texts = []
    for prompt in settings.sample_prompts:
        ids: list[int] = []
        for piece in run.generator.stream(run.tokenizer.encode(prompt).tolist(), sampling):
            ids += piece
            if run.interrupted:
                break
        texts.append((prompt, run.tokenizer.decode(ids)))
    run.generator.unload()  # the next step has use for the memory
    return texts
