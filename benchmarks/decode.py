"""Tokens a second of our generation beside Hugging Face's `generate`, on this machine, in one process.

    python -m benchmarks.decode [--batch-size 1] [--new-tokens 64] [--dtypes float32 bfloat16] [--repeats 3]

Both sides hold the same random weights of the 135M shape, carried over by our own export, and take turns;
what is compiled or warmed up is so before. Speed is new tokens over the whole call, prefill included. Ours in
its better dtype is set against theirs in its better dtype. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smollm_jax.config import MODELS, ModelConfig
from smollm_jax.convert import load_hf, write_folder
from smollm_jax.generation import Generator, Sampling
from smollm_jax.model import SmolLM, init_params, params_of

Times = tuple[float, float | None]
"""Seconds to the last token, and to the first where there is one row: neither side streams several."""
Run = Callable[[], Times]


def ours(folder: Path, dtype: str, prompts: list[list[int]], new_tokens: int) -> Run:
    model = load_hf(folder)
    generator = Generator(SmolLM.from_params(model.config, params_of(model), dtype=jnp.dtype(dtype)))
    sampling = Sampling(max_new_tokens=new_tokens)

    def run() -> Times:
        began, first, made = time.perf_counter(), None, 0
        if len(prompts) == 1:
            for ids in generator.stream(prompts[0], sampling):
                first = first or time.perf_counter() - began
                made += len(ids)
        else:
            made = min(map(len, generator.generate(prompts, sampling)))
        assert made == new_tokens
        return time.perf_counter() - began, first

    return run


def theirs(folder: Path, dtype: str, prompts: list[list[int]], new_tokens: int) -> Run:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.generation.streamers import BaseStreamer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    ids = torch.tensor(prompts)

    class FirstToken(BaseStreamer):
        """`put` is called with the prompt, then with each token."""

        calls, at = 0, 0.0

        def put(self, value: Any) -> None:  # noqa: ARG002
            self.calls += 1
            if self.calls == 2:
                self.at = time.perf_counter()

        def end(self) -> None:
            pass

    def run() -> Times:
        streamer = FirstToken() if len(prompts) == 1 else None
        began = time.perf_counter()
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
            do_sample=False, pad_token_id=0, streamer=streamer,
        )  # fmt: skip
        seconds = time.perf_counter() - began
        assert out.shape[1] == ids.shape[1] + new_tokens
        return seconds, streamer.at - began if streamer else None

    return run


def measure(runs: dict[str, Run], repeats: int) -> dict[str, list[Times]]:
    """Each in turn, `repeats` times round, after one round that is not counted."""
    times: dict[str, list[Times]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            took = run()
            if turn:
                times[name].append(took)
    return times


def summary(times: dict[str, list[Times]], tokens: int) -> dict[str, dict[str, Any]]:
    result = {}
    for name, pairs in times.items():
        speeds = [tokens / seconds for seconds, _ in pairs]
        firsts = [first for _, first in pairs if first is not None]
        result[name] = {
            "tokens_per_second": statistics.median(speeds),
            "slowest": min(speeds),
            "fastest": max(speeds),
            "first_token_seconds": statistics.median(firsts) if firsts else None,
        }
    return result


def table(result: dict[str, dict[str, Any]]) -> Iterator[str]:
    yield f"{'':<20}{'tokens/s':>10}{'slowest':>10}{'fastest':>10}{'first token':>14}"
    for name, of in result.items():
        first = of["first_token_seconds"]
        yield (
            f"{name:<20}{of['tokens_per_second']:>10.1f}{of['slowest']:>10.1f}{of['fastest']:>10.1f}"
            + ("" if first is None else f"{first * 1e3:>11.0f} ms")
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=MODELS["135M"].num_layers, help="fewer for a quick look")
    parser.add_argument("--json", help="file to write the last line to as well")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    config: ModelConfig = replace(MODELS["135M"], num_layers=given.layers)
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, config.vocab_size, (given.batch_size, given.prompt_tokens)).tolist()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        params = jax.tree.map(np.asarray, init_params(config, 0))
        write_folder(params, config, folder, dtype="float32", tokenizer_folder=None)
        runs = {
            f"{side} {dtype}": make(folder, dtype, prompts, given.new_tokens)
            for dtype in given.dtypes
            for side, make in (("ours", ours), ("hf", theirs))
        }
    result = summary(measure(runs, given.repeats), given.batch_size * given.new_tokens)
    best = {
        side: max(of["tokens_per_second"] for name, of in result.items() if name.startswith(side))
        for side in ("ours", "hf")
    }
    load = os.getloadavg()[0]
    print("\n".join(table(result)))
    print(f"ratio, better dtype of each: {best['ours'] / best['hf']:.2f} (load average {load:.1f})")
    line = json.dumps({
        "benchmark": "decode", "batch_size": given.batch_size, "prompt_tokens": given.prompt_tokens,
        "new_tokens": given.new_tokens, "layers": given.layers, "repeats": given.repeats,
        "device": jax.devices()[0].device_kind, "cpus": os.cpu_count(), "load_average": load,
        "ratio": best["ours"] / best["hf"], "results": result,
    })  # fmt: skip
    print(line)
    if given.json:
        Path(given.json).write_text(line + "\n")


if __name__ == "__main__":
    main()
