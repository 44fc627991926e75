"""Reading a GGUF file: metadata and tensors out of one memory-mapped file, every offset checked against its size.

In: a path. Out: `GGUFFile` with plain Python metadata and float32 arrays on demand. Anything that does not parse is
a ModelError that names the file. Source: the GGUF specification (ggml-org/ggml, docs/gguf.md), versions 2 and 3.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvarn.errors import ModelError

_MAGIC: Final = b"GGUF"
_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING: Final = 8
_ARRAY: Final = 9
_MAX_DIMENSIONS: Final = 4


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies. `shape` is row-major as PyTorch has it; `offset` counts from the file's start."""

    name: str
    shape: tuple[int, ...]
    kind: int
    """A GGMLQuantizationType."""
    offset: int
    nbytes: int


class GGUFFile:
    """One open GGUF file.

    metadata  key -> bool, int, float, str or list of those
    tensors   name -> TensorInfo, in file order
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise ModelError(f"no such file: {path}") from None
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise self._corrupt(str(error)) from None
        self._at = 0
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            self._read_header()
        except (struct.error, UnicodeDecodeError, OverflowError) as error:
            raise self._corrupt(f"the header ends or breaks at byte {self._at} ({error})") from None

    def read(self, name: str) -> NDArray[np.float32]:
        """The tensor, dequantised, in its PyTorch shape. float16 and bfloat16 tensors widen exactly."""
        from gguf import GGMLQuantizationType, dequantize

        info = self.tensors[name]
        kind = GGMLQuantizationType(info.kind)
        rows = math.prod(info.shape[:-1])
        try:
            values = dequantize(self.raw(name).reshape(rows, -1), kind)
        except NotImplementedError:
            raise ModelError(
                f"{self.path}: tensor {name} is stored as {kind.name}, which kvarn cannot read; "
                "use a file quantised as Q8_0, Q4_K_M or another common kind"
            ) from None
        return np.require(values, np.float32, ["C", "W"]).reshape(info.shape)

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The tensor's bytes, as they are in the file; read-only."""
        info = self.tensors[name]
        return np.frombuffer(self._data, dtype=np.uint8, count=info.nbytes, offset=info.offset)

    def _read_header(self) -> None:
        magic = self._data[:4]
        if magic != _MAGIC:
            raise self._corrupt(f"it starts with {magic!r}, expected {_MAGIC!r}")
        self._at = 4
        version = self._scalar("I")
        if version not in (2, 3):
            raise ModelError(
                f"{self.path}: GGUF version {version}; expected 2 or 3 (convert it with a recent llama.cpp)"
            )
        tensor_count, key_count = self._scalar("Q"), self._scalar("Q")
        for _ in range(key_count):
            key = self._string()
            self.metadata[key] = self._value(self._scalar("I"), key)
        infos = [self._tensor_info() for _ in range(tensor_count)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise self._corrupt(f"general.alignment is {alignment!r}")
        start = -(-self._at // alignment) * alignment
        for name, shape, kind, offset in infos:
            nbytes = self._tensor_bytes(name, shape, kind)
            end = start + offset + nbytes
            if end > len(self._data):
                raise self._corrupt(
                    f"tensor {name} ends at byte {end}, the file at {len(self._data)}: truncated, download it again"
                )
            self.tensors[name] = TensorInfo(name, shape, kind, start + offset, nbytes)

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        dimensions = self._scalar("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self._corrupt(f"tensor {name} has {dimensions} dimensions; expected 1 to {_MAX_DIMENSIONS}")
        shape = tuple(reversed([int(self._scalar("Q")) for _ in range(dimensions)]))
        return name, shape, self._scalar("I"), self._scalar("Q")

    def _tensor_bytes(self, name: str, shape: tuple[int, ...], kind: int) -> int:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            block_elements, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise self._corrupt(f"tensor {name} has the unknown type {kind}") from None
        if min(shape) < 1 or shape[-1] % block_elements:
            raise self._corrupt(f"tensor {name} has shape {list(shape)}, not whole blocks of {block_elements}")
        return math.prod(shape) // int(block_elements) * int(block_bytes)

    def _value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise self._corrupt(f"{key} has the unknown value type {kind}")
        item_kind, count = self._scalar("I"), self._scalar("Q")
        if item_kind in _SCALARS:
            return list(self._unpack(f"<{count}{_SCALARS[item_kind]}"))
        if item_kind != _STRING:
            raise self._corrupt(f"{key} is an array of the unknown value type {item_kind}")
        if count > len(self._data):  # each item takes a byte or more
            raise self._corrupt(f"{key} claims {count} items")
        return [self._string() for _ in range(count)]

    def _string(self) -> str:
        length = self._scalar("Q")
        end = self._at + length
        if end > len(self._data):
            raise self._corrupt(f"a string of {length} bytes at byte {self._at} leaves the file")
        text = self._data[self._at : end].decode()
        self._at = end
        return text

    def _scalar(self, code: str) -> Any:
        return self._unpack("<" + code)[0]

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        size = struct.calcsize(layout)
        if size > len(self._data) - self._at:
            raise self._corrupt(f"{size} bytes expected at byte {self._at}, the file has {len(self._data)}")
        values = struct.unpack_from(layout, self._data, self._at)
        self._at += size
        return values

    def _corrupt(self, why: str) -> ModelError:
        return ModelError(f"{self.path} is not a readable GGUF file: {why}")
