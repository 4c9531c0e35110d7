"""Open whatever a person calls a model: a run, an exported folder, or a Hub id; and make a run of any of them.

What is opened is an architecture, f32 numpy parameters and a tokenizer, wherever they came from; what cannot
be opened is one line of `ValueError`.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from smollm_jax.checkpoint import Checkpoints, read_params
from smollm_jax.config import Config, ModelConfig, UserError, require
from smollm_jax.config_file import as_dict, from_dict
from smollm_jax.convert import local_folder, read_folder
from smollm_jax.hf_folder import read_json
from smollm_jax.run_folder import write_json_atomic
from smollm_jax.tokenizer import Tokenizer, load_tokenizer


def is_run(path: str | Path) -> bool:
    return (Path(path) / "checkpoints").is_dir() and (Path(path) / "config.json").is_file()


def read_run(path: str | Path) -> Config:
    """The config of a run folder, also before its first checkpoint; raises `ValueError` when it is none."""
    try:
        return from_dict(read_json(Path(path) / "config.json"))
    except ValueError as error:
        raise UserError(f"{path} is not a run: {error}") from None


def load_for_inference(path: str | Path, step: int | None = None) -> tuple[ModelConfig, Any, Tokenizer]:
    """Architecture, f32 numpy parameters and tokenizer; raises `ValueError` in one line.

    `step` picks a checkpoint of a run; by default the newest good one.
    """
    if is_run(path):
        config = read_run(path)
        _, params = read_params(Path(path) / "checkpoints", step)
        return config.model, params, load_tokenizer(str(Path(path) / "tokenizer"))
    require(step is None, f"{path} is not a run, so it has no step {step}")
    folder = local_folder(path)
    model, params = read_folder(folder)
    tokenizer = load_tokenizer(str(folder.absolute()))
    require(
        tokenizer.vocab_size <= model.vocab_size,
        f"{path}: the tokenizer has {tokenizer.vocab_size} entries, the model only {model.vocab_size}",
    )
    return model, params, tokenizer


def import_run(path: str | Path, out: str | Path) -> ModelConfig:
    """Make a run of a Hugging Face folder or Hub id: its weights are checkpoint 0, nothing is trained yet.

    The run appears by one rename. Raises `ValueError` when `out` holds something or `path` cannot be read.
    """
    out = Path(os.path.abspath(out))  # "." has no name of its own
    require(not out.exists() or out.is_dir(), f"{out} is a file; give another --out")
    require(not out.exists() or not any(out.iterdir()), f"{out} is not empty; give another --out")
    model, params, tokenizer = load_for_inference(path)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part-{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    try:
        checkpoints = Checkpoints(part / "checkpoints", keep_last=1, keep_every=1)
        # no "progress" in the meta: that is how a start knows weights to begin with from a run to go on with
        checkpoints.save(0, {"params": params}, {"imported_from": str(path)})
        require(checkpoints.wait(), f"{out} could not be written: {checkpoints.failed}")
        tokenizer.save(part / "tokenizer")
        write_json_atomic(part / "config.json", as_dict(_config_of(model)))
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return model


def _config_of(model: ModelConfig) -> Config:
    """The default settings around `model`; rows no longer than its context."""
    default = Config()
    data = replace(default.data, seq_len=min(default.data.seq_len, model.max_seq_len))
    return replace(default, model=model, data=data)
