"""A folder of model files -> a `Decoder` ready to run: the fused one where it fits, transformers' model otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch

from kvarn.errors import CapacityError, ModelError
from kvarn.models import decoder_llama
from kvarn.models.config import eos_tokens, read_config
from kvarn.models.gguf_blocks import Int4Blocks
from kvarn.models.linear import LinearReader
from kvarn.models.precision import Precision, PrecisionChoice, choose_precision, compute_dtype, weight_bytes
from kvarn.models.sources import ModelFiles, Progress
from kvarn.models.spec import Decoder, ModelSpec
from kvarn.models.weights import Weights

_MEMORY_MARGIN: Final = 1.1
"""Memory that loading takes, in multiples of the weights: one layer is held twice while it is laid out."""


def load_decoder(
    files: ModelFiles, *, precision: PrecisionChoice = "auto", device: str = "cpu", progress: Progress | None = None
) -> Decoder:
    """Load the model in `precision` (see `choose_precision`) onto `device` ("cpu", "cuda", "cuda:1").

    Raises ModelError for files that are missing, corrupt or of an architecture that cannot run (in this precision),
    CapacityError when memory is too small.
    """
    if progress:
        progress("loading the weights", 0.0)
    target = usable_device(device)
    config = read_config(files.folder)
    weights = Weights(files.folder)
    blocks = Int4Blocks(files.folder)
    chosen = choose_precision(precision, target, has_int4_blocks=len(blocks) > 0)
    _check_memory(weights, chosen, target)
    decoder = _fused(files, config, chosen, LinearReader(weights, blocks, chosen, target))
    if decoder is None:
        from kvarn.models.decoder_transformers import TransformersDecoder

        if chosen in ("int8", "int4"):
            raise ModelError(
                f"{files.name} is a {(config.get('architectures') or ['model'])[0]}; {chosen} is for the Llama family: "
                "choose --precision bfloat16 or float32"
            )
        decoder = TransformersDecoder.load(files, config, compute_dtype(chosen), target)
    if progress:
        progress("loading the weights", 1.0)
    return decoder


def _fused(files: ModelFiles, config: dict[str, Any], precision: Precision, reader: LinearReader) -> Decoder | None:
    """The fused decoder, or None when it does not compute this model."""
    try:
        if not decoder_llama.supports(config):
            return None
        spec = _llama_spec(files, config, precision)
        return decoder_llama.LlamaDecoder(spec, config, reader) if spec.head_dim % 8 == 0 else None
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise ModelError(
            f"{files.folder / 'config.json'} lacks or garbles a value ({type(error).__name__}: {error}); "
            "download it again"
        ) from error


def _llama_spec(files: ModelFiles, config: dict[str, Any], precision: Precision) -> ModelSpec:
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
        dtype=compute_dtype(precision),
        precision=precision,
    )


def usable_device(name: str) -> torch.device:
    """The torch device called `name`. Raises ModelError when it cannot be used here."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"device {name!r} cannot be used here ({reason}); expected cpu, cuda or cuda:N") from None
    return device


def _check_memory(weights: Weights, precision: Precision, device: torch.device) -> None:
    needed = int(weights.num_elements * weight_bytes(precision) * _MEMORY_MARGIN)
    free = free_bytes(device)
    if needed > free:
        raise CapacityError(
            f"the model needs {needed >> 20} MiB of memory on {device}, {free >> 20} MiB are free; "
            "free some, use a smaller --precision, or choose a smaller model"
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
