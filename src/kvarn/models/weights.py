"""The safetensors files of a model folder as one read-only mapping, memory-mapped; a bad file is a ModelError.

In: a folder. Out: tensors by name, each checked against the shape its reader expects.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from kvarn.errors import ModelError

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INDEX = "model.safetensors.index.json"


class Weights:
    """All tensors of a folder's safetensors files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[Path, Any] = {}
        self._where: dict[str, Path] = {}
        for path in self._paths():
            try:
                self._files[path] = safe_open(path, framework="pt", device="cpu")
                self._where.update(dict.fromkeys(self._files[path].keys(), path))
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path} is not a readable safetensors file ({error}); download it again") from None

    def __contains__(self, name: str) -> bool:
        return name in self._where

    @property
    def num_elements(self) -> int:
        """Numbers held in all tensors together. Reads headers only."""
        return sum(math.prod(self._files[path].get_slice(name).get_shape()) for name, path in self._where.items())

    def get(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor called `name`. Raises ModelError when it is missing or not of `shape`."""
        path = self._where.get(name)
        if path is None:
            raise ModelError(f"{self.folder} has no tensor {name!r}; the files and config.json do not belong together")
        try:
            tensor: torch.Tensor = self._files[path].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path}: tensor {name!r} cannot be read ({error}); download it again") from None
        if tuple(tensor.shape) != shape:
            raise ModelError(
                f"{path}: tensor {name!r} has shape {list(tensor.shape)}, config.json asks for {list(shape)}; "
                "the files do not belong together"
            )
        return tensor

    def mapped(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The same without reading it: what is touched of it comes from the file, as long as that is not changed."""
        path = self._where.get(name)
        told: Any = None if path is None else self._files[path].get_slice(name)
        dtype = None if told is None else _DTYPES.get(told.get_dtype())
        if path is None or dtype is None or tuple(told.get_shape()) != shape:
            return self.get(name, shape)  # which says what is wrong, or reads an unusual format
        size = path.stat().st_size
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            begin, end = json.loads(file.read(header))[name]["data_offsets"]
        start = 8 + header
        if (start + begin) % dtype.itemsize:
            return self.get(name, shape)
        whole = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        return whole[start + begin : start + end].view(dtype).view(shape)

    def _paths(self) -> list[Path]:
        index = self.folder / _INDEX
        if not index.exists():
            paths = sorted(self.folder.glob("*.safetensors"))
            if not paths:
                raise ModelError(f"{self.folder} has no *.safetensors files")
            return paths
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{index} is not a readable index ({error}); download it again") from None
        missing = [name for name in names if not (self.folder / name).is_file()]
        if missing:
            raise ModelError(f"{self.folder} lacks {', '.join(missing)}, named in {_INDEX}; download again")
        return [self.folder / name for name in names]
