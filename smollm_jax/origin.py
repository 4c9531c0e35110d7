"""What a run starts from: its own newest good checkpoint, the weights of another model, or nothing.

Weights bring their architecture and tokenizer along wherever the command line leaves these at the recipe's
defaults; where it names them, they have to fit. A resume is refused when a setting that would change the
result is not what it was.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smollm_jax.checkpoint import Checkpoints
from smollm_jax.config import RECIPES, Config, ModelConfig, require
from smollm_jax.config_file import from_dict
from smollm_jax.inventory import Found
from smollm_jax.loading import load_for_inference
from smollm_jax.resume import check_settings
from smollm_jax.step import learning_rate_schedule
from smollm_jax.tokenizer import Tokenizer

# of no weight: they may be longer, or follow from the tokenizer
FREE = {"max_seq_len", "initializer_range", "bos_token_id", "eos_token_id"}


@dataclass(frozen=True)
class Origin:
    """`config` is what was asked for, completed by what is started from; at most one of the two others is set."""

    config: Config
    checkpoint: Found | None = None
    weights: tuple[Any, Tokenizer] | None = None
    """f32 parameters and the tokenizer they were trained with."""
    notes: list[str] = field(default_factory=list)


def find_origin(config: Config, run_dir: Path, checkpoints: Checkpoints) -> Origin:
    """Look for a checkpoint, then for imported weights, then for --init-from.

    Raises `ValueError` when the run cannot go on under `config`, or the weights are not of its architecture.
    """
    found = checkpoints.latest_good(set_aside=True)
    if found is not None and "progress" in found.meta:
        return _resumed(config, found)
    left = [path.name for path in checkpoints.folder.glob("[!.]*")] if found is None else []
    require(
        not left,
        f"{checkpoints.folder} holds no good checkpoint, only {', '.join(sorted(left))}; "
        "see python -m smollm_jax checkpoints, or start afresh with --new-run",
    )
    source = config.run.init_from
    if found is not None and source is None:
        source = str(run_dir)
    if source is None:
        return Origin(config)
    model, params, tokenizer = load_for_inference(source)
    config = _completed(config, model, source)
    config = replace(config, run=replace(config.run, init_from=source))
    return Origin(config, weights=(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params), tokenizer))


def _resumed(config: Config, found: Found) -> Origin:
    saved = from_dict(found.meta["config"])
    if saved.run.init_from is not None:
        if config.run.init_from is None:
            config = replace(config, run=replace(config.run, init_from=saved.run.init_from))
        config = _completed(config, saved.model, saved.data.tokenizer)

    def updates(of: Config) -> list[tuple[float, int]]:
        rates = np.asarray(jax.vmap(learning_rate_schedule(of))(jnp.arange(found.step)))
        return [(float(rate), of.batch_size_at(i + 1)) for i, rate in enumerate(rates)]

    notes = check_settings(found.meta["config"], config, found.step, updates)
    return Origin(config, checkpoint=found, notes=notes)


def _completed(config: Config, model: ModelConfig, tokenizer: str) -> Config:
    """`config` with the architecture and the tokenizer of the weights where it leaves them open."""
    default = RECIPES[config.recipe]
    if config.data.tokenizer == default.data.tokenizer:
        config = replace(config, data=replace(config.data, tokenizer=tokenizer))
    if config.model == default.model:
        return replace(config, model=model)
    for name, theirs in vars(model).items():
        ours = getattr(config.model, name)
        require(
            name in FREE or ours == theirs,
            f"the weights have {name}={theirs}, this run asks for {ours}; "
            f"leave --preset and the model's flags out, or give --{name.replace('_', '-')} {theirs}",
        )
    return config
