"""The work that the benchmarks of the train step have in common, and our step made ready for it as a run does."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from smollm_jax.config.architecture import MODELS, ModelConfig
from smollm_jax.config.recipes import RECIPES
from smollm_jax.config.settings import AttentionName, ComputeConfig, Config, DataConfig, RunConfig

Preset = Literal["135M", "360M", "1.7B", "quickstart"]
Dtype = Literal["float32", "bfloat16"]
COMPUTE = ComputeConfig()


@dataclass(frozen=True)
class Work:
    """`steps` steps a round of the rows that `config` and `seed` give; `dtype` is that of the computation."""

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
        """Random tokens, and segment ids that cut each row into its documents at random: (B, T+1)."""
        rng = np.random.default_rng(self.seed)
        shape = (self.batch_size, self.config.data.seq_len + 1)
        tokens = rng.integers(0, self.config.model.vocab_size, shape).astype(np.int32)
        segment_ids = np.ones(shape, np.int32)
        for row in segment_ids:
            for cut in rng.choice(np.arange(1, shape[1]), self.documents - 1, replace=False):
                row[cut:] += 1
        return tokens, segment_ids


def config_of(preset: Preset, batch_size: int, seq_len: int, compute: ComputeConfig = COMPUTE) -> Config:
    return replace(
        RECIPES["replica"],
        preset=preset,
        model=MODELS[preset],
        data=DataConfig(seq_len=seq_len),
        run=RunConfig(phases=f"1000x{batch_size}"),
        compute=compute,
    )


def write_model(model: ModelConfig, seed: int, folder: Path) -> Any:
    """Fresh weights, as a run of that seed begins with, in a folder as Hugging Face has them; and as numpy arrays.

    JAX is told to stay on the CPU for it.
    """
    import jax

    from smollm_jax.hf.export import write_folder
    from smollm_jax.model.transformer import init_params

    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        params = jax.tree.map(np.asarray, init_params(model, seed))
    write_folder(params, model, folder, dtype="float32", tokenizer_folder=None)
    return params


@dataclass
class OurStep:
    """The compiled step; `run` does one and returns its metrics, not waited for."""

    run: Callable[[], Any]
    program: Any
    mesh: Any
    remat: str
    attention: AttentionName
    compile_seconds: float

    @property
    def note(self) -> str:
        return f"remat {self.remat}, attention {self.attention}"


def our_step(work: Work) -> OurStep:
    """Compile the train step for `work`, the attention kernel chosen and checked as at the start of a run."""
    import jax
    import jax.numpy as jnp

    from smollm_jax.distributed.sharding import make_mesh, on_devices, padded_rows
    from smollm_jax.kernels.select import choose_checked
    from smollm_jax.runtime.devices import memory_bytes, use_precision_of
    from smollm_jax.training.compile import compile_steps
    from smollm_jax.training.step import init_state

    config, dtype = work.config, jnp.dtype(work.dtype)
    use_precision_of(dtype)
    mesh = make_mesh(config, jax.devices()[:1])  # the peer has one device too
    attention, notes = choose_checked(config.compute.attention, mesh, config.model, dtype)
    for note in notes:
        print(note, file=sys.stderr)
    config = replace(config, compute=replace(config.compute, attention=attention))
    limit = memory_bytes(mesh.devices.flat[0], config.model.num_parameters)
    began = time.perf_counter()
    compiled, remat = compile_steps(config, mesh, dtype=dtype, memory_bytes=limit)
    seconds = time.perf_counter() - began
    program, rows = compiled[work.batch_size], padded_rows(work.batch_size, mesh, config.compute.grad_accum)
    batch = [on_devices(array, rows, 0, mesh) for array in work.rows()]
    state = init_state(config, mesh)

    def run() -> Any:
        nonlocal state
        state, metrics = program(state, *batch)
        return metrics

    return OurStep(run, program, mesh, remat, attention, seconds)
