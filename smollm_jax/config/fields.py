"""Define a field of a settings dataclass: default, range, and rule for a resumed run."""

import dataclasses
import math
from typing import Any, Literal

from smollm_jax.runtime.errors import require

RANGES = {
    "at least 1": lambda x: x >= 1,
    "0 or more": lambda x: x >= 0,
    "at least 1, or 0 for the default": lambda x: x >= 0,
    "above 0": lambda x: x > 0,
    "in [0, 1)": lambda x: 0 <= x < 1,
}
Rule = Literal["", "free", "same maths", "schedule"]


def setting(default: Any, within: str | None = None, *, resume: Rule = "") -> Any:
    """Return a dataclass field with a default and a range of `RANGES`. None is always allowed.

    `resume` is the rule for a change when a run resumes. A "free" change never affects the result, or the run's
    tokenizer decides it. A "same maths" change affects the last bits at most. A "schedule" change affects nothing
    if every update so far would be the same. Any other change is refused.
    """
    return dataclasses.field(default=default, metadata={"range": within, "resume": resume})


def check_fields(settings: Any) -> None:
    """Raise `UserError` naming a field that is NaN, infinite or out of its range."""
    for item in dataclasses.fields(settings):
        value, within = getattr(settings, item.name), item.metadata.get("range")
        finite = not isinstance(value, float) or math.isfinite(value)
        require(finite, f"{item.name}={value} must be a finite number")
        good = value is None or within is None or RANGES[within](value)
        require(good, f"{item.name}={value} must be {within}")


def resume_rules(settings: Any, prefix: str = "") -> dict[str, Rule]:
    """Return the rule of every setting for a resumed run, by names such as "run.seed"."""
    rules: dict[str, Rule] = {}
    for item in dataclasses.fields(settings):
        value, name = getattr(settings, item.name), prefix + item.name
        nested = dataclasses.is_dataclass(value)
        rules |= resume_rules(value, f"{name}.") if nested else {name: item.metadata.get("resume", "")}
    return rules
