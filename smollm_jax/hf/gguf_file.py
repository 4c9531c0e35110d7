"""Read and write GGUF files: fields, and tensors in the number formats of ggml.

The layout is in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A file may come from anywhere: each
size in it is compared with the file's own before memory is taken. The package `gguf` converts numbers and writes.
"""

import math
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from smollm_jax.runtime.errors import UserError, install, one_line, require
from smollm_jax.runtime.files import named_failure

SUFFIX = ".gguf"
MAGIC, VERSIONS, ALIGNMENT, MOST_DIMS = b"GGUF", (2, 3), 32, 4
LARGEST_HEADER = 2**26  # bytes before the weights: a vocabulary of 256,000 entries takes 16 million
FLOAT, STRING, ARRAY = 6, 8, 9  # types of values
NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8",
           12: "<f8"}  # fmt: skip


def library() -> Any:
    """Return the package `gguf`. Raises `UserError` with the command that installs it."""
    try:
        import gguf
    except ImportError:
        raise UserError(f"GGUF files need the gguf package: {install('gguf')}") from None
    return gguf


class Stored(NamedTuple):
    """A tensor of a file: shape with the outputs first, format, first byte and number of bytes."""

    shape: tuple[int, ...]
    kind: Any
    start: int
    size: int


@dataclass(frozen=True)
class GGUFFile:
    """The fields of a file by key, and where its tensors are."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, Stored]

    @cached_property
    def bits(self) -> str:
        """Return a phrase on the formats of the weights and their mean size."""
        kinds = sorted({tensor.kind.name for tensor in self.tensors.values()})
        weights = sum(math.prod(tensor.shape) for tensor in self.tensors.values())
        size = 8 * sum(tensor.size for tensor in self.tensors.values()) / weights
        return f"{' and '.join(kinds)}, {size:.3g} bits per weight"

    def read(self, name: str) -> np.ndarray:
        """Return a tensor in f32. Raises `UserError` if its format cannot be read."""
        stored = self.tensors[name]
        with np.errstate(all="ignore"):  # a damaged scale may be infinite
            try:
                values = np.memmap(self.path, np.uint8, "r", stored.start, stored.size)
                rows = values.reshape(math.prod(stored.shape[:-1]), -1)
                return np.asarray(library().dequantize(rows, stored.kind), np.float32).reshape(stored.shape)
            except (NotImplementedError, OSError, ValueError) as error:
                raise UserError(f"{self.path}: tensor {name} cannot be read: {one_line(error)}") from None


class _Header:
    """A cursor over the bytes before the weights. Raises `UserError` where they end early."""

    def __init__(self, path: Path, content: bytes):
        self.path, self.content, self.at = path, content, 0

    def take(self, size: int) -> bytes:
        ends = "is cut short" if len(self.content) < LARGEST_HEADER else f"has over {LARGEST_HEADER:,} bytes"
        require(size <= len(self.content) - self.at, f"{self.path} is damaged: its header {ends}")
        self.at += size
        return self.content[self.at - size : self.at]

    def number(self, form: str) -> int:
        return int(struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0])

    def text(self) -> str:
        try:
            return self.take(self.number("Q")).decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path} is damaged: a text in its header is not UTF-8: {error}") from None

    def value(self) -> Any:
        kind = self.number("I")
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            value = self.numbers(kind, 1)[0]
            # 1e-5 in f32 is 9.99999974e-06 in Python: the shortest decimal of the f32 is what was written
            return float(str(np.float32(value))) if kind == FLOAT else value.item()
        kind, count = self.number("I"), self.number("Q")
        if kind != STRING:
            return self.numbers(kind, count).tolist()
        require(count <= len(self.content), f"{self.path} is damaged: a list of {count:,} texts is longer than it")
        return [self.text() for _ in range(count)]

    def numbers(self, kind: int, count: int) -> np.ndarray:
        require(kind in NUMBERS, f"{self.path} is damaged: its header has a value of unknown type {kind}")
        return np.frombuffer(self.take(count * np.dtype(NUMBERS[kind]).itemsize), NUMBERS[kind])

    def tensor(self) -> tuple[str, tuple[int, ...], Any, int]:
        gguf, name, dims = library(), self.text(), self.number("I")
        require(dims <= MOST_DIMS, f"{self.path} is damaged: tensor {name} has {dims:,} dims")
        shape = tuple(self.number("Q") for _ in range(dims))[::-1]
        kind, offset = self.number("I"), self.number("Q")
        known = kind in gguf.GGMLQuantizationType._value2member_map_
        require(known, f"{self.path}: tensor {name} has format {kind}, which this version of gguf does not know")
        return name, shape, gguf.GGMLQuantizationType(kind), offset


def read_file(path: Path) -> GGUFFile:
    """Return what a file holds, its weights not yet read. Raises `UserError` if it is damaged."""
    require(path.is_file(), f"there is no file {path}")
    total = path.stat().st_size
    with path.open("rb") as file:
        header = _Header(path, file.read(LARGEST_HEADER))
    require(header.content[:4] == MAGIC, f"{path} is no GGUF file: it does not begin with the letters GGUF")
    header.at, version = 4, int.from_bytes(header.content[4:8], "little")
    order = " or written for big-endian machines" if version & 0xFFFF == 0 else ""
    require(version in VERSIONS, f"{path} is of version {version}{order}; GGUF 2 and 3 can be read")
    header.take(4)
    tensors, count = header.number("Q"), header.number("Q")
    fields: dict[str, Any] = {}
    for _ in range(count):
        key = header.text()
        require(key not in fields, f"{path} is damaged: it has {key} twice")
        fields[key] = header.value()
    infos = [header.tensor() for _ in range(tensors)]
    step = fields.get("general.alignment", ALIGNMENT)
    require(isinstance(step, int) and 0 < step < 2**31, f"{path} is damaged: its alignment is {step!r}")
    start = -(-header.at // step) * step
    stored: dict[str, Stored] = {}
    for name, shape, kind, offset in infos:
        block, size = library().GGML_QUANT_SIZES[kind]
        whole = bool(shape) and min(shape) > 0 and shape[-1] % block == 0
        require(whole, f"{path} is damaged: tensor {name} of shape {shape} has no whole blocks of {block}")
        require(name not in stored, f"{path} is damaged: it has tensor {name} twice")
        stored[name] = Stored(shape, kind, start + offset, math.prod(shape) // block * size)
        ends = f"{path} is cut short: tensor {name} ends after byte {total:,}"
        require(stored[name].start + stored[name].size <= total, ends)
    # so that the memory for all tensors is bounded by the file
    weights = sum(one.size for one in stored.values())
    require(not stored or weights <= total - start, f"{path} is damaged: its tensors overlap")
    return GGUFFile(path, fields, stored)


def write_file(
    path: Path, fields: dict[str, Any], tensors: Iterable[tuple[str, tuple[int, ...], str]],
    value: Callable[[str], np.ndarray],
) -> None:  # fmt: skip
    """Write a file. `tensors` are name, shape and format; `value` is called in their order and returns f32."""
    gguf, names = library(), []
    writer = gguf.GGUFWriter(path, fields["general.architecture"])
    put: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
        list: writer.add_array,
    }  # fmt: skip
    for key, content in fields.items():
        if key != "general.architecture":  # the writer has put it
            put[type(content)](key, content)
    for name, shape, word in tensors:
        kind = gguf.GGMLQuantizationType[word]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        size_in_file = math.prod(shape) // block * size
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size_in_file, raw_dtype=kind)
        names.append((name, kind))
    with named_failure(path):
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, kind in names:
                with np.errstate(all="ignore"):  # a weight beyond f16 becomes infinite, and reading back finds it
                    writer.write_tensor_data(gguf.quantize(np.ascontiguousarray(value(name)), kind))
        finally:
            writer.close()
