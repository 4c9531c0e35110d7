"""Decide what a run starts from, and whether it may resume under changed settings.

Weights bring their architecture and tokenizer along if the command line leaves these at the recipe's defaults;
settings it names must fit the weights. A resume is refused if a changed setting would change the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smollm_jax.checkpoint.listing import VerifiedCheckpoint
from smollm_jax.checkpoint.manager import CheckpointManager
from smollm_jax.config.architecture import ModelConfig
from smollm_jax.config.fields import resume_rules
from smollm_jax.config.recipes import RECIPES
from smollm_jax.config.serialization import from_dict, to_dict
from smollm_jax.config.settings import Config
from smollm_jax.runs.load import load_model
from smollm_jax.runtime.errors import require
from smollm_jax.runtime.trees import flatten
from smollm_jax.tokenizer.tokenizer import Tokenizer
from smollm_jax.training.step import learning_rate_schedule

# fields of the architecture that no weight's shape depends on
FREE = {"max_seq_len", "initializer_range", "bos_token_id", "eos_token_id"}


@dataclass(frozen=True)
class StartState:
    """What a run starts from: a checkpoint, weights, or neither; `config` is completed by it."""

    config: Config
    checkpoint: VerifiedCheckpoint | None = None
    weights: tuple[Any, Tokenizer] | None = None
    """f32 parameters and the tokenizer they were trained with."""
    notes: list[str] = field(default_factory=list)


def resolve_start(config: Config, run_dir: Path, checkpoints: CheckpointManager) -> StartState:
    """Find what the run starts from; the first that exists of

    1. the newest good checkpoint in the run folder,
    2. weights imported into the run folder,
    3. the weights of --init-from,
    4. fresh weights.

    Raises `ValueError` if the run cannot resume under `config`, if all its checkpoints are damaged, or if the
    weights have another architecture.
    """
    found = checkpoints.latest_good(quarantine=True)
    if found is not None and "progress" in found.meta:
        return _resumed(config, found)
    damaged = sorted(path.name for path in checkpoints.folder.glob("[!.]*")) if found is None else []
    require(
        not damaged,
        f"{checkpoints.folder} holds no good checkpoint, only {', '.join(damaged)}; "
        "see python -m smollm_jax checkpoints, or start afresh with --new-run",
    )
    source = config.run.init_from
    if found is not None and source is None:  # an import is a checkpoint without progress
        source = str(run_dir)
    if source is None:
        return StartState(config)
    model, params, tokenizer = load_model(source)
    config = _completed(config, model, source)
    config = replace(config, run=replace(config.run, init_from=source))
    return StartState(config, weights=(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params), tokenizer))


def _resumed(config: Config, found: VerifiedCheckpoint) -> StartState:
    saved = from_dict(found.meta["config"])
    if saved.run.init_from is not None:
        if config.run.init_from is None:
            config = replace(config, run=replace(config.run, init_from=saved.run.init_from))
        config = _completed(config, saved.model, saved.data.tokenizer)

    def updates(of: Config) -> list[tuple[float, int]]:
        rates = np.asarray(jax.vmap(learning_rate_schedule(of))(jnp.arange(found.step)))
        return [(float(rate), of.batch_size_at(i + 1)) for i, rate in enumerate(rates)]

    notes = check_settings(found.meta["config"], config, found.step, updates)
    return StartState(config, checkpoint=found, notes=notes)


def _completed(config: Config, model: ModelConfig, tokenizer: str) -> Config:
    """`config` with the architecture and tokenizer of the weights if it leaves them at the defaults."""
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


def check_settings(
    old: dict[str, Any], config: Config, step: int, schedule_of: Callable[[Config], list[tuple[float, int]]]
) -> list[str]:
    """Return notes on harmless changes since `old`, a config.json; raises `UserError` naming any other change.

    `schedule_of(config)` gives the learning rate and batch size of every update up to `step`.
    """
    before, now = flatten(old, "."), flatten(to_dict(config), ".")
    changed: dict[str, list[str]] = {rule: [] for rule in ("free", "same maths", "schedule", "")}
    for name, rule in resume_rules(config).items():
        if before.get(name) != now[name]:
            changed[rule].append(name)
    notes = [
        f"{name} changed from {before.get(name)} to {now[name]}: same maths, the last bits may differ"
        for name in changed["same maths"]
    ]
    refused, of_schedule = changed[""], changed["schedule"]
    require(
        config.total_steps >= step,
        f"the run is at step {step}, past --steps {config.total_steps}; ask for more, or use --new-run",
    )
    if of_schedule:
        if schedule_of(from_dict(old)) == schedule_of(config):
            notes.append(f"{', '.join(of_schedule)} changed: all {step} updates so far stay as they were")
        else:
            refused += of_schedule
    changes = "; ".join(f"{name} was {before.get(name)}, is {now[name]}" for name in refused)
    require(
        not refused,
        f"this would change the result of the run at step {step}: {changes}. "
        "Give the old values back, or start afresh with --new-run or another --run-dir",
    )
    return notes
