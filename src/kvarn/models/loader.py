"""A folder of model files -> a `Decoder` ready to run: the fused one where it fits, transformers' model otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal

import torch

from kvarn.errors import CapacityError, ModelError
from kvarn.models import decoder_llama
from kvarn.models.config import eos_tokens, read_config
from kvarn.models.sources import ModelFiles, Progress
from kvarn.models.spec import Decoder, ModelSpec
from kvarn.models.weights import Weights

DType = Literal["float32", "bfloat16", "auto"]
_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_MEMORY_MARGIN: Final = 1.1
"""Memory that loading takes, in multiples of the weights: one layer is held twice while it is laid out."""


def load_decoder(
    files: ModelFiles, *, dtype: DType = "auto", device: str = "cpu", progress: Progress | None = None
) -> Decoder:
    """Load the model in `dtype` onto `device` ("cpu", "cuda", "cuda:1").

    "auto" is bfloat16 where the processor multiplies it natively, float32 elsewhere. Raises ModelError for files that
    are missing, corrupt or of an architecture that cannot run, CapacityError when memory is too small.
    """
    if progress:
        progress("loading the weights", 0.0)
    target = usable_device(device)
    config = read_config(files.folder)
    torch_dtype = _dtype(dtype, target)
    weights = Weights(files.folder)
    _check_memory(weights, torch_dtype, target)
    decoder = _fused(files, config, torch_dtype, weights, target)
    if decoder is None:
        from kvarn.models.decoder_transformers import TransformersDecoder

        decoder = TransformersDecoder.load(files, config, torch_dtype, target)
    if progress:
        progress("loading the weights", 1.0)
    return decoder


def _fused(
    files: ModelFiles, config: dict[str, Any], dtype: torch.dtype, weights: Weights, device: torch.device
) -> Decoder | None:
    """The fused decoder, or None when it does not compute this model."""
    try:
        if not decoder_llama.supports(config):
            return None
        spec = _llama_spec(files, config, dtype)
        return decoder_llama.LlamaDecoder(spec, config, weights, device) if spec.head_dim % 8 == 0 else None
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise ModelError(
            f"{files.folder / 'config.json'} lacks or garbles a value ({type(error).__name__}: {error}); "
            "download it again"
        ) from error


def _llama_spec(files: ModelFiles, config: dict[str, Any], dtype: torch.dtype) -> ModelSpec:
    heads = int(config["num_attention_heads"])
    return ModelSpec(
        name=files.name,
        architecture=config["architectures"][0],
        num_layers=int(config["num_hidden_layers"]),
        hidden_size=int(config["hidden_size"]),
        num_heads=heads,
        num_kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
        vocab_size=int(config["vocab_size"]),
        max_context=int(config["max_position_embeddings"]),
        eos_tokens=eos_tokens(files.folder, config),
        dtype=dtype,
    )


def _dtype(name: DType, device: torch.device) -> torch.dtype:
    if name in _DTYPES:
        return _DTYPES[name]
    if name != "auto":
        raise ModelError(f"dtype is {name!r}; expected float32, bfloat16 or auto")
    fast = device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.bfloat16 if fast else torch.float32


def usable_device(name: str) -> torch.device:
    """The torch device called `name`. Raises ModelError when it cannot be used here."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"device {name!r} cannot be used here ({reason}); expected cpu, cuda or cuda:N") from None
    return device


def _check_memory(weights: Weights, dtype: torch.dtype, device: torch.device) -> None:
    needed = int(weights.num_elements * dtype.itemsize * _MEMORY_MARGIN)
    free = free_bytes(device)
    if needed > free:
        raise CapacityError(
            f"the model needs {needed >> 20} MiB of memory on {device}, {free >> 20} MiB are free; "
            "free some, use --dtype bfloat16, or choose a smaller model"
        )


def free_bytes(device: torch.device) -> int:
    """Memory that an allocation on `device` may take now, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    if not info.exists():  # not Linux: let the system decide
        return 1 << 62
    fields = dict(line.split(":") for line in info.read_text().splitlines())
    return min(int(fields["MemAvailable"].split()[0]) << 10, _free_in_container())


def _free_in_container() -> int:
    """What the container (cgroup v2) may still take; its file cache counts as free."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no cgroup, or "max"
        return 1 << 62
    return limit - used + int(stat["file"])
