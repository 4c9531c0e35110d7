"""Open a run, an exported folder or a Hub id as a model.

A model is an architecture, f32 numpy parameters and a tokenizer. A path that cannot be opened raises `UserError`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from smollm_jax.checkpoint.listing import find_checkpoint
from smollm_jax.checkpoint.manager import read_params
from smollm_jax.config.architecture import ModelConfig
from smollm_jax.config.serialization import from_dict
from smollm_jax.config.settings import Config
from smollm_jax.data.loader import check_cursor
from smollm_jax.hf.config_json import MOST_LAYERS
from smollm_jax.hf.reader import local_folder, read_folder
from smollm_jax.runtime.errors import UserError, require
from smollm_jax.runtime.files import expand_home, read_json
from smollm_jax.tokenizer.load import load_tokenizer
from smollm_jax.tokenizer.tokenizer import SpecialTokens, Tokenizer


def is_run(path: str | Path) -> bool:
    """Return whether `path` is a run folder."""
    path = expand_home(path)
    return (path / "checkpoints").is_dir() and (path / "config.json").is_file()


def read_run(path: str | Path) -> Config:
    """Return the config of a run folder, also before its first checkpoint; raises `UserError` if it is no run."""
    try:
        config = from_dict(read_json(expand_home(path) / "config.json"))
    except ValueError as error:
        raise UserError(f"{path} is not a run: {error}") from None
    layers = config.model.num_layers  # a damaged number must not ask for a list of a billion names
    require(layers <= MOST_LAYERS, f"{path}: config.json says {layers:,} layers; at most {MOST_LAYERS:,} are read")
    return config


def newest_step(path: str | Path) -> int:
    """Return the step of the checkpoint that `load_model` opens; raises `UserError` if there is none."""
    return find_checkpoint(expand_home(path) / "checkpoints", None, group="params").step


def load_model(
    path: str | Path, step: int | None = None, *, special_tokens: SpecialTokens | None = None
) -> tuple[ModelConfig, Any, Tokenizer]:
    """Return architecture, f32 numpy parameters and tokenizer; raises `UserError`.

    `step` selects a checkpoint of a run; the default is the newest good one. `special_tokens` is by default the
    run's own, else "text".
    """
    if is_run(path):
        config, path = read_run(path), expand_home(path)
        found, params = read_params(path / "checkpoints", step)
        tokenizer = load_tokenizer(
            str(path / "tokenizer"), special_tokens=special_tokens or config.data.special_tokens
        )
        if found.meta.get("cursor") is not None:  # an import has none
            check_cursor(found.meta["cursor"], f"checkpoint {found.step} is damaged: it lacks a place in the data")
            tokenizer.encode_as_of(found.meta["cursor"]["tokenizer"])
        return config.model, params, tokenizer
    require(step is None, f"{path} is not a run, so it has no step {step}")
    folder = local_folder(path)
    model, params = read_folder(folder)
    tokenizer = load_tokenizer(str(folder.absolute()), special_tokens=special_tokens or "text")
    sizes = f"{tokenizer.vocab_size} entries, the model only {model.vocab_size}"
    require(tokenizer.vocab_size <= model.vocab_size, f"{path}: the tokenizer has {sizes}")
    return model.ending_at([*model.stop_ids, tokenizer.eos_id]), params, tokenizer


def with_ids_of(model: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """Return the model with the tokenizer's bos and eos; a model that ends texts at several ids keeps them."""
    more = model.stop_ids if model.extra_eos_token_ids else ()
    bos = model.bos_token_id if tokenizer.bos_id is None else tokenizer.bos_id
    return replace(model.ending_at([tokenizer.eos_id, *more]), bos_token_id=bos)
