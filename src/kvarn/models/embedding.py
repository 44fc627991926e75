"""The embedding: a matrix of which a step needs a row a token, and which therefore stays in its file.

Where the weights are on the CPU it is a mapping of the file: memory holds the rows that have been used, and the system
takes them back when memory is short. Elsewhere it is a tensor on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Embedding:
    """`weight` [vocabulary, hidden] in any float dtype; rows come in `dtype`."""

    weight: torch.Tensor
    dtype: torch.dtype

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """[T] ids -> [T, hidden]."""
        return self.weight.index_select(0, tokens).to(self.dtype)
