"""Medians and ranges, and the tables and the line of JSON that every benchmark prints at its end."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from smollm_jax.cli.arguments import parse_command
from smollm_jax.runtime.errors import run_main

Row = dict[str, Any]
ROOT = Path(__file__).parents[2]


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def gib(size: int | None) -> float | None:
    return None if size is None else size / 2**30


def resident(figure: str = "VmRSS") -> int | None:
    """Return the bytes that this process holds, or held at most (VmHWM); None without /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(figure)), None)


def machine() -> dict[str, Any]:
    """Describe the machine, the packages and the date."""
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
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "packages": packages,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def finish(title: str, rows: list[Row], *, summary: list[Row] | None = None, **settings: Any) -> None:
    """Print tables to stderr and everything as one line of JSON to stdout."""
    show(title, rows)
    if summary:
        show("", summary)
    found = {"benchmark": title, "settings": settings, "machine": machine(), "rows": rows, "summary": summary}
    print(json.dumps(found))


def show(title: str, rows: list[Row]) -> None:
    """Print a table to stderr, without empty columns."""
    names = list(dict.fromkeys(name for row in rows for name, value in row.items() if value is not None))
    cells = [names, *([_cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    print(title, file=sys.stderr)
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)), file=sys.stderr)


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

    sys.exit(run_main(main))
