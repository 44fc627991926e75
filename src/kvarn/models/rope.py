"""Rotary position tables: what config.json says about RoPE -> one cos/sin table for every position.

Scaling kinds: default, linear, dynamic (equal to default within the model's context, which is all we serve), llama3
and yarn. Source: RoPE (arXiv 2104.09864), YaRN (arXiv 2309.00071), the Llama 3.1 model card.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch

from kvarn.errors import ModelError

SCALINGS: Final = frozenset({"default", "linear", "dynamic", "llama3", "yarn"})


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """RoPE settings of a config.json in transformers 5's form, whichever generation wrote it."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    parameters = {"rope_theta": config.get("rope_theta", 10000.0), **scaling}
    parameters["rope_type"] = parameters.get("rope_type") or parameters.get("type") or "default"
    parameters.setdefault("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    return parameters


def cos_sin_table(parameters: dict[str, Any], head_dim: int, max_context: int) -> torch.Tensor:
    """[max_context, rotary width] float32: cosines in the first half, sines in the second."""
    frequencies, factor = inverse_frequencies(parameters, head_dim, max_context)
    angles = torch.outer(torch.arange(max_context, dtype=torch.float32), frequencies)
    return torch.cat((angles.cos() * factor, angles.sin() * factor), dim=1)


def inverse_frequencies(parameters: dict[str, Any], head_dim: int, max_context: int) -> tuple[torch.Tensor, float]:
    """Inverse frequencies [rotary width / 2] float32, and the factor on cos and sin.

    `max_context` stands in for `original_max_position_embeddings` where the config does not give it.
    """
    kind = parameters["rope_type"]
    if kind not in SCALINGS:
        raise ModelError(f"RoPE scaling {kind!r} is unknown; expected one of {', '.join(sorted(SCALINGS))}")
    width = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    theta = float(parameters["rope_theta"])
    plain = 1.0 / (theta ** (torch.arange(0, width, 2, dtype=torch.int64).float() / width))
    if kind == "linear":
        return plain / float(parameters["factor"]), 1.0
    if kind == "llama3":
        return _llama3(plain, parameters), 1.0
    if kind == "yarn":
        return _yarn(width, theta, parameters, max_context)
    return plain, 1.0


def _llama3(plain: torch.Tensor, parameters: dict[str, Any]) -> torch.Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    factor = float(parameters["factor"])
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    context = float(parameters["original_max_position_embeddings"])
    wavelength = 2 * math.pi / plain
    blend = (context / wavelength - low) / (high - low)
    blended = (1 - blend) * plain / factor + blend * plain
    scaled = torch.where(wavelength > context / low, plain / factor, blended)
    return torch.where(wavelength < context / high, plain, scaled)


def _yarn(width: int, theta: float, parameters: dict[str, Any], max_context: int) -> tuple[torch.Tensor, float]:
    """Dimensions that turn often keep their frequency, those that turn rarely are interpolated, with a ramp between."""
    original = float(parameters.get("original_max_position_embeddings") or max_context)
    factor = float(parameters.get("factor") or max_context / original)

    def dimension(rotations: float) -> float:
        return width * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension(float(parameters.get("beta_fast") or 32))
    high = dimension(float(parameters.get("beta_slow") or 1))
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(width // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    powers = theta ** (torch.arange(0, width, 2).float() / width)
    frequencies = ramp / (factor * powers) + (1 - ramp) / powers
    return frequencies, _yarn_attention_factor(factor, parameters)


def _yarn_attention_factor(factor: float, parameters: dict[str, Any]) -> float:
    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])

    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    scale, all_dimensions = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if scale and all_dimensions:
        return magnitude(float(scale)) / magnitude(float(all_dimensions))
    return magnitude(1.0)
