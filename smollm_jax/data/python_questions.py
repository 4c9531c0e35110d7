"""Ask about the functions and classes of every CPython, and answer from their docstrings.

One conversation per public function or class, in an order fixed by a seed. The rejected answer of a pair is about
another function of the same class or module. The rows are the same on one release of Python.
"""

import ast
import random
import re
from collections import defaultdict
from functools import cache
from typing import Any, NamedTuple

from smollm_jax.data.python_docs import Documented, documented

SHORTEST, LONGEST = 20, 400  # characters of an answer
PURPOSES = ("What does {} do?", "What is {} for?", "Explain {}.", "Tell me about {}.")
CALLS = ("How do I call it?", "Which arguments does it take?", "What are its arguments?")
PLACES = ("Where is it defined?", "Where do I find it?")
METHODS = ("Which methods does it have?", "What are its methods?")
MOST_METHODS = 6
FEW_READERS = {"idlelib", "distutils", "ensurepip", "turtledemo"}
NOT_PROSE = re.compile(r"^(>>>|[-=+*#|]{3}|[@:]\w+)|\b(?:TODO|XXX)\b")


class Asked(NamedTuple):
    """A function or class: its full name, a group of similar ones, and questions with their answers."""

    name: str
    group: str
    purpose: tuple[str, str]
    more: tuple[tuple[str, str], ...]


@cache
def python_questions() -> tuple[dict[str, Any], ...]:
    """Return rows of `messages`: one to three questions, each with its answer."""
    return tuple(
        {
            "messages": [
                {"role": role, "content": content}
                for turn in (one.purpose, *one.more)
                for role, content in zip(("user", "assistant"), turn, strict=True)
            ]
        }
        for one in _all_asked()
    )


@cache
def python_preferences() -> tuple[dict[str, Any], ...]:
    """Return rows of the texts `prompt`, `chosen` and `rejected`. A rejected answer is another function's.

    Row i is about the function of row i of `python_questions`, so that both hold out the same functions.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for one in _all_asked():
        groups[one.group].append(one.purpose[1])
    rows = []
    for one in _all_asked():
        prompt, chosen = one.purpose
        others = [answer for answer in groups[one.group] if answer != chosen]
        others = others or [other.purpose[1] for other in _all_asked() if other.purpose[1] != chosen]
        rejected = random.Random(one.name).choice(others)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return tuple(rows)


@cache
def _all_asked() -> tuple[Asked, ...]:
    found = {}
    for one in documented():
        parts = [*one.module.split("."), *one.name.split(".")]
        answer = " ".join(one.text.partition("\n\n")[0].split())
        is_prose = answer[:1].isupper() and " " in answer and not NOT_PROSE.search(answer)
        is_public = not any(part.startswith("_") for part in parts) and parts[0] not in FEW_READERS
        is_public = is_public and isinstance(one.parent, ast.Module | ast.ClassDef)  # no function of a function
        if one.name and is_public and is_prose and SHORTEST <= len(answer) <= LONGEST:
            asked = _asked(one, answer if answer[-1] in ".!?" else f"{answer}.")
            found[asked.name] = asked
    ordered = [found[name] for name in sorted(found)]
    random.Random(0).shuffle(ordered)
    return tuple(ordered)


def _asked(found: Documented, answer: str) -> Asked:
    owner, _, name = found.name.rpartition(".")
    group, full = f"{found.module}.{owner}".strip("."), f"{found.module}.{found.name}"
    choose = random.Random(full)  # of this function alone: another release of Python keeps most rows
    node = found.node
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        marks = {ast.unparse(mark) for mark in node.decorator_list}
        is_bound, arguments = owner and "staticmethod" not in marks, ast.unparse(node.args)
        arguments = re.sub(r"^\w+(, |$)", "", arguments) if is_bound else arguments  # without self
        place = f"It is {'a method of' if owner else 'in the module'} `{group}`."
        called = f"It is read as `{name}`." if "property" in marks else f"Call it as `{name}({arguments})`."
        more = [(choose.choice(PLACES), place), (choose.choice(CALLS), called)]
    else:
        assert isinstance(node, ast.ClassDef)
        more = [(choose.choice(PLACES), f"It is in the {'class' if owner else 'module'} `{group}`.")]
        methods = [one.name for one in node.body if isinstance(one, ast.FunctionDef) and one.name[0] != "_"]
        told = ", ".join(f"`{method}`" for method in methods[:MOST_METHODS])
        more += [(choose.choice(METHODS), f"It has {told}.")] if methods else []
    purpose = choose.choice(PURPOSES).format(full), answer
    return Asked(full, group, purpose, tuple(choose.sample(more, choose.randint(0, len(more)))))
