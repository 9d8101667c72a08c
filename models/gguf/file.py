"""A GGUF file: its metadata, and where in it the blocks of each tensor are.

The header is read here and not by gguf.GGUFReader, which trusts the counts that a file states, so that a broken file
can keep it busy for ever, and which takes seconds for a vocabulary. Layout: ggml's docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from models.files import CheckpointError

MAGIC, VERSIONS = b"GGUF", (2, 3)
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
MOST_DIMENSIONS = 4
SMALLEST_ENTRY, SMALLEST_TENSOR, SMALLEST_STRING = 13, 24, 8  # bytes, to refuse counts that no file could hold


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies: ``shape`` in PyTorch's order, ``kind`` a gguf.GGMLQuantizationType, offset in the file."""

    shape: tuple[int, ...]
    kind: Any
    offset: int
    nbytes: int


class GgufFile:
    """The header of a GGUF file. Raises CheckpointError for a file that is none, or truncated, or corrupt."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self.metadata, self.tensors = _read_header(_Cursor(data))
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing") from None
        except (OSError, ValueError, struct.error) as error:
            reason = " ".join(str(error).split())[:200]  # with names out of the file, which may be anything
            raise CheckpointError(f"{path} is no GGUF file we can read: {reason}") from None

    def blocks(self, name: str) -> npt.NDArray[np.uint8]:
        """The tensor's bytes, mapped: (..., bytes of a row), for as long as the array lives; writes stay private."""
        from gguf.quants import quant_shape_to_byte_shape

        tensor = self.tensors[name]
        shape = quant_shape_to_byte_shape(tensor.shape, tensor.kind)
        return np.memmap(self.path, np.uint8, mode="c", offset=tensor.offset, shape=shape)


class _Cursor:
    """Takes values off mapped bytes, one after the other. Raises ValueError at their end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.position = data, 0

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise ValueError("it is truncated or corrupt")
        self.position += count
        return self.data[self.position - count : self.position]

    def scalars(self, code: str, count: int = 1) -> tuple[Any, ...]:
        layout = f"<{count}{code}"
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def number(self, code: str) -> Any:
        return self.scalars(code)[0]

    def string(self) -> str:
        return self.take(self.number("Q")).decode()

    def count(self, smallest: int, code: str = "Q") -> int:
        """A number of things to come, of at least ``smallest`` bytes each."""
        count = int(self.number(code))
        if count * smallest > self.left:
            raise ValueError("it is truncated or corrupt")
        return count

    @property
    def left(self) -> int:
        return len(self.data) - self.position


def _read_header(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    if cursor.take(len(MAGIC)) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    if (version := cursor.number("I")) not in VERSIONS:
        raise ValueError(f"its version is {version}, or it is big-endian; expected {VERSIONS[0]} or {VERSIONS[1]}")
    tensor_count, entry_count = cursor.count(SMALLEST_TENSOR), cursor.count(SMALLEST_ENTRY)
    metadata: dict[str, Any] = {}
    for _ in range(entry_count):
        key, kind = cursor.string(), cursor.number("I")
        if key in metadata:
            raise ValueError(f"it has {key} twice")
        metadata[key] = _read_value(cursor, kind)
    return metadata, _read_tensors(cursor, tensor_count, metadata.get("general.alignment", 32))


def _read_value(cursor: _Cursor, kind: int) -> Any:
    if kind in SCALARS:
        value = cursor.number(SCALARS[kind])
        # The shortest decimal is what was written: 1e-05, not the double 9.999999747378752e-06 nearest in 32 bits.
        return float(str(np.float32(value))) if SCALARS[kind] == "f" else value
    if kind == STRING:
        return cursor.string()
    if kind != ARRAY:
        raise ValueError(f"it holds a value of unknown type {kind}")
    kind = cursor.number("I")
    if kind == STRING:
        return [cursor.string() for _ in range(cursor.count(SMALLEST_STRING))]
    if kind not in SCALARS:
        raise ValueError(f"it holds an array of unknown type {kind}")
    return list(cursor.scalars(SCALARS[kind], cursor.count(struct.calcsize(SCALARS[kind]))))


def _read_tensors(cursor: _Cursor, count: int, alignment: Any) -> dict[str, GgufTensor]:
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
        raise ValueError(f"its alignment is {alignment}, no power of two from 8")
    tensors: dict[str, GgufTensor] = {}
    for _ in range(count):
        name, dimensions = cursor.string(), cursor.number("I")
        if name in tensors or not 1 <= dimensions <= MOST_DIMENSIONS:
            raise ValueError(f"it has the tensor {name} twice, or in {dimensions} dimensions")
        shape = cursor.scalars("Q", dimensions)[::-1]  # ggml counts from the fastest dimension
        kind, nbytes = _storage(name, shape, cursor.number("I"))
        tensors[name] = GgufTensor(shape, kind, cursor.number("Q"), nbytes)
    start = -(-cursor.position // alignment) * alignment
    for name, tensor in tensors.items():
        if tensor.offset % alignment or start + tensor.offset + tensor.nbytes > len(cursor.data):
            raise ValueError(f"it is truncated or corrupt: {name} lies beyond its end, or not where tensors may")
    return {name: replace(tensor, offset=start + tensor.offset) for name, tensor in tensors.items()}


def _storage(name: str, shape: tuple[int, ...], number: int) -> tuple[Any, int]:
    """The type of that number and the bytes a tensor of it has."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise ValueError(f"{name} is of a type unknown to us, number {number}") from None
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if 0 in shape or shape[-1] % block:
        raise ValueError(f"{name} is {shape}, not whole blocks of {block} for {kind.name}")
    return kind, math.prod(shape) // block * block_bytes
