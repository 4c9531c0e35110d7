"""The workloads of the benchmarks, and our train step compiled for one as a run compiles it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.harness.sides import Ready
from smollm_jax.config.architecture import MODELS, ModelConfig
from smollm_jax.config.recipes import RECIPES
from smollm_jax.config.settings import ComputeConfig, Config, DataConfig, RunConfig

Preset = Literal["135M", "360M", "1.7B", "quickstart"]
Dtype = Literal["float32", "bfloat16"]
COMPUTE = ComputeConfig()


@dataclass(frozen=True)
class StepWork:
    """`steps` train steps per round, on random rows by `config` and `seed`, computed in `dtype`."""

    config: Config
    dtype: Dtype
    documents: int = 1
    steps: int = 1
    seed: int = 0

    @property
    def batch_size(self) -> int:
        return self.config.main_batch_size

    @property
    def step_tokens(self) -> int:
        return self.batch_size * self.config.data.seq_len

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Return random tokens, and segment ids that cut each row into documents at random: (B, T+1).

        Of conversations and pairs, the documents have equal lengths, and their first halves are no targets.
        """
        rng = np.random.default_rng(self.seed)
        shape = (self.batch_size, self.config.data.seq_len + 1)
        tokens = rng.integers(0, self.config.model.vocab_size, shape).astype(np.int32)
        if self.config.data.is_chat:
            part, place = np.divmod(np.arange(shape[1], dtype=np.int32) * self.documents, shape[1])
            row = np.where(2 * place < shape[1], -part - 1, part + 1)
            return tokens, np.broadcast_to(row, shape).astype(np.int32)
        segment_ids = np.ones(shape, np.int32)
        for row in segment_ids:
            for cut in rng.choice(np.arange(1, shape[1]), self.documents - 1, replace=False):
                row[cut:] += 1
        return tokens, segment_ids


@dataclass(frozen=True)
class Prompts:
    """Prompts of one length to continue; `folder` holds the model in the formats of Hugging Face and GGUF."""

    folder: Path
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    vocab_size: int
    seed: int

    def prompts(self) -> list[list[int]]:
        shape = (self.batch_size, self.prompt_tokens)
        return np.random.default_rng(self.seed).integers(0, self.vocab_size, shape).tolist()


def ready_to_decode(
    work: Prompts,
    generate: Callable[[int], list[list[int]]],
    facts: dict[str, Any] | None = None,
    peak_bytes: Callable[[], int | None] = lambda: None,
) -> Ready:
    """Return a side whose rounds make one new token per prompt, then all of them, by `generate(new tokens)`.

    Its facts hold the first tokens, by which sides are compared.
    """

    def run() -> dict[str, float]:
        began = time.perf_counter()
        generate(1)
        first = time.perf_counter()
        texts = generate(work.new_tokens)
        assert [len(text) for text in texts] == [work.new_tokens] * work.batch_size
        return {"first token": first - began, "all": time.perf_counter() - first}

    return Ready(run, {"tokens": generate(work.new_tokens)[0][:8]} | (facts or {}), peak_bytes)


def config_of(preset: Preset, batch_size: int, seq_len: int, compute: ComputeConfig = COMPUTE) -> Config:
    return replace(
        RECIPES["replica"],
        preset=preset,
        model=MODELS[preset],
        data=DataConfig(seq_len=seq_len),
        run=RunConfig(phases=f"1000x{batch_size}"),
        compute=compute,
    )


def dtype_of(compute: ComputeConfig) -> Any:
    """Return the name of the compute dtype that a run on this machine would use."""
    import jax

    from smollm_jax.runtime.devices import compute_dtype

    return compute_dtype(compute.dtype, jax.default_backend()).name


def write_model(model: ModelConfig, seed: int, folder: Path) -> Any:
    """Write the initial weights of a run with `seed` as a Hugging Face folder; return them as numpy arrays.

    JAX computes them on the CPU.
    """
    import jax

    from smollm_jax.hf.export import write_folder
    from smollm_jax.model.transformer import init_params

    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        params = jax.tree.map(np.asarray, init_params(model, seed))
    write_folder(params, model, folder)
    return params


@dataclass
class OurStep:
    """The compiled step; `run` starts one and returns its metrics without waiting."""

    run: Callable[[], Any]
    program: Any
    mesh: Any
    remat: str
    ops: Any
    compile_seconds: float

    @property
    def note(self) -> str:
        return f"remat {self.remat}, attention {self.ops.kernels}"


def our_step(work: StepWork) -> OurStep:
    """Compile the train step for `work`, with the kernels selected and checked as at the start of a run."""
    import jax
    import jax.numpy as jnp

    from smollm_jax.distributed.sharding import make_mesh, on_devices, padded_rows
    from smollm_jax.kernels.select import select_checked_ops
    from smollm_jax.model.preference import pairs_per_row
    from smollm_jax.runtime.devices import memory_bytes, use_precision_of
    from smollm_jax.training.compile import compile_steps
    from smollm_jax.training.step import BATCH_AXES, HEAD_AXIS, init_state

    config, dtype = work.config, jnp.dtype(work.dtype)
    use_precision_of(dtype)
    mesh = make_mesh(config, jax.devices()[:1])  # the peer has one device too
    ops, notes = select_checked_ops(
        config.compute.attention, mesh, dtype, config.model, rows=BATCH_AXES, heads=HEAD_AXIS
    )
    for note in notes:
        print(note, file=sys.stderr)
    limit = memory_bytes(mesh.devices.flat[0], config.model.num_parameters)
    began = time.perf_counter()
    compiled, remat = compile_steps(config, mesh, dtype=dtype, memory_bytes=limit, ops=ops)
    seconds = time.perf_counter() - began
    program, rows = compiled[work.batch_size], padded_rows(work.batch_size, mesh, config.compute.grad_accum)
    arrays = [*work.rows()]
    if config.data.is_pairs:  # the reference's log-probs
        arrays.append(np.zeros((work.batch_size, pairs_per_row(config.data.seq_len), 2), np.float32))
    batch = [on_devices(array, rows, 0, mesh) for array in arrays]
    state = init_state(config, mesh)

    def run() -> Any:
        nonlocal state
        state, metrics = program(state, *batch)
        return metrics

    return OurStep(run, program, mesh, remat, ops, seconds)
