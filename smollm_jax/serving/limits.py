"""The limits of a request: lengths, ranges of its numbers, stop strings. Every route checks them here."""

import secrets
from typing import Any

from smollm_jax.generation.sampling import Sampling
from smollm_jax.runtime.errors import require

LONGEST_PROMPT = 100_000  # characters. A context of 8,192 tokens holds about 35,000 characters of English
MOST_STOPS, LONGEST_STOP = 4, 100
# the ranges of a request, because `Sampling` itself allows more
RANGES = {
    "temperature": (0.0, 2.0),
    "top_p": (0.01, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.5, 2.0),
    "top_k": (0, 1_000),
    "seed": (0, 2**32 - 1),
    "min_new_tokens": (0, 1),
}
WHOLE = ("top_k", "seed", "max_new_tokens", "min_new_tokens")


class QueueFull(Exception):
    """The error of a full queue. A client can try again later."""


def checked_sampling(numbers: dict[str, Any], max_new_tokens: int) -> Sampling:
    """Check the numbers of a request. Draws `seed` if it is None. Raises `UserError` naming the number."""
    if numbers.get("seed") is None:
        numbers["seed"] = secrets.randbelow(2**32)
    for name, value in numbers.items():
        kind, kinds = ("whole number", int) if name in WHOLE else ("number", int | float)
        if kinds is int and isinstance(value, float) and value.is_integer():
            numbers[name] = value = int(value)  # noqa: PLW2901 - JavaScript has one type of number
        low, high = RANGES.get(name, (1, max_new_tokens))
        is_number = isinstance(value, kinds) and not isinstance(value, bool)
        good = is_number and low <= value <= high  # false for NaN and infinity
        require(good, f"{name}={_shown(value)} must be a {kind} from {low:,} to {high:,}")
    return Sampling(**numbers)


def checked_stops(stop: Any) -> tuple[str, ...]:
    """Check the stop strings. Raises `UserError` for a wrong type, number or length."""
    strings = (stop,) if isinstance(stop, str) else () if stop is None else stop
    good = isinstance(strings, list | tuple) and len(strings) <= MOST_STOPS
    good = good and all(isinstance(one, str) and 0 < len(one) <= LONGEST_STOP for one in strings)
    require(good, f"stop takes up to {MOST_STOPS} strings of 1 to {LONGEST_STOP} characters")
    return tuple(strings)


def check_length(text: str, subject: str) -> None:
    """Raise `UserError` for a text above `LONGEST_PROMPT`."""
    require(len(text) <= LONGEST_PROMPT, f"{subject} {len(text):,} characters; the most is {LONGEST_PROMPT:,}")


def _shown(value: Any) -> str:
    """Shorten a value of any size for a message of one line."""
    if isinstance(value, int) and value.bit_length() > 10_000:  # Python refuses to print such an int
        return "a number of thousands of digits"
    return text if len(text := repr(value)) <= 40 else f"{text[:40]}…"
