"""Metadata of a setting: the range of its values, and whether a resumed run may change it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from smollm_jax.runtime.errors import require

AT_LEAST_1 = {"range": ("must be at least 1", lambda x: x >= 1)}
AT_LEAST_0 = {"range": ("must be 0 or more", lambda x: x >= 0)}
DEFAULT_OR_MORE = {"range": ("must be at least 1, or 0 for the default", lambda x: x >= 0)}
ABOVE_0 = {"range": ("must be above 0", lambda x: x > 0)}
FRACTION = {"range": ("must lie in [0, 1)", lambda x: 0 <= x < 1)}

# a change of any other setting would change the result of a run
FREE = {"resume": "free"}  # never changes the result, or belongs to the tokenizer that the run keeps
SAME_MATHS = {"resume": "same maths"}  # changes the last bits at most
SCHEDULE = {"resume": "schedule"}  # changes nothing if every update so far would be the same


def check_fields(settings: Any) -> None:
    """Raise `UserError` naming a field that is NaN, infinite or out of its range; None is always allowed."""
    for item in dataclasses.fields(settings):
        value = getattr(settings, item.name)
        finite = not isinstance(value, float) or math.isfinite(value)
        require(finite, f"{item.name}={value} must be a finite number")
        if value is not None and "range" in item.metadata:
            words, contains = item.metadata["range"]
            require(contains(value), f"{item.name}={value} {words}")


def resume_rules(settings: Any, prefix: str = "") -> dict[str, str]:
    """Return "free", "same maths", "schedule" or "" of every setting, by names such as "run.seed"."""
    rules: dict[str, str] = {}
    for item in dataclasses.fields(settings):
        value, name = getattr(settings, item.name), prefix + item.name
        if dataclasses.is_dataclass(value):
            rules |= resume_rules(value, f"{name}.")
        else:
            rules[name] = item.metadata.get("resume", "")
    return rules
