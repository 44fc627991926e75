"""The 4-bit blocks of a GGUF file, kept as they are: codes, scales and minimums beside the converted weights.

In: an open GGUF file. Out: `Int4Weight`s, and the file `int4/blocks.safetensors` of a converted folder, which
`Int4Blocks` reads back. Q4_0 and Q4_1 blocks are kept exactly; Q4_K's two-level scales are multiplied out to float16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kvarn.errors import ModelError
from kvarn.kernels.quantized import Int4Weight
from kvarn.models.gguf_reader import GGUFFile

_FILE: Final = "int4/blocks.safetensors"
_Q4_0, _Q4_1, _Q4_K = 2, 3, 12  # GGMLQuantizationType
_Bytes = NDArray[np.uint8]


def read_int4(file: GGUFFile, name: str) -> Int4Weight | None:
    """The tensor's blocks [N, K]; None when it is not stored in 4 bits."""
    info = file.tensors[name]
    readers = {_Q4_0: (_read_q4_0, 18), _Q4_1: (_read_q4_1, 20), _Q4_K: (_read_q4_k, 144)}
    if info.kind not in readers or len(info.shape) != 2:
        return None
    read, size = readers[info.kind]
    codes, scales, minimums = read(file.raw(name).reshape(-1, size))
    rows = info.shape[0]
    return Int4Weight(*(torch.from_numpy(part.reshape(rows, -1)) for part in (codes, scales, minimums)))


def _read_q4_0(blocks: _Bytes) -> tuple[_Bytes, NDArray[np.float16], NDArray[np.float16]]:
    scales = blocks[:, :2].copy().view(np.float16)
    return _nibbles(blocks[:, 2:]), scales, scales * np.float16(-8)


def _read_q4_1(blocks: _Bytes) -> tuple[_Bytes, NDArray[np.float16], NDArray[np.float16]]:
    factors = blocks[:, :4].copy().view(np.float16)
    return _nibbles(blocks[:, 4:]), factors[:, 0].copy(), factors[:, 1].copy()


def _read_q4_k(blocks: _Bytes) -> tuple[_Bytes, NDArray[np.float16], NDArray[np.float16]]:
    """A super-block of 8 blocks: two factors, 8 scales and 8 minimums of 6 bits each, then the codes."""
    factors = blocks[:, :4].copy().view(np.float16).astype(np.float32)
    low, middle, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6) << 4], axis=1)
    minimums = np.concatenate([middle & 63, (high >> 4) | (middle >> 6) << 4], axis=1)
    return (
        _nibbles(blocks[:, 16:].reshape(-1, 32)),
        (factors[:, :1] * scales).astype(np.float16),
        (factors[:, 1:] * minimums * np.float32(-1)).astype(np.float16),
    )


def _nibbles(packed: _Bytes) -> _Bytes:
    """Low halves of all bytes of a block, then the high halves."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def save_int4(weights: dict[str, Int4Weight], folder: Path) -> None:
    """Write the blocks of weights by name; two codes a byte."""
    if not weights:
        return
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        tensors[f"{name}.codes"] = weight.codes[:, ::2] | weight.codes[:, 1::2] << 4
        tensors[f"{name}.scales"], tensors[f"{name}.minimums"] = weight.scales, weight.minimums
    (folder / _FILE).parent.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(folder / _FILE))


class Int4Blocks:
    """The 4-bit weights that a folder was converted from; empty when there are none."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _FILE
        self._names: frozenset[str] = frozenset()
        if self._path.exists():
            try:
                self._file = safe_open(self._path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{self._path} is not readable ({error}); convert the model again") from None
            names = self._file.keys()  # type: ignore[no-untyped-call]
            self._names = frozenset(name.removesuffix(".codes") for name in names if name.endswith(".codes"))

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def get(self, name: str, shape: tuple[int, int]) -> Int4Weight:
        """The blocks of the weight `name`. Raises ModelError when they are not of `shape`."""
        packed, scales, minimums = (
            self._file.get_tensor(f"{name}.{part}")  # type: ignore[no-untyped-call]
            for part in ("codes", "scales", "minimums")
        )
        codes = torch.stack([packed & 15, packed >> 4], dim=2).flatten(1)
        if tuple(codes.shape) != shape:
            raise ModelError(f"{self._path}: {name!r} is {list(codes.shape)}, config.json asks for {list(shape)}")
        return Int4Weight(codes, scales, minimums)
