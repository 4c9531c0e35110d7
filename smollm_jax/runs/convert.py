"""Convert a run to a Hugging Face folder, and a Hugging Face folder to a run.

The end of a run and `python -m smollm_jax export` both call `export_run`, so that they cannot differ.
"""

import os
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

from smollm_jax.checkpoint.manager import CheckpointManager, read_params
from smollm_jax.config.architecture import ModelConfig
from smollm_jax.config.serialization import to_dict
from smollm_jax.config.settings import Config
from smollm_jax.hf.config_json import hf_config
from smollm_jax.hf.export import export_folder
from smollm_jax.hf.publish import refuse_links
from smollm_jax.hf.reader import local_folder
from smollm_jax.runs.load import is_run, load_model, progress_of, read_run, with_ids_of
from smollm_jax.runs.metrics import draw, read_metrics
from smollm_jax.runtime.errors import require
from smollm_jax.runtime.files import clean_left_overs, write_json_atomic, written_aside
from smollm_jax.tokenizer.load import load_tokenizer


def export_run(
    run_dir: str | Path,
    out: str | Path,
    *,
    step: int | None = None,
    dtype: str = "float32",
    verify: bool = True,
    aside: bool = False,
) -> tuple[int, str]:
    """Export checkpoint `step` of a run, by default the newest good one, to the folder `out`.

    Returns the step, and a sentence on how the folder was compared with the run. Raises `UserError` if `run_dir`
    is no run, or `out` holds something else and `aside` is false, and `RuntimeError` if the written folder does
    not agree with the checkpoint; no folder is left then.
    """
    run_dir = Path(run_dir)
    config = read_run(run_dir)
    found, params = read_params(run_dir / "checkpoints", step)
    evaluations = [x for x in read_metrics(run_dir) if "eval_loss" in x and x["step"] <= found.step]
    held_out = evaluations[-1] if evaluations else {}
    facts = {
        "Recipe": config.recipe,
        "Data": config.data.data,
        "Steps": found.step,
        "Tokens": progress_of(found)[0].get("tokens") if "progress" in found.meta else None,
        "Held-out loss (nats a token)": held_out.get("eval_loss"),
        "Held-out bits per byte": held_out.get("eval_bits_per_byte"),
    }
    model = with_ids_of(config.model, load_tokenizer(str(run_dir / "tokenizer")))
    return found.step, export_folder(
        params, model, out, dtype=dtype, tokenizer_folder=run_dir / "tokenizer", card_facts=facts,
        curve=partial(draw, run_dir), verify=verify, aside=aside,
    )  # fmt: skip


def require_exportable(model: ModelConfig) -> None:
    """Raise `UserError` for an architecture that no Hugging Face folder can have."""
    hf_config(model, "float32")


def import_run(path: str | Path, out: str | Path) -> ModelConfig:
    """Make a run of a Hugging Face folder or Hub id, whose weights become checkpoint 0.

    The run appears by one rename. Raises `UserError` if `out` holds something or `path` cannot be read.
    """
    out = Path(os.path.realpath(out))  # "." has no name of its own, and a link stays a link
    clean_left_overs(out, (out.name,))
    require(not out.exists() or out.is_dir(), f"{out} is a file; give another --out")
    require(not out.exists() or not any(out.iterdir()), f"{out} is not empty; give another --out")
    source = Path(path) if is_run(path) else local_folder(path)
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
        checkpoints.save(0, {"params": params}, {"imported_from": str(path)})
        require(checkpoints.wait(), f"{out} could not be written: {checkpoints.failed}")
        tokenizer.save(part / "tokenizer")
        write_json_atomic(part / "config.json", to_dict(replace(default, model=model, data=data)))
    return model
