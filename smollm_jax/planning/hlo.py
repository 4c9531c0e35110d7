"""What a compiled program says to other devices: its collectives with their bytes, read from XLA's text.

A collective inside a loop, such as the scan over layers, counts once for each turn. The TPU's compiler spreads
an asynchronous collective over the fusions that it overlaps with, each of which repeats it, and writes a
reduce-scatter as a fusion of its own; both count as the one collective that they are. Knows no model and no mesh.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}  # others carry theirs: f32, s8, f8e4m3fn

INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<shape>.*?) (?P<opcode>[a-z][\w-]*)\((?P<rest>.*)$"
)
COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{\s*$")
ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
NAMED_GROUPS = re.compile(r"replica_groups=(?:@\w+|mesh)\[([^\]]*)\](?:, device_ids=\(\S*\))?\s*\{([^}]*)\}")
CALLED = re.compile(r"\b(?:calls|to_apply|body|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.-]+)")


@dataclass(frozen=True, kw_only=True)
class Collective:
    """`count` times a step, `bytes` of the whole array together, among `group` devices."""

    kind: str
    count: int
    bytes: int
    group: int

    @property
    def bytes_sent(self) -> float:
        """By each device, in a ring: the whole of an array goes around once, for an all-reduce twice (Patarasuk
        & Yuan 2009).
        """
        if self.kind == "collective-permute":
            return self.bytes
        return (2 if self.kind == "all-reduce" else 1) * self.bytes * (self.group - 1) / self.group


@dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    rest: str

    @property
    def called(self) -> list[str]:
        return [name.strip(" %{}") for match in CALLED.findall(self.rest) for name in match.split(",")]


def collectives(program: str, devices: int) -> list[Collective]:
    """Those of one run of `program`, the text of a compiled module for `devices`; one entry a kind and group."""
    computations, entry = _computations(program)
    summed: dict[tuple[str, int], list[int]] = defaultdict(lambda: [0, 0])
    for found in _walk(computations, entry, 1, devices):
        total = summed[found.kind, found.group]
        total[0] += found.count
        total[1] += found.count * found.bytes
    return [
        Collective(kind=kind, count=count, bytes=size, group=group)
        for (kind, group), (count, size) in sorted(summed.items(), key=lambda item: -item[1][1])
    ]


def kernels(program: str) -> int:
    """Custom calls of Pallas kernels in the program: TPU's, Triton's or cuDNN's."""
    return len(
        re.findall(r'custom_call_target="(?:tpu_custom_call|__gpu\$xla\.gpu\.triton|__cudnn\$fmha\w*)"', program)
    )


def _computations(program: str) -> tuple[dict[str, list[_Instruction]], str]:
    found: dict[str, list[_Instruction]] = {}
    entry = current = ""
    for line in program.splitlines():
        if begins := COMPUTATION.match(line):
            current = begins["name"]
            found[current] = []
            entry = current if begins["entry"] else entry
        elif current and (match := INSTRUCTION.match(line)):
            found[current].append(_Instruction(**match.groupdict()))
    return found, entry


def _walk(
    computations: dict[str, list[_Instruction]], name: str, turns: int, devices: int
) -> Iterator[Collective]:
    """The collectives of a computation that runs `turns` times, and of those that it calls."""
    for instruction in computations[name]:
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            yield _collective(instruction, kind, turns, devices)
            continue  # what it calls only adds two numbers
        if instruction.opcode == "conditional":
            branches = [list(_walk(computations, each, turns, devices)) for each in instruction.called]
            yield from max(branches, key=lambda branch: sum(each.bytes for each in branch), default=[])
            continue
        inner = turns * (_trips(computations, instruction) if instruction.opcode == "while" else 1)
        for called in instruction.called:
            if called not in computations or _goes_on(instruction, called):
                continue
            inside = _walk(computations, called, inner, devices)
            scatters = called.startswith("all-reduce-scatter")
            yield from (replace(each, kind="reduce-scatter") if scatters else each for each in inside)


def _goes_on(instruction: _Instruction, called: str) -> bool:
    """Whether a fusion belongs to a collective that began in another one, and repeats it."""
    return called.startswith("async_collective_fusion") or instruction.name.startswith("async-collective-done")


def _collective(instruction: _Instruction, kind: str, turns: int, devices: int) -> Collective:
    group = _group_size(instruction.rest, devices)
    arrays = [_bytes(*array) for array in ARRAY.findall(instruction.shape)]
    begins = instruction.opcode.endswith("-start") and kind != "all-reduce"
    # what begins one has operands, results and a few bytes of bookkeeping, the rest has results
    size = max(arrays) if begins else sum(arrays)
    whole = group if kind == "reduce-scatter" else 1  # the result is one device's part
    return Collective(kind=kind, count=turns, bytes=size * whole, group=group)


def _bytes(dtype: str, dims: str) -> int:
    digits = re.search(r"\d+", dtype)
    bits = BITS.get(dtype) or (int(digits[0]) if digits else 8)
    return math.prod(int(dim) for dim in dims.split(",") if dim) * bits // 8


def _group_size(attributes: str, devices: int) -> int:
    """Devices that talk to each other, from any of the three ways in which XLA writes the groups."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return listed[1].count(",") + 1
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(tiled[1])
    if named := NAMED_GROUPS.search(attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return devices


def _trips(computations: dict[str, list[_Instruction]], loop: _Instruction) -> int:
    """Turns of a while loop: as XLA notes them, else the constant that its condition compares the counter with."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.-]+)", loop.rest)
    bounds = [
        int(number[1])
        for instruction in computations.get(condition[1] if condition else "", ())
        if instruction.opcode == "constant" and (number := re.match(r"(\d+)\)", instruction.rest))
    ]
    if not bounds:
        raise RuntimeError(f"the loop {loop.name} does not say how often it turns")
    return max(bounds)
