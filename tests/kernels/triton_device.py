"""Where the tests of the Triton kernels run: on a GPU (marked `gpu`) if there is one, else in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MARKS = [pytest.mark.gpu] if DEVICE == "cuda" else []


def there(value: Any) -> Any:
    """`value`, on DEVICE if it is a tensor; strides stay as they are."""
    if not isinstance(value, torch.Tensor) or value.device.type == DEVICE:
        return value
    base = value if value._base is None else value._base
    return base.to(DEVICE).as_strided(value.shape, value.stride(), value.storage_offset())
