"""Open whatever a person calls a model: a run, an exported folder, or a Hub id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from smollm_jax.checkpoint import Checkpoints, read_params
from smollm_jax.config import Config, ModelConfig, require
from smollm_jax.config_file import as_dict, from_dict
from smollm_jax.convert import local_folder, read_folder
from smollm_jax.run_folder import write_json_atomic
from smollm_jax.tokenizer import Tokenizer, load_tokenizer


def is_run(path: str | Path) -> bool:
    return (Path(path) / "checkpoints").is_dir() and (Path(path) / "config.json").is_file()


def read_run(path: str | Path) -> Config:
    """The config of a run folder; raises `ValueError` when it is none."""
    file = Path(path) / "config.json"
    require(is_run(path), f"{path} is not a run: it needs config.json and checkpoints/")
    try:
        return from_dict(json.loads(file.read_text()))
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{file} is not the config of a run: {error}") from None


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
    config, params = read_folder(folder)
    return config, params, load_tokenizer(str(folder))


def import_run(path: str | Path, out: str | Path) -> ModelConfig:
    """Make a run of a Hugging Face folder or Hub id: its weights are checkpoint 0, nothing is trained yet."""
    out = Path(out)
    require(not out.exists() or not any(out.iterdir()), f"{out} is not empty; give another --out")
    model, params, tokenizer = load_for_inference(path)
    checkpoints = Checkpoints(out / "checkpoints", keep_last=1, keep_every=1)
    checkpoints.save(0, {"params": params}, {"imported_from": str(path)})
    require(checkpoints.wait(), f"{out} could not be written: {checkpoints.failed}")
    tokenizer.save(out / "tokenizer")
    config = Config(model=model)
    write_json_atomic(out / "config.json", as_dict(config))
    return model
