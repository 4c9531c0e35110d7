"""Train from Python: the keywords are the flags of `smollm train`."""

import dataclasses
import numbers
import os
from difflib import get_close_matches
from typing import Any

from smollm_jax.api.process import as_found
from smollm_jax.api.run import Run
from smollm_jax.config.defaults import default_settings, with_own_context
from smollm_jax.config.serialization import built
from smollm_jax.config.settings import Config
from smollm_jax.runtime.errors import EXIT_FAILED, EXIT_STOPPED, require
from smollm_jax.runtime.signals import Interrupt

GROUPS = [field.name for field in dataclasses.fields(Config) if dataclasses.is_dataclass(field.default_factory)]


def train(
    recipe: str | None = None, steps: int | None = None, *, preset: str | None = None,
    config: str | os.PathLike[str] | None = None, resume: str | os.PathLike[str] | Run | None = None,
    **settings: Any,
) -> Run:  # fmt: skip
    """Train a model and return its run; the same call goes on with a run that has not ended.

    `settings` are the flags of `smollm train` with underscores, such as data="texts/*.jsonl", run_dir="runs/mine".
    `config` is a file of settings, `resume` a run. An interrupt saves, and the run says that it was `stopped`.
    Signal handlers, logging and JAX's settings are afterwards as before. Raises `UserError` for a mistake.
    """
    if steps is not None:
        settings["steps"] = steps
    with as_found(cached=False):
        file, run = (None if path is None else os.fspath(path) for path in (config, resume))
        default = default_settings(recipe=recipe, preset=preset, file=file, resume=run)
        chosen = settings_of(default, settings)
        code = _fit(chosen)
    failed = f"training failed, as its last line says; what was saved is in {chosen.run_dir}"
    if code == EXIT_FAILED:
        raise RuntimeError(failed)
    return Run(chosen.run_dir, stopped=code == EXIT_STOPPED)


def settings_of(default: Config, settings: dict[str, Any]) -> Config:
    """Return `default` with `settings`, whose names are fields of any group; raises `UserError`."""
    group_of = {field.name: group for group in GROUPS for field in dataclasses.fields(getattr(default, group))}
    values: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        close = get_close_matches(name, group_of, 1)
        hint = f"; did you mean {close[0]}?" if close else "; its keywords are the flags of smollm train"
        require(name in group_of, f"train has no setting {name!r}{hint}")
        values.setdefault(group_of[name], {})[name] = _plain(value)
    job = sorted({"coordinator", "num_processes", "process_id"} & settings.keys())
    require(not job, f"{', '.join(job)}: a job of several processes is started by smollm train")
    return with_own_context(built(default, values, "train"), settings)


def _plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return int(value) if is_whole else value  # numpy has numbers of its own


def _fit(config: Config) -> int:
    import jax

    from smollm_jax.distributed.processes import Processes
    from smollm_jax.training.fit import fit

    wide = "JAX computes with 64 bits here (jax_enable_x64), which would change the results; switch it off"
    require(not jax.config.read("jax_enable_x64"), wide)
    with Interrupt() as stop:
        return fit(config, stop, Processes())
