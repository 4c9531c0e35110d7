"""Read English prose that every CPython carries: the language reference and the standard library's docstrings.

About 2 MB, each text once, in an order fixed by a seed. The text is the same on one release of Python.
"""

import ast
import gc
import random
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

SHORTEST = 80  # characters: shorter docstrings are labels, not prose
NOT_THE_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3"}


class Documented(NamedTuple):
    """A docstring of the standard library. `name` names a class or function of its `module`, or is empty."""

    module: str
    name: str
    node: ast.AST
    parent: ast.AST  # the module, class or function around it
    text: str


@cache
def python_docs() -> tuple[str, ...]:
    """Return the distinct texts."""
    from pydoc_data import topics

    texts = {text.strip() for text in topics.topics.values()}
    texts.update(found.text for found in documented())
    ordered = sorted(text for text in texts if len(text) >= SHORTEST)
    random.Random(0).shuffle(ordered)
    return tuple(ordered)


def documented() -> Iterator[Documented]:
    """Yield what has a docstring in the standard library, in no fixed order."""
    library, is_collecting = Path(sysconfig.get_paths()["stdlib"]), gc.isenabled()
    gc.disable()  # trees have no cycles: with JAX in memory, half the time would go into looking for some
    try:
        for path in library.rglob("*.py"):
            parts = path.relative_to(library).with_suffix("").parts
            if not NOT_THE_LIBRARY & set(parts):
                yield from _docstrings(path, ".".join(part for part in parts if part != "__init__"))
    finally:
        if is_collecting:
            gc.enable()


def _docstrings(path: Path, module: str) -> Iterator[Documented]:
    try:
        with warnings.catch_warnings(action="ignore"):  # about old escapes in code that is only read for its prose
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    nodes: list[tuple[str, ast.AST, ast.AST]] = [("", tree, tree)]
    while nodes:  # through statements alone: expressions are most of a program, and hold no docstring
        name, node, parent = nodes.pop()
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{name}.{node.name}".lstrip(".")
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = (ast.get_docstring(node) or "").encode("utf-8", "ignore").decode()
            if text:
                yield Documented(module, name, node, parent, text)
            parent = node
        for field in ("body", "orelse", "finalbody", "handlers", "cases"):
            inner = getattr(node, field, ())
            nodes += [(name, child, parent) for child in inner] if isinstance(inner, list) else []
