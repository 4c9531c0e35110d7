"""Convert a run to a Hugging Face folder or a GGUF file, and such a folder or file to a run.

The end of a run and `python -m smollm_jax export` both call `export_run`, so that they cannot differ.
"""

import os
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

from smollm_jax.checkpoint.manager import CheckpointManager
from smollm_jax.config.architecture import ModelConfig
from smollm_jax.config.serialization import to_dict
from smollm_jax.config.settings import Config
from smollm_jax.hf.adapters import SETTINGS
from smollm_jax.hf.adapters import merge as merged
from smollm_jax.hf.card import REPO, About
from smollm_jax.hf.config_json import hf_config
from smollm_jax.hf.export import compare_merged, export_adapters, export_folder
from smollm_jax.hf.gguf_export import export_gguf
from smollm_jax.hf.gguf_file import read_file
from smollm_jax.hf.publish import refuse_foreign, refuse_links
from smollm_jax.hf.reader import is_gguf, local_folder
from smollm_jax.runs.about import about_run
from smollm_jax.runs.load import (
    base_record,
    is_run,
    load_base,
    load_model,
    read_run,
    read_weights,
    read_whole,
    with_ids_of,
)
from smollm_jax.runs.plot import draw
from smollm_jax.runtime.errors import require, say
from smollm_jax.runtime.files import clean_left_overs, expand_home, held_in, write_json_atomic, written_aside
from smollm_jax.tokenizer.load import load_tokenizer


def export_run(
    run_dir: str | Path,
    out: str | Path,
    *,
    step: int | None = None,
    dtype: str = "float32",
    verify: bool = True,
    aside: bool = False,
    merge: bool = False,
    ema: bool = False,
) -> tuple[int, str]:
    """Export checkpoint `step` of a run, by default the newest good one, to `out`.

    With `ema` the weights are their moving average. Adapters are written as PEFT's folder, or with `merge` as a
    whole model. Returns the step, and a sentence on how the folder was compared with the run. Raises `UserError`
    if `run_dir` is no run, or `out` holds something else and `aside` is false. Raises `RuntimeError` if the
    written folder does not agree with the checkpoint. No folder is left then.
    """
    run_dir, out = expand_home(run_dir), expand_home(out)
    config = read_run(run_dir)
    if not aside:  # before gigabytes are read
        refuse_foreign(out, out)
    found, params = read_weights(run_dir, config, step, ema=ema)
    tokenizer, about = run_dir / "tokenizer", about_run(run_dir, found, ema=ema)
    model = with_ids_of(config.model, load_tokenizer(str(tokenizer)))
    settings, compare = config.adapter, None
    require(settings.is_on or not merge, f"--merge is for runs with adapters; {run_dir} trained whole weights")
    if settings.is_on and not merge:
        require(dtype == "float32", f"--dtype {dtype} is for whole models; adapters are written in float32")
        base = base_record(found, config.run.init_from)
        checked = export_adapters(
            params, settings, model, out, base=base, tokenizer_folder=tokenizer, about=about, verify=verify,
            aside=aside,
        )  # fmt: skip
        opens = f"; PEFT opens no run: export {base['path']}, and name that folder in {SETTINGS}"
        return found.step, checked + (opens if is_run(base["path"]) else "")
    if merge:
        base = load_base(base_record(found, config.run.init_from), config.model)
        compare = partial(compare_merged, base, params, settings.scale)
        params = merged(base, params, settings.scale)
    return found.step, export_folder(
        params, model, out, dtype=dtype, tokenizer_folder=tokenizer, about=about, compare=compare,
        curve=partial(draw, run_dir), verify=verify, aside=aside,
    )  # fmt: skip


def export_model(
    path: str | Path, out: str | Path,
    *, step: int | None = None, dtype: str = "f16", verify: bool = True, ema: bool = False,
) -> tuple[Path, str]:  # fmt: skip
    """Export a run, Hugging Face folder or Hub id to the folder `out` with a GGUF file. Raises as `export_run`.

    Returns the file, and a sentence on how it was compared with the model.
    """
    out = expand_home(out)
    refuse_foreign(out, out)  # before gigabytes are read
    if is_run(path):
        path = expand_home(path)
        found, params = read_whole(path, read_run(path), step, ema=ema)
        about, tokenizer = about_run(path, found, ema=ema), load_tokenizer(str(path / "tokenizer"))
        model = with_ids_of(read_run(path).model, tokenizer)
    else:
        require(not ema, f"--ema is for runs, and {path} is none")
        model, params, tokenizer = load_model(path, step)
        hub = str(path) if REPO.fullmatch(str(path)) and not Path(path).exists() else None
        about = About(title=expand_home(path).resolve().stem, rows={"Made from": str(path)}, base_model=hub)
    return export_gguf(params, model, tokenizer, out, dtype=dtype, about=about, verify=verify)


def require_exportable(model: ModelConfig) -> None:
    """Raise `UserError` for an architecture that no Hugging Face folder can have."""
    hf_config(model, "float32")


def import_run(path: str | Path, out: str | Path) -> ModelConfig:
    """Make a run of a Hugging Face folder, Hub id or GGUF file. Its weights become checkpoint 0.

    The run appears by one rename. Raises `UserError` if `out` holds something or `path` cannot be read.
    """
    out = Path(os.path.realpath(expand_home(out)))  # "." has no name of its own, and a link stays a link
    clean_left_overs(out, (out.name,))
    require(not out.exists() or out.is_dir(), f"{out} is a file; give another --out")
    _require_empty(out)
    source, began = expand_home(path), str(path)
    if is_gguf(path):
        began = f"{path} ({read_file(source).bits})"
        say(f"{began}: what the file has rounded stays rounded")
    else:
        source = source if is_run(path) else local_folder(path)
        refuse_links(source)
    model, params, tokenizer = load_model(source)
    out.parent.mkdir(parents=True, exist_ok=True)
    default = Config()
    data = replace(default.data, seq_len=min(default.data.seq_len, model.max_seq_len))
    with (
        written_aside(out) as part,
        closing(CheckpointManager(part / "checkpoints", keep_last=1, keep_every=1)) as checkpoints,
    ):
        # without "progress" in the meta, a start takes the weights and does not resume
        checkpoints.save(0, {"params": params}, {"imported_from": began})
        require(checkpoints.wait(), f"{out} could not be written: {checkpoints.failed}")
        tokenizer.save(part / "tokenizer")
        write_json_atomic(part / "config.json", to_dict(replace(default, model=model, data=data)))
        _require_empty(out, but=part)  # again: a model takes a while to load
    return model


def _require_empty(folder: Path, but: Path | None = None) -> None:
    held = {*held_in(folder)} - {but} if folder.exists() else set()
    require(not held, f"{folder} is not empty; give another --out")
