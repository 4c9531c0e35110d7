"""Decide what a run starts from, and whether it may resume under changed settings.

Weights bring their architecture and tokenizer if the command line leaves these at the recipe's defaults. Settings
on the command line must fit the weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from smollm_jax.checkpoint.listing import VerifiedCheckpoint, verified_checkpoints
from smollm_jax.checkpoint.manager import CheckpointManager
from smollm_jax.config.architecture import MODELS, ModelConfig
from smollm_jax.config.fields import resume_rules
from smollm_jax.config.recipes import RECIPES
from smollm_jax.config.serialization import from_dict, to_dict
from smollm_jax.config.settings import Config
from smollm_jax.data.sources import mixture
from smollm_jax.distributed.sharding import layout_of
from smollm_jax.runs.load import (
    base_record,
    load_base,
    load_model,
    open_for_adapters,
    parent_of,
    place_of,
    progress_of,
    read_run,
)
from smollm_jax.runs.records import read_metrics
from smollm_jax.runtime.devices import training_dtype
from smollm_jax.runtime.errors import require, say
from smollm_jax.runtime.trees import flatten
from smollm_jax.tokenizer.load import load_tokenizer
from smollm_jax.tokenizer.tokenizer import Tokenizer
from smollm_jax.training.adapters import frozen_base
from smollm_jax.training.chat import follows_epochs
from smollm_jax.training.optimizer import learning_rate_schedule
from smollm_jax.training.origin import about_context, about_parent
from smollm_jax.training.run import Progress
from smollm_jax.training.step import State, abstract_state, init_state, trained_part

# fields of the architecture that no weight's shape depends on
FREE = {"max_seq_len", "initializer_range", "bos_token_id", "eos_token_id", "extra_eos_token_ids", "pad_token_id"}
SHOWN = 3  # changes in a line


@dataclass(frozen=True)
class StartState:
    """The start of a run: a checkpoint, weights, or neither. The start completes `config`."""

    config: Config
    checkpoint: VerifiedCheckpoint | None = None
    params: Any = None  # f32 weights, and the tokenizer that they were trained with
    tokenizer: Tokenizer | None = None
    base: dict[str, Any] | None = None  # place and hash of `params` if adapters go over them
    notes: list[str] = field(default_factory=list)


def resolve_start(config: Config, run_dir: Path, checkpoints: CheckpointManager) -> StartState:
    """Find what the run starts from, the first that exists of:

    1. the newest good checkpoint in the run folder,
    2. weights imported into the run folder,
    3. the weights of --init-from,
    4. fresh weights.

    Raises `UserError` if the run cannot resume under `config`, or if its checkpoint is lost or damaged. Raises
    `UserError` too if the weights have another architecture.
    """
    found, source = next(verified_checkpoints(checkpoints.folder, rename=True), None), config.run.init_from
    is_default = source == RECIPES[config.recipe].run.init_from
    if found is not None and "progress" in found.meta:
        start = with_base(_resumed(config, found))
        start.notes.extend(about_parent(run_dir))
        return start
    refuse_to_start_over(config, run_dir, checkpoints.folder, found)
    if found is not None and is_default:  # an import is a checkpoint without progress
        source = str(run_dir)
    if source is None:
        return StartState(config)
    if config.adapter.is_on:
        own = Path(source).resolve() == run_dir.resolve()
        require(not own, f"adapters need their base in a place of its own; give --run-dir other than {run_dir}")
        model, params, tokenizer, base = open_for_adapters(source)
    else:
        (model, params, tokenizer), base = load_model(source), None
    config = completed(replace(config, run=replace(config.run, init_from=source)), model, source)
    notes = about_context(model, config)
    return StartState(config, params=params, tokenizer=tokenizer, base=base, notes=notes)


def with_base(start: StartState) -> StartState:
    """Return the start of a resumed run with the base of its adapters. Raises `UserError` if it has changed."""
    if not start.config.adapter.is_on:
        return start
    assert start.checkpoint is not None
    given, before = start.config.run.init_from, start.checkpoint.meta["config"]["run"].get("init_from")
    base = base_record(start.checkpoint, given)
    if given is not None and given != before:
        base |= place_of(given)
    return replace(start, base=base, params=load_base(base, start.config.model))


def state_at_start(start: StartState, config: Config, mesh: Mesh, checkpoints: CheckpointManager) -> State:
    """Return the state before the first step of this process: fresh, or the checkpoint's over the same base."""
    if start.checkpoint is None:
        return init_state(config, mesh, start.params)
    shapes = abstract_state(config, mesh)
    restored: State = checkpoints.restore(start.checkpoint.step, trained_part(shapes))
    if start.base is not None:
        base = frozen_base(start.params, training_dtype(config.compute.dtype, mesh.devices.flat[0]))
        restored["base"] = jax.jit(lambda same: same, out_shardings=layout_of(shapes["base"]))(base)
    return restored


def refuse_to_start_over(config: Config, run_dir: Path, folder: Path, imported: VerifiedCheckpoint | None) -> None:
    """Raise `UserError` if the run has trained and its checkpoints are gone. A start would cut its records."""
    hint = "see python -m smollm_jax checkpoints, or start afresh with --new-run"
    none = "no good checkpoint after the import" if imported else "no good checkpoint"
    damaged = ", ".join(sorted({path.name for path in folder.glob("[0-9]*")} - {str(imported and imported.step)}))
    require(not damaged, f"{folder} holds {none}, only {damaged}; {hint}")
    gone = f"{run_dir} is a branch, and its checkpoints are gone; bring them back, or anneal anew with --new-run"
    require(parent_of(run_dir) is None, gone)
    trained = max((line["step"] - (line.get("bad_steps") or 0) for line in read_metrics(run_dir)), default=0)
    before = read_run(run_dir) if trained and (run_dir / "config.json").exists() else config
    # the first save ends before the second begins. A run killed earlier has nothing to continue from
    lost = 0 < 2 * before.run.checkpoint_every < trained or (trained and (run_dir / "export").exists())
    none = f"{trained:,} steps are trained, but {folder} holds {none}"
    require(not lost, f"{none}; bring it back, or start afresh with --new-run")


def _resumed(config: Config, found: VerifiedCheckpoint) -> StartState:
    progress, known = progress_of(found)[0], vars(Progress()) | {"cursor": {}}
    is_whole = all(x in known and type(progress[x]) is type(known[x]) for x in progress)
    is_whole = is_whole and all(isinstance(found.meta.get(name, {}), dict) for name in ("config", "computed"))
    lacks = f"checkpoint {found.step} is damaged: its meta.json lacks settings or progress of a run"
    require(is_whole and "config" in found.meta, lacks)
    saved = from_dict(found.meta["config"])
    if vocabulary_follows(config):
        config = replace(config, model=replace(config.model, vocab_size=saved.model.vocab_size))
    began = saved.run.scale_residual_init  # older runs have no such setting: False, whatever the recipe says now
    config = replace(config, run=replace(config.run, scale_residual_init=began))
    if saved.run.init_from is not None:
        source = config.run.init_from or saved.run.init_from
        config = replace(config, run=replace(config.run, init_from=source))
        config = completed(config, saved.model, saved.data.tokenizer)
    if follows_epochs(config):  # as counted at the start
        config = replace(config, run=replace(config.run, steps=saved.own_steps))
    notes, old, name = [], found.meta["config"], config.data.tokenizer
    if name != saved.data.tokenizer and _is_tokenizer(name, found.meta.get("cursor")):
        notes.append(f"data.tokenizer changed from {saved.data.tokenizer} to {name}: the same tokenizer")
        old = to_dict(replace(saved, data=replace(saved.data, tokenizer=name)))
    return StartState(config, checkpoint=found, notes=notes + check_settings(old, config, found.step))


def _is_tokenizer(name: str, cursor: Any) -> bool:
    """Return whether the folder `name` holds the tokenizer of a cursor."""
    if not Path(name).is_dir() or not isinstance(cursor, dict):
        return False
    tokenizer, before = load_tokenizer(name), str(cursor.get("tokenizer"))
    tokenizer.encode_as_of(before)
    return tokenizer.fingerprint.startswith(before)


def vocabulary_follows(config: Config) -> bool:
    """Return whether the vocabulary follows the tokenizer. True if not the recipe's and no size is given."""
    default = RECIPES[config.recipe].data.tokenizer
    return config.data.tokenizer != default and config.model.vocab_size == MODELS[config.preset].vocab_size


def completed(config: Config, model: ModelConfig, tokenizer: str) -> Config:
    """Return `config` with the architecture and tokenizer of the weights, unless settings name their own."""
    default, ours = RECIPES[config.recipe], {name: getattr(config.model, name) for name in config.run.own_context}
    if config.data.tokenizer == default.data.tokenizer:
        config = replace(config, data=replace(config.data, tokenizer=tokenizer))
    if config.model == replace(default.model, **ours):
        model = replace(model, **ours)
        length, longest = config.data.seq_len, model.max_seq_len
        if longest < length == default.data.seq_len:
            say(
                f"rows        have {longest:,} tokens, all that the weights can read; the recipe's have {length:,}"
            )
            length = longest
        return replace(config, model=model, data=replace(config.data, seq_len=length))
    for name, theirs in vars(model).items():
        asked = getattr(config.model, name)
        require(
            name in FREE or name in ours or asked == theirs,
            f"the weights have {name}={theirs}, this run asks for {asked}; "
            f"leave --preset and the model's flags out, or give --{name.replace('_', '-')} {theirs}",
        )
    return config


def check_settings(old: dict[str, Any], config: Config, step: int) -> list[str]:
    """Return notes on harmless changes since `old`, the config.json of a run at `step`.

    Raises `UserError` naming every change that would change the result.
    """
    # a setting that is newer than the run had its default there
    before, now = flatten(to_dict(Config()), ".") | flatten(old, "."), flatten(to_dict(config), ".")
    changed = {name: rule for name, rule in resume_rules(config).items() if before.get(name) != now[name]}
    places = ("data.data", "data.eval_data")
    moved = [name for name in places if name in changed and _is_place(before.get(name), now[name])]
    refused, maths, schedule = (
        [n for n in changed if changed[n] == rule] for rule in ("", "same maths", "schedule")
    )
    notes = [
        f"{name} changed from {before.get(name)} to {now[name]}: same maths, the last bits may differ"
        for name in maths
    ]
    past = f"the run is at step {step}, past --steps {config.total_steps}; ask for more, or use --new-run"
    require(config.total_steps >= step, past)
    if schedule and _updates(from_dict(old), step) == _updates(config, step):
        notes.append(f"{', '.join(schedule)} changed: all {step} updates so far stay as they were")
    else:
        start = from_dict(old).decay_start
        require(
            "run.extend" not in schedule or start is None or step <= start,
            f"--extend {config.run.extend}: the decay began after step {start}, and the run is at step {step}; "
            f"smollm anneal RUN --from {start} --steps N decays from there in N steps",
        )
        refused += schedule
    if config.adapter.is_on and "run.init_from" in refused:  # the hash of the weights decides
        refused.remove("run.init_from")
    if set(refused) <= set(moved):
        refused = []
        notes += [f"{x} changed from {before[x]} to {now[x]}: goes on if the files are the same" for x in moved]
    changes = "; ".join(f"{name} was {before.get(name)}, is {now[name]}" for name in refused[:SHOWN])
    changes += f" and {len(refused) - SHOWN} more" if len(refused) > SHOWN else ""
    require(
        not refused,
        f"this would change the result of the run at step {step}: {changes}. Go on with its own settings by "
        "--resume RUN, start anew from its weights by --init-from RUN and another --run-dir, or use --new-run",
    )
    return notes


def _is_place(before: str | None, now: str | None) -> bool:
    """Return whether two mixtures differ in places only, whose content the loader compares."""
    if before is None or now is None:
        return False
    places, weights = zip(*mixture(now), strict=True)
    return list(weights) in ([weight for _, weight in mixture(before)], _weights_of(before, places))


def _weights_of(before: str, places: Sequence[str]) -> list[float]:
    """Return the weights of a mixture of places that may be gone. Empty if it has not the form of `places`.

    A comma or an equals sign of a name that is gone looks like one of the mixture. So each name is taken to have
    as many of them as its new place.
    """
    pieces, weights = before.split(","), []
    if len(pieces) != sum(place.count(",") + 1 for place in places):
        return []
    for place in places:
        count = place.count(",") + 1
        part, pieces = ",".join(pieces[:count]), pieces[count:]
        try:
            weights.append(float(part.rpartition("=")[2]) if part.count("=") > place.count("=") else 1.0)
        except ValueError:
            return []
    return [weight / sum(weights) for weight in weights]


def _updates(config: Config, step: int) -> list[tuple[float, int]]:
    """Return the learning rate and the batch size of every update up to `step`."""
    rates = np.asarray(jax.vmap(learning_rate_schedule(config))(jnp.arange(step)))
    return [(float(rate), config.batch_size_at(i)) for i, rate in enumerate(rates, 1)]
