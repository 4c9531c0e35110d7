"""Compute held-out loss and bits per byte, of a run or any model.

Bits per byte are the nats of the targets over the UTF-8 bytes of the same targets. So they compare across
tokenizers. Sums are kept to the end because a mean of means would give short batches more weight.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from smollm_jax.config.settings import ComputeConfig, Config, DataConfig
from smollm_jax.data.heldout import batches_in_order
from smollm_jax.data.loader import check_vocab
from smollm_jax.data.packing import Batch, are_targets
from smollm_jax.distributed.sharding import make_mesh, on_one_device
from smollm_jax.generation.sampling import Sampling
from smollm_jax.runs.load import is_run, load_model, read_run
from smollm_jax.runs.metrics import finite_or_none
from smollm_jax.runs.records import as_fields
from smollm_jax.runtime.devices import use_precision_of
from smollm_jax.runtime.errors import require, say
from smollm_jax.tokenizer.streaming import TextOfIds
from smollm_jax.tokenizer.tokenizer import SpecialTokens
from smollm_jax.training.adapters import whole_weights
from smollm_jax.training.chat import prompt_ids
from smollm_jax.training.reference import eval_batches, score_pairs
from smollm_jax.training.run import Run, loaded_generator, save
from smollm_jax.training.step import State, make_nll, weights_of
from smollm_jax.training.tasks import score_on_tasks

# a greedy base model repeats itself. Samples at these settings show what it learned, and hardly vary
SAMPLE_TEMPERATURE, SAMPLE_TOP_P = 0.7, 0.95


@dataclass(frozen=True)
class HeldOutScore:
    """The sums over the held-out targets: nats, targets, and the bytes of their text."""

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Return nats per token."""
        return self.nats / max(self.tokens, 1)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / max(self.bytes, 1)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


def score_batches(nll: Callable[..., jax.Array], params: Any, batches: Iterable[Batch]) -> HeldOutScore:
    """Sum `nll(params, tokens, segment_ids)` over `batches`, which know their `text_bytes`."""
    nats, tokens, text_bytes = 0.0, 0, 0
    for batch in batches:
        nats += float(nll(params, batch.tokens, batch.segment_ids))
        is_target = are_targets(batch.segment_ids)
        tokens += int(is_target.sum())
        assert batch.text_bytes is not None, "the batch was not packed to be scored"
        text_bytes += int(batch.text_bytes[:, 1:][is_target].sum())
    return HeldOutScore(nats, tokens, text_bytes)


def evaluate_model(
    path: str | Path, data: DataConfig,
    *, batch_size: int, dtype: str, seq_len: int | None = None, max_batches: int | None = None,
    special_tokens: SpecialTokens | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Score a run, exported folder or Hub id on all of `data.data`, in order. Returns plain JSON values.

    Rows have `seq_len` tokens, by default as in training, at most the model's context. Raises `UserError` for a
    path that cannot be read, or data without a target.
    """
    require(batch_size > 0, f"--batch-size {batch_size} must be at least 1")
    require(max_batches is None or max_batches > 0, f"--max-batches {max_batches} must be at least 1")
    model, params, tokenizer = load_model(path, special_tokens=special_tokens)
    check_vocab(tokenizer, model.vocab_size)
    no_template = f"{path} has no chat template, which --data-kind chat needs"
    require(not data.is_chat or bool(tokenizer.chat_template), no_template)
    trained = read_run(path).data.seq_len if is_run(path) else DataConfig.seq_len
    settings = replace(data, seq_len=min(trained, model.max_seq_len) if seq_len is None else seq_len)
    # plain: kernels need a check before use, and only a run checks them
    config = Config(model=model, data=settings, compute=ComputeConfig(attention="plain"))
    use_precision_of(jnp.dtype(dtype))
    mesh = make_mesh(config, jax.devices()[:1])
    nll = jax.jit(make_nll(config, mesh, dtype=jnp.dtype(dtype), remat="none"))
    batches = islice(batches_in_order(settings, tokenizer, batch_size), max_batches)
    result = score_batches(nll, jax.tree.map(jnp.asarray, params), batches)
    say(tokenizer.describe_special())
    require(result.tokens > 0, f"--data {settings.data} holds nothing to score: no document of two tokens")
    scores = {name: getattr(result, name) for name in ("loss", "perplexity", "bits_per_byte", "tokens", "bytes")}
    return {"path": str(path), "data": settings.data, **scores, "seq_len": settings.seq_len, "dtype": dtype}


def evaluate_run(run: Run) -> None:
    """Record held-out loss, if a text is held out, samples and scores on tasks, and draw loss.png.

    A stopped evaluation is left to the next start. While the main thread compiles for minutes, another thread
    handles a stop request by calling `save`.
    """
    if run.interrupted:
        return
    began = time.monotonic()
    away = run.stop.away(None if run.job.several else partial(save, run))
    with away, run.job.watchdog.patient("a batch of an evaluation, samples or tasks"):
        scores = score_held_out(run)
        texts = sample(run)
        on_tasks = score_on_tasks(run)
    if run.interrupted:
        return
    line: dict[str, Any] = {"step": run.progress.step, "time": time.time()}
    if run.heldout:
        line |= scores
    line |= as_fields(on_tasks, run.config.run.eval_task_limit or None)
    line["eval_seconds"] = time.monotonic() - began
    with run.job.watchdog.patient("drawing loss.png"):
        run.report.evaluation(line, texts)
    run.evaluated = run.progress.step


def score_held_out(run: Run) -> dict[str, Any]:
    """Return the fields of a metrics line on held-out data, of the weights and of any moving average."""

    def score(part: str) -> dict[str, Any]:
        batches = _until_stopped(run, eval_batches(run))
        return (score_pairs if run.config.data.is_pairs else score_texts)(
            run, batches, weights_of(run.state, part)
        )

    scores = score("params")
    if "ema" in run.state:
        averaged = score("ema")
        scores |= {f"eval_ema_{name}": averaged[f"eval_{name}"] for name in ("loss", "bits_per_byte")}
    return scores


def score_texts(run: Run, batches: Iterable[Batch], weights: State) -> dict[str, Any]:
    """Return the fields of a metrics line on held-out texts and conversations."""
    score = score_batches(run.nll, weights, batches)
    return {
        "eval_loss": finite_or_none(score.loss),
        "eval_bits_per_byte": finite_or_none(score.bits_per_byte),
        "eval_tokens": score.tokens,
    }


def _until_stopped(run: Run, batches: Iterable[Batch]) -> Iterator[Batch]:
    for batch in batches:
        run.job.watchdog.reset()
        if run.interrupted:
            return
        yield batch


def sample(run: Run) -> list[tuple[str, str]]:
    """Return the sample prompts with their continuations. Fewer if a stop is requested meanwhile."""
    settings = run.config.run
    if not settings.sample_tokens or run.interrupted:
        return []
    params = on_one_device(whole_weights(run.config, run.state, run.mesh), run.mesh)
    if not run.job.first:
        return []
    generator = loaded_generator(run, params)
    # a chat model answers greedily: another answer is then due to the training alone
    temperature = 0.0 if run.config.data.is_chat else SAMPLE_TEMPERATURE
    sampling = Sampling(
        max_new_tokens=settings.sample_tokens, temperature=temperature, top_p=SAMPLE_TOP_P,
        seed=settings.seed, stop_ids=run.config.model.stop_ids,
    )  # fmt: skip
    texts = []
    for prompt in settings.sample_prompts:
        ids = prompt_ids(run.config, run.tokenizer, prompt)
        pieces, text = generator.stream(ids, sampling), TextOfIds(run.tokenizer, ids)
        new = chain.from_iterable(takewhile(lambda _: not run.interrupted, pieces))
        texts.append((prompt, text.feed(list(new)) + text.rest()))
    generator.unload()  # the next step needs the memory
    return texts
