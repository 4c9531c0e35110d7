"""Rounds in turn, their medians, and the table and JSON that each benchmark ends in."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from smollm_jax.arguments import guarded, parse_command


def in_turn(sides: dict[str, Callable[[], None]], *, rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each round of each side; every round runs all sides once, after `warmup` rounds not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(-warmup, rounds):
        for name, run in sides.items():
            began = time.perf_counter()
            run()
            if round_ >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    import jax

    packages = {}
    for name in ("jax", "torch", "transformers", "tokenizers", "llama-cpp-python"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "processor": _processor(),
        "python": platform.python_version(),
        "packages": packages,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def finish(title: str, rows: list[dict[str, Any]], **settings: Any) -> None:
    """A table to stderr, for a person; all of it as one line of JSON to stdout."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    print(title, file=sys.stderr)
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)), file=sys.stderr)
    print(json.dumps({"benchmark": title, "settings": settings, "machine": machine(), "rows": rows}))


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return f"{_cell(value['median'])} ({_cell(value['min'])} to {_cell(value['max'])})"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.4g}"
    return "" if value is None else str(value)


def as_command(benchmark: Callable[..., int], name: str) -> None:
    """Run `benchmark` with the arguments of the command line, and exit."""

    def main() -> int:
        return parse_command(benchmark, sys.argv[1:], f"python -m benchmarks.{name}")()

    sys.exit(guarded(main))
