"""Convert a `Config` to the JSON of config.json and of every checkpoint, and back."""

import dataclasses
import types
import typing
from typing import Any, Literal

from smollm_jax.config.settings import Config
from smollm_jax.runtime.errors import require


def to_dict(config: Config) -> dict[str, Any]:
    """Return every setting as plain JSON values, defaults that depend on others filled in."""
    values = dataclasses.asdict(config)
    values["run"] |= {
        "run_dir": config.run_dir,
        "steps": config.total_steps,
        "batch_size": config.main_batch_size,
        "phases": ",".join(f"{phase.steps}x{phase.batch_size}" for phase in config.phases),
        "sample_prompts": list(config.run.sample_prompts),
    }
    values["model"]["extra_eos_token_ids"] = list(config.model.extra_eos_token_ids)
    values["optimizer"] |= {"warmup_steps": config.warmup_steps, "decay_steps": config.decay_steps}
    return values


def from_dict(values: Any) -> Config:
    """Return the `Config` whose `to_dict` is `values`; raises `UserError` naming an unknown or unusable field."""
    require(isinstance(values, dict), f"config.json must hold an object, {type(values).__name__} came")
    run, optimizer, compute = (values.get(group) for group in ("run", "optimizer", "compute"))
    if isinstance(run, dict) and "phases" in run:  # as they ran: as a request, batch_size would shrink larger ones
        values = values | {"run": {k: v for k, v in run.items() if k != "batch_size"}}
    if isinstance(optimizer, dict) and optimizer.get("schedule") != "wsd":
        values = values | {"optimizer": {k: v for k, v in optimizer.items() if k != "decay_steps"}}
    if isinstance(compute, dict) and compute.get("attention") == "cudnn":  # a kernel of earlier versions
        values = values | {"compute": compute | {"attention": "auto"}}
    return _built(Config, values, "config.json")


def _built(kind: type, values: Any, where: str) -> Any:
    """Return the dataclass `kind` made from `values`; missing fields have their defaults."""
    require(isinstance(values, dict), f"{where} must be an object, {values!r} came")
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - {item.name for item in dataclasses.fields(kind)})
    require(not unknown, f"{where} has unknown fields: {', '.join(map(repr, unknown))}")
    return kind(**{name: _value(hints[name], value, f"{where}: {name}") for name, value in values.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    """Return `value` if it has the type `hint`."""
    if dataclasses.is_dataclass(hint):
        return _built(typing.cast(type, hint), value, where)
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
