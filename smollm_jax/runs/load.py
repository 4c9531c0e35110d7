"""Open a run, an exported folder, a GGUF file or a Hub id as a model.

A model is an architecture, f32 numpy parameters and a tokenizer. A path that cannot be opened raises `UserError`.
"""

import contextlib
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any

from smollm_jax.checkpoint.listing import VerifiedCheckpoint, find_checkpoint, open_checkpoint, steps_in
from smollm_jax.checkpoint.manager import read_params
from smollm_jax.config.architecture import ModelConfig, parameter_shapes
from smollm_jax.config.serialization import from_dict
from smollm_jax.config.settings import Config
from smollm_jax.hf.adapters import (
    adapted_sha256,
    is_adapter_folder,
    merge,
    open_adapters,
    read_adapters,
    weights_sha256,
)
from smollm_jax.hf.config_json import MOST_LAYERS
from smollm_jax.hf.gguf_model import read_gguf
from smollm_jax.hf.reader import is_gguf, local_folder, read_folder
from smollm_jax.runs.lock import PARENT
from smollm_jax.runtime.errors import UserError, require
from smollm_jax.runtime.files import Damaged, expand_home, read_json
from smollm_jax.tokenizer.load import load_tokenizer
from smollm_jax.tokenizer.tokenizer import SpecialTokens, Tokenizer

OPENING: ContextVar[tuple[str, ...]] = ContextVar("OPENING", default=())  # places of bases of adapters


def is_run(path: str | Path) -> bool:
    """Return whether `path` is a run folder."""
    path = expand_home(path)
    return (path / "checkpoints").is_dir() and (path / "config.json").is_file()


def read_run(path: str | Path) -> Config:
    """Return the config of a run folder, also before its first checkpoint. Raises `UserError` for no run."""
    try:
        config = from_dict(read_json(expand_home(path) / "config.json"))
    except ValueError as error:
        raise UserError(f"{path} is not a run: {error}") from None
    layers = config.model.num_layers  # a damaged number must not ask for a list of a billion names
    require(layers <= MOST_LAYERS, f"{path}: config.json says {layers:,} layers; at most {MOST_LAYERS:,} are read")
    return config


def parent_of(path: str | Path) -> dict[str, Any] | None:
    """Return the record of the run that a branch began at, None for other runs. Raises `UserError` if damaged."""
    place = expand_home(path) / PARENT
    if not place.exists():
        return None
    record = read_json(place)
    is_whole = (
        isinstance(record, dict) and isinstance(record.get("parent"), str) and type(record.get("step")) is int
    )
    require(is_whole, f"{place} is damaged: it does not name a run and a step")
    return dict(record)


def progress_of(found: VerifiedCheckpoint) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return progress and data cursor of a run's checkpoint; raises `UserError` unless they are of such a form.

    The loader checks the rest of the cursor.
    """
    progress, cursor = found.meta.get("progress"), found.meta.get("cursor")
    lacks = f"checkpoint {found.step} is damaged: its meta.json lacks progress or cursor of a run"
    if not isinstance(progress, dict) or not isinstance(cursor, dict):
        raise UserError(lacks)
    figures = progress.get("figures", {})
    numbers = [x for name, x in progress.items() if name not in ("cursor", "ledger", "figures")]
    numbers += figures.values() if isinstance(figures, dict) else [None]
    is_whole = isinstance(progress.get("ledger", ""), str) and all(type(x) in (int, float) for x in numbers)
    require(is_whole, lacks)
    require(isinstance(cursor.get("tokenizer"), str) and type(cursor.get("step")) is int, lacks)
    return progress, cursor


def newest_step(path: str | Path) -> int:
    """Return the step of the checkpoint that `load_model` opens; raises `UserError` if there is none."""
    return find_checkpoint(expand_home(path) / "checkpoints", None, group="params").step


def checkpoint_times(run: Path) -> dict[int, int]:
    """Return for each checkpoint of a run when its folder last changed, in nanoseconds."""
    times = {}
    for step in steps_in(run / "checkpoints"):
        with contextlib.suppress(OSError):  # a run under way has just removed it
            times[step] = (run / "checkpoints" / str(step)).stat().st_mtime_ns
    return times


def is_good(run: Path, step: int) -> bool:
    """Return whether the parameters of a checkpoint verify but for their bytes, which loading verifies."""
    try:
        open_checkpoint(run / "checkpoints" / str(step), step, group="params", checksums=False)
    except (Damaged, OSError):
        return False
    return True


def load_model(
    path: str | Path, step: int | None = None, *, special_tokens: SpecialTokens | None = None
) -> tuple[ModelConfig, Any, Tokenizer]:
    """Return architecture, f32 numpy parameters and tokenizer. Raises `UserError`.

    `step` selects a checkpoint of a run, by default the newest good one. `special_tokens` is by default the run's
    own, else "text".
    """
    if is_run(path):
        config, path = read_run(path), expand_home(path)
        found, params = read_whole(path, config, step)
        require((path / "tokenizer").is_dir(), f"{path}/tokenizer is missing; restore it, or open {path}/export")
        tokenizer = load_tokenizer(
            str(path / "tokenizer"), special_tokens=special_tokens or config.data.special_tokens
        )
        if "progress" in found.meta:  # an import has none
            tokenizer.encode_as_of(progress_of(found)[1]["tokenizer"])
        return config.model, params, tokenizer
    refuse_broken_run(expand_home(path))
    require(step is None, f"{path} is not a run, so it has no step {step}")
    if is_gguf(path):
        model, params, tokenizer = read_gguf(expand_home(path))
        tokenizer.mode = special_tokens or "text"
        return model.ending_at([*model.stop_ids, tokenizer.eos_id]), params, tokenizer
    folder = local_folder(path)
    if is_adapter_folder(folder):
        return _merged_folder(folder, special_tokens)
    model, params = read_folder(folder)
    tokenizer = load_tokenizer(str(folder.absolute()), special_tokens=special_tokens or "text")
    sizes = f"{tokenizer.vocab_size} entries, the model only {model.vocab_size}"
    require(tokenizer.vocab_size <= model.vocab_size, f"{path}: the tokenizer has {sizes}")
    return model.ending_at([*model.stop_ids, tokenizer.eos_id]), params, tokenizer


def refuse_broken_run(folder: Path) -> None:
    """Raise `UserError` for a run folder that has lost its config.json or its checkpoints."""
    try:
        values = read_json(folder / "config.json") if (folder / "config.json").is_file() else None
    except ValueError:
        return  # its reader says more
    without = "config.json" if values is None and (folder / "checkpoints").is_dir() else ""
    without = "checkpoints" if isinstance(values, dict) and {"run", "data"} <= values.keys() else without
    export = folder / "export"
    instead = (
        f"its export can be opened: {export}" if export.is_dir() else "train it again, or open another folder"
    )
    require(not without, f"{folder} is a run without {without}; {instead}")


def read_weights(
    run: Path, config: Config, step: int | None, *, ema: bool = False
) -> tuple[VerifiedCheckpoint, dict[str, Any]]:
    """Return a checkpoint, by default the newest good one, and its weights, or with `ema` their moving average."""
    require(not ema or config.optimizer.ema > 0, f"{run} keeps no moving average of its weights; train with --ema")
    return read_params(run / "checkpoints", step, group="ema" if ema else "params")


def read_whole(
    run: Path, config: Config, step: int | None, *, ema: bool = False
) -> tuple[VerifiedCheckpoint, Any]:
    """Return what `read_weights` returns, with any adapters merged in f32."""
    found, params = read_weights(run, config, step, ema=ema)
    if config.adapter.is_on:
        base = base_record(found, config.run.init_from)
        params = merge(load_base(base, config.model), params, config.adapter.scale)
    return found, params


def _merged_folder(folder: Path, special_tokens: SpecialTokens | None) -> tuple[ModelConfig, Any, Tokenizer]:
    """Return the model of a PEFT folder, merged with its base in f32. Its own tokenizer goes before the base's."""
    found = open_adapters(folder)
    step = found.base_step if is_run(found.base) else None
    model, params, tokenizer = _open_base(found.base, step, special_tokens)
    check_base(found.base, step, model, params, found.base_hash)
    adapters, scale = read_adapters(found, model)
    if (folder / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(str(folder.absolute()), special_tokens=special_tokens or "text")
    return model.ending_at([tokenizer.eos_id, *model.stop_ids]), merge(params, adapters, scale), tokenizer


def open_for_adapters(source: str) -> tuple[ModelConfig, Any, Tokenizer, dict[str, Any]]:
    """Return a model as `load_model` does, and the record of its weights: place, step of a run, and hash."""
    step = newest_step(source) if is_run(source) else None
    model, params, tokenizer = load_model(source, step)
    record = place_of(source) | {"step": step, "sha256": _hash_of(source, step, model, params)}
    return model, params, tokenizer, record


def _hash_of(path: str, step: int | None, model: ModelConfig, params: Any) -> str:
    """Return the hash that says which weights `path` holds. `params` are these, with any adapters merged."""
    if is_run(path) and (config := read_run(path)).adapter.is_on:
        found, adapters = read_params(expand_home(path) / "checkpoints", step)
        base = base_record(found, config.run.init_from)
        return adapted_sha256(base["sha256"], adapters, config.adapter.scale)
    if not is_run(path) and not is_gguf(path) and is_adapter_folder(folder := local_folder(path)):
        theirs = open_adapters(folder)
        if theirs.base_hash is not None:
            return adapted_sha256(theirs.base_hash, *read_adapters(theirs, model))
    return weights_sha256(params)


def place_of(source: str) -> dict[str, str]:
    """Return the part of a record that says where the weights are: an absolute path, or a Hub id as it is."""
    path = expand_home(source)
    return {"path": str(path.absolute()) if path.exists() else source}


def base_record(found: VerifiedCheckpoint, init_from: str | None) -> dict[str, Any]:
    """Return the record of the base in a checkpoint of adapters. Raises `UserError` if it is damaged.

    If the folder on record is gone, the run's `init_from` may name its new place. The hash decides.
    """
    base = found.meta.get("base")
    is_whole = isinstance(base, dict) and all(isinstance(base.get(name), str) for name in ("path", "sha256"))
    require(is_whole, f"checkpoint {found.step} is damaged: its meta.json lacks the base of its adapters")
    base = dict(base or {})
    gone = Path(base["path"]).is_absolute() and not Path(base["path"]).exists()
    return base | place_of(init_from) if gone and init_from else base


def load_base(base: dict[str, Any], model: ModelConfig) -> Any:
    """Return the weights on record. Raises `UserError` if they are gone, or are other weights now."""
    step = base.get("step") if is_run(base["path"]) else None
    theirs, params, _ = _open_base(base["path"], step, None)
    same = parameter_shapes(theirs) == parameter_shapes(model)
    require(same, f"{base['path']} is another base than the adapters were trained on: its shapes differ")
    check_base(base["path"], step, theirs, params, base["sha256"])
    return params


def _open_base(
    path: str, step: int | None, special_tokens: SpecialTokens | None
) -> tuple[ModelConfig, Any, Tokenizer]:
    place = place_of(path)["path"]
    require(place not in OPENING.get(), f"the base of the adapters leads back to itself: {place}")
    before = OPENING.set((*OPENING.get(), place))
    try:
        return load_model(path, step, special_tokens=special_tokens)
    except UserError as error:
        moved = "adapter_config.json, or --init-from of the run's own command, can name its new place"
        raise UserError(f"the base of the adapters cannot be opened; {moved}: {error}") from None
    finally:
        OPENING.reset(before)


def check_base(path: str, step: int | None, model: ModelConfig, params: Any, recorded: str | None) -> None:
    """Raise `UserError` unless the weights have the hash on record, if there is one."""
    same = recorded is None or _hash_of(path, step, model, params) == recorded
    same = same or weights_sha256(params) == recorded  # as earlier versions recorded merged weights
    require(same, f"{path} is another base than the adapters were trained on; bring back its weights")


def with_ids_of(model: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """Return the model with the tokenizer's bos and eos. A model that ends texts at several ids keeps them."""
    more = model.stop_ids if model.extra_eos_token_ids else ()
    bos = model.bos_token_id if tokenizer.bos_id is None else tokenizer.bos_id
    return replace(model.ending_at([tokenizer.eos_id, *more]), bos_token_id=bos)
