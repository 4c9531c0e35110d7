"""A train step of ours and of Hugging Face Llama + PyTorch: `python -m benchmarks.train`.

Same architecture, rows, AdamW, clip and precision; attention in PyTorch is SDPA. The peer does not keep
packed documents apart, so rows are one document each here and ours does the work of segments in vain.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from benchmarks.measure import as_command, finish, in_turn, spread
from smollm_jax.config import MODELS, RECIPES, ComputeConfig, Config, DataConfig, RunConfig

Side = tuple[Callable[[], None], float]  # a round, and the seconds to compile


def ours(config: Config, tokens: np.ndarray, dtype: str, steps: int) -> Side:
    import jax
    import jax.numpy as jnp

    from smollm_jax.hardware import memory_bytes
    from smollm_jax.step import compile_steps, init_state, make_mesh

    mesh = make_mesh(config)
    began = time.perf_counter()
    compiled, remat = compile_steps(
        config, mesh, dtype=jnp.dtype(dtype), memory_bytes=memory_bytes(mesh.devices.flat[0])
    )
    seconds = time.perf_counter() - began
    step, state = compiled[len(tokens)], init_state(config, mesh)
    batch = jax.device_put((tokens, np.ones_like(tokens)))

    def run() -> None:
        nonlocal state
        for _ in range(steps):
            state, metrics = step(state, *batch)
        jax.block_until_ready(metrics)

    print(f"ours {dtype}: remat {remat}", file=sys.stderr)
    return run, seconds


def peer(config: Config, tokens: np.ndarray, dtype: str, steps: int, *, compiled: bool) -> Side:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from smollm_jax.convert import hf_config

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("highest")
    model: Any = LlamaForCausalLM(LlamaConfig(**hf_config(config.model, "float32")))
    model.to(device).train()
    settings = config.optimizer
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        fused=True,
    )
    ids = torch.tensor(tokens[:, :-1], device=device).long()
    labels = torch.tensor(tokens[:, 1:], device=device).long()
    forward: Any = torch.compile(model) if compiled else model

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = forward(ids).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def run() -> None:
        for _ in range(steps):
            step()
        if device == "cuda":
            torch.cuda.synchronize()

    began = time.perf_counter()
    step()
    return run, time.perf_counter() - began


def train(
    *,
    preset: Literal["135M", "360M", "1.7B", "quickstart"] = "135M",
    batch_size: int = 2,
    seq_len: int = 256,
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16"),
    peers: tuple[Literal["eager", "compile"], ...] = ("eager",),
    steps: int = 1,
    rounds: int = 5,
    unroll: int = 1,
    seed: int = 0,
) -> int:
    """Time whole training steps, ours and PyTorch's in turn.

    Args:
        preset: Architecture.
        batch_size: Rows a step.
        seq_len: Tokens a row.
        dtypes: Compute dtypes over float32 parameters.
        peers: Forms of Hugging Face + PyTorch to time beside ours; none: ours alone.
        steps: Steps a round.
        rounds: Rounds counted.
        unroll: Layers a turn of our scan.
        seed: Of the tokens.
    """
    config = replace(
        RECIPES["replica"],
        preset=preset,
        model=MODELS[preset],
        data=DataConfig(seq_len=seq_len),
        run=RunConfig(phases=f"1000x{batch_size}"),
        compute=ComputeConfig(unroll=unroll),
    )
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config.model.vocab_size, (batch_size, seq_len + 1)).astype(np.int32)
    rows = []
    for dtype in dtypes:
        sides: dict[str, Side] = {"ours": ours(config, tokens, dtype, steps)}
        for form in peers:
            sides[f"HF + PyTorch {form}"] = peer(config, tokens, dtype, steps, compiled=form == "compile")
        seconds = in_turn({name: run for name, (run, _) in sides.items()}, rounds=rounds)
        for name, values in seconds.items():
            rate = spread([steps * batch_size * seq_len / value for value in values])
            ratios = [theirs / our for our, theirs in zip(seconds["ours"], values, strict=True)]
            rows.append(
                {
                    "side": name,
                    "dtype": dtype,
                    "tokens/s": rate,
                    "GFLOP/s": rate["median"] * config.model.flops_per_token(seq_len) / 1e9,
                    "first step, s": sides[name][1],
                    "ours is faster by": None if name == "ours" else spread(ratios),
                }
            )
    finish(
        f"train step, {preset}, {batch_size} x {seq_len}",
        rows,
        steps=steps,
        rounds=rounds,
        unroll=unroll,
        seed=seed,
    )
    return 0


if __name__ == "__main__":
    as_command(train, "train")
