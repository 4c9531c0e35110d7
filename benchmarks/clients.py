"""Time a server's requests, of several clients at once and one after the other: `python -m benchmarks.clients`.

Random weights, one process, both ways in turn through the request queue, up to the text. Then a client writes
while another one's long prompt is read: the waits between its pieces of text, with and without the prompt.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.harness.tables import Row, as_command, finish, gib, resident, spread
from benchmarks.harness.workload import Dtype, Preset
from smollm_jax.config.architecture import MODELS
from smollm_jax.generation.sampling import Sampling
from smollm_jax.serving import SLOTS
from smollm_jax.serving.scheduler import Scheduler

TEXTS = ["Once upon a time there was a crab.", "The water cycle moves water."] * 8


def open_server(preset: Preset, dtype: Dtype, layers: int | None, slots: int) -> Scheduler:
    """Return a scheduler over random weights, whose programs are compiled when a request needs them."""
    import jax.numpy as jnp

    from smollm_jax.generation.generator import Generator
    from smollm_jax.model.transformer import SmolLM, init_params
    from smollm_jax.serving import ladder
    from smollm_jax.serving.completion import Completer
    from smollm_jax.tokenizer.load import train_tokenizer

    config = MODELS[preset] if layers is None else replace(MODELS[preset], num_layers=layers)
    engine = Generator(SmolLM.from_params(config, init_params(config, 0), dtype=jnp.dtype(dtype)))
    for name in ("climb", "first_rung"):  # a thread that compiles would be measured too
        setattr(ladder, name, lambda *_: None)
    completer = Completer(engine, train_tokenizer(TEXTS, 300))
    completer.vocab_size = config.vocab_size
    return Scheduler(completer, max_waiting=64, max_new_tokens=4_096, slots=slots)


async def write(scheduler: Scheduler, prompt: list[int], sampling: Sampling) -> list[float]:
    """Return when each piece of a text came. Ends of text are ignored, so that all texts have one length."""
    stream, times = scheduler.stream(prompt, sampling), list[float]()
    async for chunk in stream:
        times.append(time.perf_counter())
        assert chunk.reason in (None, "length")
    return times


async def rate(scheduler: Scheduler, prompts: list[list[int]], sampling: Sampling, *, together: bool) -> float:
    """Return the new tokens per second of all clients."""
    began = time.perf_counter()
    work = [write(scheduler, prompt, replace(sampling, seed=i)) for i, prompt in enumerate(prompts)]
    if together:
        await asyncio.gather(*work)
    else:
        for one in work:
            await one
    return len(prompts) * sampling.max_new_tokens / (time.perf_counter() - began)


async def waits(scheduler: Scheduler, sampling: Sampling, long: list[int] | None) -> list[float]:
    """Return the seconds between the chunks of tokens of a client, while another one reads a long prompt."""
    engine, times = scheduler.completer.engine, list[float]()
    ask: Any = engine.decode  # type: ignore[attr-defined]

    def timed(*arguments: Any, **how: Any) -> Any:
        times.append(time.perf_counter())
        return ask(*arguments, **how)

    engine.decode = timed  # type: ignore[attr-defined]
    try:
        first = asyncio.create_task(write(scheduler, [5] * 8, sampling))
        await asyncio.sleep(0)
        while len(times) < 3:
            await asyncio.sleep(0.001)
        start = len(times)
        if long is None:
            await first
            return list(np.diff(times[start:]))
        await write(scheduler, long, replace(sampling, max_new_tokens=1))
        end = len(times)
        await first
        return list(np.diff(times[start:end]))
    finally:
        engine.decode = ask  # type: ignore[attr-defined]


def clients(
    *,
    preset: Preset = "135M",
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16"),
    numbers: tuple[int, ...] = (8,),
    slots: int = SLOTS,
    prompt_tokens: int = 32,
    new_tokens: int = 64,
    long_prompt: int = 1_024,
    temperature: float = 0.8,
    rounds: int = 3,
    layers: int | None = None,
) -> int:
    """Time clients at once against the same clients one after the other.

    Args:
        preset: Architecture.
        dtypes: Dtypes of weights and computation.
        numbers: Clients at once.
        slots: Texts that are decoded together.
        prompt_tokens: Tokens per prompt.
        new_tokens: New tokens per text.
        long_prompt: Tokens of the prompt that is read beside a text.
        temperature: Of the draws. 0 takes the likeliest token.
        rounds: Rounds counted, after one that compiles.
        layers: Fewer layers than the architecture has, for a quick look.
    """
    rows: list[Row] = []
    sampling = Sampling(max_new_tokens=new_tokens, temperature=temperature, ignore_eos=True)
    for dtype in dtypes:
        scheduler = open_server(preset, dtype, layers, slots)
        vocab_size, rng = scheduler.completer.vocab_size, np.random.default_rng(0)
        for count in numbers:
            prompts = rng.integers(0, vocab_size, (count, prompt_tokens)).tolist()
            found: dict[bool, list[float]] = {True: [], False: []}
            for i in range(rounds + 1):
                for together in found:
                    value = asyncio.run(rate(scheduler, prompts, sampling, together=together))
                    found[together] += [value] if i else []
            both = {together: statistics.median(values) for together, values in found.items()}
            rows.append({
                "dtype": dtype, "clients": count, "at once, tokens/s": spread(found[True]),
                "in turn, tokens/s": spread(found[False]), "ratio": both[True] / both[False],
            })  # fmt: skip
        longer = replace(sampling, max_new_tokens=min(512, scheduler.max_new_tokens))
        long = rng.integers(0, vocab_size, long_prompt).tolist()
        for prompt in (long, None, long):  # the first compiles
            pauses = asyncio.run(waits(scheduler, longer, prompt))
            kind = "beside a long prompt" if prompt else "alone"
            pause = {"dtype": dtype, "text": kind, "wait between chunks, s": spread(pauses)}
            rows = [row for row in rows if (row["dtype"], row.get("text")) != (dtype, kind)] + [pause]
        rows.append({"dtype": dtype, "memory, GiB": gib(resident())})
        scheduler.close()
    finish(
        f"clients, {preset}, {prompt_tokens} prompt and {new_tokens} new tokens", rows, slots=slots,
        long_prompt=long_prompt, temperature=temperature, rounds=rounds, layers=layers,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    as_command(clients, "clients")
