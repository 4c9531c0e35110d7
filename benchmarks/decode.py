"""Time generation, ours, Hugging Face's and llama.cpp's: `python -m benchmarks.decode`.

All sides hold the same random weights and continue the same prompts greedily. A round makes one new token, then
all of them: the first gives the time to the first token (mostly prefill), the difference gives decoding alone.
llama.cpp has a row if `llama_cpp` and `gguf` are installed: pip install llama-cpp-python gguf.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from benchmarks.harness.peers import Kind, hf_generate, llama_cpp
from benchmarks.harness.sides import Outcome, Ready, compare, in_child, kind_of, peak_bytes_on
from benchmarks.harness.tables import Row, as_command, finish, gib, show, spread
from benchmarks.harness.workload import Dtype, Preset, Prompts, ready_to_decode, write_model
from smollm_jax.config.architecture import MODELS, ModelConfig
from smollm_jax.hf.gguf_model import write_gguf

Peer = Literal["dynamic", "static", "llama.cpp"]


def ours(work: Prompts, dtype: Dtype) -> Ready:
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

    def generate(n: int) -> list[list[int]]:
        return generator.generate(prompts, Sampling(max_new_tokens=n))

    return ready_to_decode(work, generate, {"device": kind_of(device)}, peak_bytes_on(device))


def sides_of(
    work: Prompts, dtypes: tuple[Dtype, ...], peers: tuple[Peer, ...], kinds: tuple[Kind, ...]
) -> dict[tuple[str, str], Callable[[], Ready]]:
    """Map each side's name and dtype to the function that makes it ready."""
    sides: dict[tuple[str, str], Callable[[], Ready]] = {}
    for dtype in dtypes:
        sides["ours", dtype] = partial(ours, work, dtype)
        for cache in ("dynamic", "static"):
            if cache in peers:
                sides[f"HF generate, {cache} cache", dtype] = partial(hf_generate, work, dtype, cache)
    if work.batch_size == 1:
        sides |= {("llama.cpp", str(kind)): partial(llama_cpp, work, kind) for kind in kinds}
    return sides


def row_of(name: str, dtype: str, outcome: Outcome, work: Prompts) -> Row:
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
    """Return each side in its better dtype, and how much faster ours is in its own."""
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
    """Write the same random weights in every format that a side reads."""
    params = write_model(config, 0, folder / "hf")
    for kind in kinds:
        write_gguf(params, config, numbers(config.vocab_size), folder / f"{kind}.gguf", dtype=kind, general={})


def numbers(size: int) -> dict[str, Any]:
    """Return the fields of a vocabulary of numbers: token ids are exchanged with llama.cpp, and no text."""
    # llama.cpp refuses a file without merges
    fields = {
        "model": "gpt2",
        "tokens": [f"<{i}>" for i in range(size)],
        "token_type": [1] * size,
        "merges": ["< 0"],
    }
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


def decode(
    *,
    preset: Preset = "135M",
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
        prompt_tokens: Tokens per prompt.
        new_tokens: New tokens per prompt, at least 2.
        dtypes: Dtypes of weights and computation.
        peers: Sides to compare with: Hugging Face generate by cache, and llama.cpp if it is installed.
        kinds: Formats of llama.cpp's weights.
        rounds: Rounds counted.
        layers: Fewer layers than the architecture has, for a quick look.
        seed: Seed of the prompts.
    """
    config = MODELS[preset] if layers is None else replace(MODELS[preset], num_layers=layers)
    installed = find_spec("llama_cpp") is not None and find_spec("gguf") is not None
    kinds = kinds if installed and "llama.cpp" in peers else ()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="decode-benchmark-") as folder:
        in_child(write_models, config, Path(folder), kinds)
        for batch_size in batch_sizes:
            work = Prompts(Path(folder), batch_size, prompt_tokens, new_tokens, config.vocab_size, seed)
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
