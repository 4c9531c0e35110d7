"""Random changes of bytes, of JSON and of files, each with a description; all drawn from the case's own seed."""

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

RAW = {  # what json.dumps cannot write, by the string that stands for it
    "RAW deep lists": "[" * 50_000 + "]" * 50_000,
    "RAW deep objects": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "RAW 5,000 digits": "1" * 5_000,
    "RAW 400 digits": "9" * 400,
    "RAW 1e999": "1e999",
    "RAW lone surrogate": '"\\ud800"',
    "RAW no value": "",
}
ODD = (
    None, True, False, 0, 1, -1, 2, 7, 10**4, 2**31, -(2**31), 2**32, 2**53 + 1, 2**63, -(2**63), 2**64, 10**30,
    0.5, -0.5, 1e-320, 1e308, 1e30, float("nan"), float("inf"), float("-inf"), "", " ", "a", "0", "-1", "null",
    "\0", "\x1b[31m", "\u2028", "é" * 300, "🦀", "x" * 5_000, "../x", "/etc/passwd", "file:///etc/passwd",
    "{{ 1 }}", "a\nb", "[", "(?=(a+)+)b", "\ufffe", [], {}, [[]], [None], [{}], {"": 0}, {"a": {"a": 1}}, [1,
    "a", None], [0] * 300,
    *RAW,
)  # fmt: skip


def odd_value(rng: random.Random) -> Any:
    """Return a value of no field, the caller's own: a list may be changed further."""
    return deepcopy(rng.choice(ODD))


def change_bytes(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """Flip, cut, insert, repeat, drop or overwrite bytes."""
    size = len(content)
    at, length = rng.randrange(size + 1), rng.choice([1, 1, 2, 4, 8, 64, 1_000])
    kind = rng.choice(["bit", "bits", "cut", "insert", "repeat", "drop", "zeros", "overwrite", "append", "number"])
    garbage = bytes(rng.choice([0, 9, 10, 34, 92, 123, 255, rng.randrange(256)]) for _ in range(length))
    changed = bytearray(content)
    if kind in ("bit", "bits"):
        for _ in range(1 if kind == "bit" else rng.randint(2, 40)):
            if size:
                changed[rng.randrange(size)] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del changed[at:]
    elif kind == "insert":
        changed[at:at] = garbage
    elif kind == "repeat":
        changed[at:at] = content[at : at + length] * rng.choice([1, 2, 50])
    elif kind == "drop":
        del changed[at : at + length]
    elif kind == "append":
        changed += rng.choice([garbage, content[:length], b"\n\n", b"\0" * 100, b"PK\x03\x04"])
    elif kind == "number":
        digits = [i for i, byte in enumerate(content) if 48 <= byte <= 57]
        if digits:
            at = rng.choice(digits)
            changed[at : at + 1] = rng.choice([b"-1", b"0", b"99999999999999999999", b"1e9", b"", b"0.5"])
    else:
        changed[at : at + length] = (garbage if kind == "overwrite" else bytes(length))[: size - at]
    return bytes(changed), f"{kind} at {at}"


def as_json(value: Any) -> str:
    """Write JSON as sloppily as it can be read: NaN, lone surrogates, and the texts of `RAW`."""
    text = json.dumps(value, ensure_ascii=True)
    for name, raw in RAW.items():
        text = text.replace(f'"{name}"', raw)
    return text


def change_value(rng: random.Random, value: Any) -> tuple[Any, str]:
    """Replace, drop, rename, repeat or wrap one value somewhere inside `value`."""
    holder, key = {"": value}, ""
    place, at = holder, key
    path, deeper = [], rng.choice([0.5, 0.85])
    while isinstance(place[at], dict | list) and place[at] and rng.random() < deeper:
        place = place[at]
        at = rng.choice(list(place) if isinstance(place, dict) else range(min(len(place), 2_000)))
        path.append(str(at)[:30])
    old, kind = place[at], rng.choice(["odd"] * 6 + ["near"] * 3 + ["drop", "rename", "wrap", "repeat", "swap"])
    if kind == "near":
        place[at] = near(rng, old)
    elif kind == "drop" and path:
        del place[at]
    elif kind == "rename" and isinstance(place, dict) and path:
        place[rng.choice(["", "a", f"{at} ", str(at).upper(), "x" * 300])] = place.pop(at)
    elif kind == "wrap":
        place[at] = rng.choice([[old], {"a": old}, [old, old], {at if isinstance(at, str) else "0": old}])
    elif kind == "repeat" and isinstance(place, list):
        place += [old] * rng.choice([1, 2, 500])
    elif kind == "swap" and isinstance(place, dict):
        other = rng.choice(list(place))
        place[at], place[other] = place[other], old
    else:
        kind, place[at] = "odd", odd_value(rng)
    return holder[""], f"{kind} {'.'.join(path) or 'the whole'} {str(old)[:30]!r}"


def near(rng: random.Random, value: Any) -> Any:
    """Return a value of the same kind, or the same value as another kind."""
    if isinstance(value, bool) or value is None:
        return rng.choice([not value, str(value), int(bool(value))])
    if isinstance(value, int | float):
        return rng.choice(
            [value + 1, value - 1, -value, value * 2, value * 1_000, float(value), str(value), [value]]
        )
    if isinstance(value, str):
        return rng.choice(
            [value[:-1], value + "x", value * 2, value.upper(), [value], {"content": value}, "\0" + value]
        )
    return rng.choice([list(value), None, str(value)[:300], len(value)])


def change_json(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """Change one to three values of a JSON file, or its bytes."""
    if rng.random() < 0.25:
        return change_bytes(rng, content)
    try:
        value, told = json.loads(content), []
    except (ValueError, RecursionError):  # changed already
        return change_bytes(rng, content)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        value, what = change_value(rng, value)
        told.append(what)
    return as_json(value).encode(), ", ".join(told)


def change_lines(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """Change a line of a file that holds JSON lines, or its bytes."""
    if rng.random() < 0.4:
        return change_bytes(rng, content)
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    if not lines[at]:
        return change_bytes(rng, content)
    lines[at], what = change_json(rng, lines[at])
    return b"\n".join(lines), f"line {at}: {what}"


def change_safetensors(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """Change the header's JSON, its length, or any bytes."""
    size = int.from_bytes(content[:8], "little")
    if size > len(content):  # changed already
        return change_bytes(rng, content)
    kind = rng.choice(["header", "header", "length", "bytes", "first bytes"])
    if kind == "header":
        head, what = change_json(rng, content[8 : 8 + size])
        return struct.pack("<Q", len(head)) + head + content[8 + size :], f"header {what}"
    if kind == "length":
        length = rng.choice([0, 1, size - 1, size + 1, len(content), 2**31, 10**8, 2**63, 2**64 - 1])
        return struct.pack("<Q", length) + content[8:], f"length {length}"
    if kind == "bytes":
        return change_bytes(rng, content)
    head, what = change_bytes(rng, content[: 8 + size])
    return head + content[8 + size :], f"header's bytes: {what}"


Change = Callable[[random.Random, bytes], tuple[bytes, str]]


def change_of(path: Path) -> Change:
    """Return the change that fits a file's kind."""
    kinds = {".json": change_json, ".jsonl": change_lines, ".safetensors": change_safetensors}
    return kinds.get(path.suffix, change_bytes)


def replace_file(rng: random.Random, path: Path, outside: Path) -> str:
    """Put something else in the place of a file: a link out, a folder, a pipe, nothing."""
    kind = rng.choice(["link out", "link to a folder out", "dead link", "link to itself", "link to /dev/zero",
                       "link in", "folder", "full folder", "pipe", "missing", "empty", "a terabyte"])  # fmt: skip
    content = path.read_bytes()
    path.unlink()
    if kind == "link out":
        # half of the links lead to what would be a sound file
        target = outside / ("secret.txt" if rng.random() < 0.5 else path.name)
        if not target.exists():
            target.write_bytes(content)
        path.symlink_to(target)
    elif kind == "link in":
        path.with_name(f"{path.name}.real").write_bytes(content)
        path.symlink_to(f"{path.name}.real")
    elif kind.endswith("folder"):
        path.mkdir()
        if kind.startswith("full"):
            (path / "a").write_bytes(b"1")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind in ("empty", "a terabyte"):
        path.write_bytes(b"")
        os.truncate(path, 10**12 if kind != "empty" else 0)
    elif kind != "missing":
        targets = {"link to a folder out": outside, "dead link": outside / "not there", "link to itself": path}
        path.symlink_to(targets.get(kind, Path("/dev/zero")))
    return kind


def change_file(rng: random.Random, path: Path, outside: Path, change: Change | None = None) -> str:
    """Change what a file holds or what it is; returns what was done."""
    if path.stat().st_size > 2**24:  # changed already
        return "nothing"
    if rng.random() < 0.2:
        return f"{path.name}: {replace_file(rng, path, outside)}"
    changed, what = (change or change_of(path))(rng, path.read_bytes())
    path.write_bytes(changed)
    return f"{path.name}: {what}"


def fresh_copy(sound: Path, to: Path) -> Path:
    """Copy a sound folder."""
    return Path(shutil.copytree(sound, to, symlinks=True))
