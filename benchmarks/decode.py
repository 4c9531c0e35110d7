"""Tokens a second of our generation beside Hugging Face's and llama.cpp's: `python -m benchmarks.decode`.

All hold the same random weights and continue the same prompts greedily. A round makes one new token, then
all of them: the first is the time to the first token (prefill, mostly), the difference is decoding alone.
llama.cpp has a row where `llama_cpp` and `gguf` are installed: pip install llama-cpp-python gguf.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np

from benchmarks.gguf_file import Kind, write_gguf
from benchmarks.measure import Row, as_command, finish, gib, show, spread
from benchmarks.sides import Outcome, Ready, compare, in_child, kind_of
from benchmarks.work import write_model
from smollm_jax.config.architecture import MODELS, ModelConfig

Dtype = Literal["float32", "bfloat16"]
Peer = Literal["dynamic", "static", "llama.cpp"]


@dataclass(frozen=True)
class Work:
    """Prompts of one length to go on with; `folder` holds the model as Hugging Face and as GGUF would have it."""

    folder: Path
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    vocab_size: int
    seed: int

    def prompts(self) -> list[list[int]]:
        shape = (self.batch_size, self.prompt_tokens)
        return np.random.default_rng(self.seed).integers(0, self.vocab_size, shape).tolist()


def ready(work: Work, generate: Callable[[int], list[list[int]]], facts: Row | None = None) -> Ready:
    """`generate(n)` makes n new tokens a prompt; the first ones are shown, for sides to be compared by."""

    def run() -> dict[str, float]:
        began = time.perf_counter()
        generate(1)
        first = time.perf_counter()
        texts = generate(work.new_tokens)
        assert [len(text) for text in texts] == [work.new_tokens] * work.batch_size
        return {"first token": first - began, "all": time.perf_counter() - first}

    return Ready(run, {"tokens": generate(work.new_tokens)[0][:8]} | (facts or {}))


def ours(work: Work, dtype: Dtype) -> Ready:
    import jax
    import jax.numpy as jnp

    from smollm_jax.generation.generator import Generator
    from smollm_jax.generation.sampling import Sampling
    from smollm_jax.hf.export import load_hf
    from smollm_jax.model.transformer import SmolLM, params_of
    from smollm_jax.runtime.devices import use_precision_of

    use_precision_of(jnp.dtype(dtype))
    model = load_hf(work.folder / "hf")
    generator = Generator(SmolLM.from_params(model.config, params_of(model), dtype=jnp.dtype(dtype)))
    del model
    prompts, device = work.prompts(), jax.devices()[0]
    facts = {"device": kind_of(device)}
    made = ready(work, lambda n: generator.generate(prompts, Sampling(max_new_tokens=n)), facts)
    made.device_peak_bytes = lambda: (device.memory_stats() or {}).get("peak_bytes_in_use")
    return made


def theirs(work: Work, dtype: Dtype, cache: Literal["dynamic", "static"]) -> Ready:
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("highest")
    model = AutoModelForCausalLM.from_pretrained(work.folder / "hf", dtype=getattr(torch, dtype)).eval().to(device)
    ids = torch.tensor(work.prompts(), device=device)
    mask = torch.ones_like(ids)

    def generate(n: int) -> list[list[int]]:
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=n,
            min_new_tokens=n,
            do_sample=False,
            pad_token_id=0,
            cache_implementation=cache,
        )
        return out[:, work.prompt_tokens :].tolist()

    made = ready(work, generate, {"device": device})
    if device == "cuda":
        made.device_peak_bytes = torch.cuda.max_memory_allocated
    return made


def llama_cpp(work: Work, kind: Kind) -> Ready:
    """One row alone, on the CPU's cores unless the package was built for a GPU."""
    from llama_cpp import Llama

    prompt = work.prompts()[0]
    model = Llama(
        str(work.folder / f"{kind}.gguf"),
        n_gpu_layers=-1,
        n_threads=os.cpu_count(),
        n_ctx=work.prompt_tokens + work.new_tokens,
        verbose=False,
    )

    def generate(n: int) -> list[list[int]]:
        model.reset()
        stream = model.generate(prompt, temp=0.0, repeat_penalty=1.0)
        return [[next(stream) for _ in range(n)]]

    return ready(work, generate)


def sides_of(
    work: Work, dtypes: tuple[Dtype, ...], peers: tuple[Peer, ...], kinds: tuple[Kind, ...]
) -> dict[tuple[str, str], Callable[[], Ready]]:
    """Name of a side and its dtype, and how it is made ready."""
    sides: dict[tuple[str, str], Callable[[], Ready]] = {}
    for dtype in dtypes:
        sides["ours", dtype] = partial(ours, work, dtype)
        for cache in ("dynamic", "static"):
            if cache in peers:
                sides[f"HF generate, {cache} cache", dtype] = partial(theirs, work, dtype, cache)
    if work.batch_size == 1:
        sides |= {("llama.cpp", str(kind)): partial(llama_cpp, work, kind) for kind in kinds}
    return sides


def row_of(name: str, dtype: str, outcome: Outcome, work: Work) -> Row:
    row: Row = {"batch": work.batch_size, "side": name, "dtype": dtype}
    if outcome.failed:
        return row | {"failed": outcome.failed}
    first, whole = outcome.of("first token"), outcome.of("all")
    decoding = statistics.median(whole) - statistics.median(first)
    made = work.batch_size * (work.new_tokens - 1)
    return row | {
        "tokens/s": spread([work.batch_size * work.new_tokens / value for value in whole]),
        "decode alone, tokens/s": made / decoding if decoding > 0 else None,
        "first token, s": spread(first),
        "prefill, tokens/s": work.batch_size * work.prompt_tokens / statistics.median(first),
        "peak GiB": gib(outcome.peak_bytes),
        "begins": " ".join(map(str, outcome.facts["tokens"][:4])),
    }


def best_of(rows: list[Row]) -> list[Row]:
    """Each side in its better dtype, and how much faster ours is than it in its."""
    table: list[Row] = []
    for batch, side in dict.fromkeys((row["batch"], row["side"]) for row in rows):
        ran = [row for row in rows if (row["batch"], row["side"]) == (batch, side) and "tokens/s" in row]
        if not ran:
            continue
        best = max(ran, key=lambda row: row["tokens/s"]["median"])
        rate = best["tokens/s"]["median"]
        table.append({"batch": batch, "side": side, "dtype": best["dtype"], "tokens/s": rate})
    ours_at = {row["batch"]: row["tokens/s"] for row in table if row["side"] == "ours"}
    for row in table:
        if row["side"] != "ours" and row["batch"] in ours_at:
            row["ours is faster by"] = ours_at[row["batch"]] / row["tokens/s"]
    return table


def write_models(config: ModelConfig, folder: Path, kinds: tuple[Kind, ...]) -> None:
    """The same random weights in every form a side reads."""
    params = write_model(config, 0, folder / "hf")
    for kind in kinds:
        write_gguf(params, config, folder / f"{kind}.gguf", kind)


def decode(
    *,
    preset: Literal["135M", "360M", "1.7B", "quickstart"] = "135M",
    batch_sizes: tuple[int, ...] = (1, 8, 64),
    prompt_tokens: int = 32,
    new_tokens: int = 64,
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16"),
    peers: tuple[Peer, ...] = ("dynamic", "static", "llama.cpp"),
    kinds: tuple[Kind, ...] = ("f32", "f16", "q8_0"),
    rounds: int = 3,
    layers: int | None = None,
    seed: int = 0,
) -> int:
    """Time generation from its first token to its last, ours and the peers'.

    Args:
        preset: Architecture.
        batch_sizes: Prompts at a time.
        prompt_tokens: Tokens a prompt.
        new_tokens: Tokens to make, at least 2.
        dtypes: Of weights and computation.
        peers: Beside ours: Hugging Face generate by cache, and llama.cpp where it is installed.
        kinds: Forms of llama.cpp's weights.
        rounds: Rounds counted.
        layers: Fewer layers than the architecture has, for a quick look.
        seed: Of the prompts.
    """
    config = MODELS[preset] if layers is None else replace(MODELS[preset], num_layers=layers)
    installed = find_spec("llama_cpp") is not None and find_spec("gguf") is not None
    kinds = kinds if installed and "llama.cpp" in peers else ()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="decode-benchmark-") as folder:
        in_child(write_models, config, Path(folder), kinds)
        for batch_size in batch_sizes:
            work = Work(Path(folder), batch_size, prompt_tokens, new_tokens, config.vocab_size, seed)
            sides = sides_of(work, dtypes, peers, kinds)
            outcomes = compare({" ".join(name): make for name, make in sides.items()}, rounds=rounds)
            first = next(iter(outcomes.values()))
            outcomes = {name: outcome.on(first) for name, outcome in outcomes.items()}
            found = [row_of(*name, outcomes[" ".join(name)], work) for name in sides]
            if len(batch_sizes) > 1:
                show(f"so far: batch {batch_size}", found)
            rows += found
    finish(
        f"decode, {preset}, {prompt_tokens} prompt and {new_tokens} new tokens",
        rows,
        summary=best_of(rows),
        layers=config.num_layers,
        rounds=rounds,
        seed=seed,
        llama_cpp_installed=installed,
    )
    return 0


if __name__ == "__main__":
    as_command(decode, "decode")
