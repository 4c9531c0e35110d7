"""A run as a Hugging Face folder: the weights of a checkpoint, the run's tokenizer, a card from its records.

The end of a run and `python -m smollm_jax export` both come here, so that they cannot differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from smollm_jax.checkpoint import read_params
from smollm_jax.convert import export
from smollm_jax.loading import read_run
from smollm_jax.report import plot, read_metrics


@dataclass(frozen=True)
class Published:
    folder: Path
    step: int
    checked: str
    """How the folder was compared with the run."""


def publish(
    run_dir: str | Path, out: str | Path, *, step: int | None = None, dtype: str = "float32", verify: bool = True
) -> Published:
    """Export checkpoint `step` (the newest good one without it) of a run to the folder `out`.

    Raises `ValueError` when `run_dir` is no run or `out` holds something else, `RuntimeError` when what was
    written does not agree with the checkpoint; nothing is left behind then.
    """
    run_dir = Path(run_dir)
    config = read_run(run_dir)
    found, params = read_params(run_dir / "checkpoints", step)
    evaluations = [x for x in read_metrics(run_dir) if "eval_loss" in x and x["step"] <= found.step]
    held_out = evaluations[-1] if evaluations else {}
    facts = {
        "recipe": config.recipe,
        "data": config.data.data,
        "steps": found.step,
        "tokens": found.meta.get("progress", {}).get("tokens"),
        "held_out_loss": held_out.get("eval_loss"),
        "bits_per_byte": held_out.get("eval_bits_per_byte"),
        "curve": plot(run_dir),
    }
    tokenizer = run_dir / "tokenizer"
    checked = export(
        params, config.model, out, dtype=dtype, tokenizer_folder=tokenizer, card_facts=facts, verify=verify
    )
    return Published(Path(out), found.step, checked)
