"""Turn nested dicts into flat dicts whose names are paths, and back."""

from functools import reduce
from typing import Any


def flatten(tree: dict[str, Any], sep: str) -> dict[str, Any]:
    """Return the leaves of nested dicts by path. `{"a": {"b": 1}}` becomes `{"a/b": 1}` for "/" as `sep`."""
    named: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            named |= {f"{name}{sep}{path}": leaf for path, leaf in flatten(value, sep).items()}
        else:
            named[name] = value
    return named


def unflatten(named: dict[str, Any], sep: str) -> dict[str, Any]:
    """Return the nested dicts that `flatten` turns into `named`."""
    tree: dict[str, Any] = {}
    for path, leaf in named.items():
        *parents, name = path.split(sep)
        reduce(lambda branch, parent: branch.setdefault(parent, {}), parents, tree)[name] = leaf
    return tree
