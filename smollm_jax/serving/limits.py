"""The limits of a request: lengths, ranges of its numbers, stop strings. Every route checks them here."""

import secrets
from typing import Any

from smollm_jax.generation.sampling import ALTERNATIVES, MOST_BIASED, Sampling
from smollm_jax.runtime.errors import require

LONGEST_PROMPT = 100_000  # characters. A context of 8,192 tokens holds about 35,000 characters of English
MOST_STOPS, LONGEST_STOP = 16, 100
MOST_CHOICES = 128  # texts of a request: prompts times n
MOST_PROMPT_TOKENS = 65_536  # of a request's prompts in sum
MOST_NEW = 16  # times the most new tokens of a text: the most of all texts of a request
MOST_BIAS = 100.0
# the ranges of a request, because `Sampling` itself allows more
RANGES = {
    "temperature": (0.0, 2.0),
    "top_p": (0.01, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.5, 2.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
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


def checked_bias(given: Any, vocab_size: int) -> tuple[tuple[int, float], ...]:
    """Check logit_bias, a dict from ids as texts to numbers. Raises `UserError`."""
    bias = {} if given in (None, []) else given
    require(isinstance(bias, dict), "logit_bias takes an object of token ids and numbers")
    require(len(bias) <= MOST_BIASED, f"logit_bias has {len(bias):,} ids; the most is {MOST_BIASED}")
    for token, value in bias.items():
        is_id = token.isdecimal() and len(token) < 10 and int(token) < vocab_size
        require(is_id, f"logit_bias: {_shown(token)} is no token id, 0 to {vocab_size - 1:,}")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        good = is_number and -MOST_BIAS <= value <= MOST_BIAS
        require(good, f"logit_bias: {_shown(value)} must be a number from {-MOST_BIAS:g} to {MOST_BIAS:g}")
    return tuple((int(token), float(value)) for token, value in bias.items())


def checked_top(given: Any, name: str) -> int | None:
    """Check how many likeliest tokens a client wants beside each token. None for none and no scores."""
    if given is None or given is False:
        return None
    good = isinstance(given, int) and not isinstance(given, bool) and 0 <= given <= ALTERNATIVES
    require(good, f"{name}={_shown(given)} must be a whole number from 0 to {ALTERNATIVES}")
    return int(given)


def checked_choices(given: Any, prompts: int) -> int:
    """Check n, the texts per prompt. Raises `UserError` for too many in sum."""
    good = isinstance(given, int) and not isinstance(given, bool) and given > 0
    require(good, f"n={_shown(given)} must be a whole number of at least 1")
    much = f"{prompts:,} prompts and n={_shown(given)} make too many texts; the most is {MOST_CHOICES}"
    require(prompts * given <= MOST_CHOICES, much)
    return int(given)


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
