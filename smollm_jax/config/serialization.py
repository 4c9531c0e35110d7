"""Convert a `Config` to the JSON of config.json and of every checkpoint, and back."""

import dataclasses
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal

from smollm_jax.config.settings import Config
from smollm_jax.runtime.errors import UserError, one_line, require
from smollm_jax.runtime.files import read_json

EXPONENT = re.compile(r"[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+")


def to_dict(config: Config) -> dict[str, Any]:
    """Return every setting as plain JSON values, defaults that depend on others filled in."""
    values = dataclasses.asdict(config)
    values["run"] |= {
        "run_dir": config.run_dir,
        "steps": config.own_steps,
        "batch_size": config.main_batch_size,
        "phases": ",".join(f"{phase.steps}x{phase.batch_size}" for phase in config.own_phases),
        "sample_prompts": list(config.run.sample_prompts),
        "own_context": list(config.run.own_context),
    }
    values["model"]["extra_eos_token_ids"] = list(config.model.extra_eos_token_ids)
    for name in ("learning_rate", "warmup_steps", "decay_steps"):
        values["optimizer"][name] = getattr(config, name)
    return values


def read_file(path: Path) -> dict[str, Any]:
    """Return the settings of a YAML or JSON file as plain values. Raises `UserError`."""
    if path.suffix not in (".yaml", ".yml"):
        return _an_object(read_json(path), str(path))
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML 1.1 with the floats of YAML 1.2: there 6e-4 is a number."""

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+0123456789"))
    try:
        return _an_object(yaml.load(path.read_text("utf-8"), Loader) or {}, str(path))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None


def from_dict(values: Any, default: Config | None = None, *, where: str = "config.json") -> Config:
    """Return the `Config` whose `to_dict` is `values`. Missing fields come from `default`.

    Raises `UserError` naming an unknown or unusable field of the file `where`.
    """
    values = _an_object(values, where)
    run, optimizer, compute = (values.get(group) for group in ("run", "optimizer", "compute"))
    if isinstance(run, dict) and "phases" in run:  # as they ran: as a request, batch_size would shrink larger ones
        values = values | {"run": {k: v for k, v in run.items() if k != "batch_size"}}
    if isinstance(optimizer, dict) and optimizer.get("schedule", "wsd") != "wsd":
        values = values | {"optimizer": {k: v for k, v in optimizer.items() if k != "decay_steps"}}
    if isinstance(compute, dict) and compute.get("attention") == "cudnn":  # a kernel of earlier versions
        values = values | {"compute": compute | {"attention": "auto"}}
    return built(default or Config(), values, where)


def _an_object(values: Any, where: str) -> dict[str, Any]:
    require(isinstance(values, dict), f"{where} must hold an object, {type(values).__name__} came")
    return values


def built(default: Any, values: Any, where: str) -> Any:
    """Return the dataclass `default` with `values` in it; raises `UserError` naming the field of `where`."""
    require(isinstance(values, dict), f"{where} must be an object, {values!r} came")
    hints, known = typing.get_type_hints(type(default)), {item.name for item in dataclasses.fields(default)}
    unknown = sorted(map(str, set(values) - known))
    require(not unknown, f"{where} has unknown fields: {', '.join(map(repr, unknown))}")
    new = {
        name: built(getattr(default, name), value, f"{where}: {name}")
        if dataclasses.is_dataclass(hints[name])
        else _value(hints[name], value, f"{where}: {name}")
        for name, value in values.items()
    }
    return dataclasses.replace(default, **new)


def _value(hint: Any, value: Any, where: str) -> Any:
    """Return `value` if it has the type `hint`."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return None if value is None else _value(inner[0], value, where)
    if origin is tuple:
        require(isinstance(value, list | tuple), f"{where} must be a list, {value!r} came")
        return tuple(_value(inner[0], item, where) for item in value)
    if origin is Literal:
        require(value in inner, f"{where} must be one of {', '.join(inner)}, {value!r} came")
        return value
    fits = isinstance(value, int | float) if hint is float else isinstance(value, hint)
    require(fits and isinstance(value, bool) == (hint is bool), f"{where} must be {hint.__name__}, {value!r} came")
    return value
