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

SHORTEST = 80  # characters: shorter docstrings are labels, not prose
NOT_THE_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3"}


@cache
def python_docs() -> tuple[str, ...]:
    """Return the distinct texts."""
    from pydoc_data import topics

    texts = {text.strip() for text in topics.topics.values()}
    library, is_collecting = Path(sysconfig.get_paths()["stdlib"]), gc.isenabled()
    gc.disable()  # trees have no cycles: with JAX in memory, half the time would go into looking for some
    try:
        for path in library.rglob("*.py"):
            if not NOT_THE_LIBRARY & set(path.relative_to(library).parts):
                texts.update(_docstrings(path))
    finally:
        if is_collecting:
            gc.enable()
    ordered = sorted(text for text in texts if len(text) >= SHORTEST)
    random.Random(0).shuffle(ordered)
    return tuple(ordered)


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings(action="ignore"):  # about old escapes in code that is only read for its prose
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    nodes: list[ast.AST] = [tree]
    while nodes:  # through statements alone: expressions are most of a program, and hold no docstring
        node = nodes.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield (ast.get_docstring(node) or "").encode("utf-8", "ignore").decode()
        for name in ("body", "orelse", "finalbody", "handlers", "cases"):
            inner = getattr(node, name, ())
            nodes += inner if isinstance(inner, list) else ()
