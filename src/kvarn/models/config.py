"""The small JSON files of a model folder: config.json and generation_config.json. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvarn.errors import ModelError


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises ModelError when it is missing or not a JSON object."""
    return read_json(folder / "config.json")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object on disk. Raises ModelError when it is missing or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ModelError(f"{path} is not JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, expected an object")
    return value


def eos_tokens(folder: Path, config: dict[str, Any]) -> frozenset[int]:
    """Ids that end a text: generation_config.json's when it names any, config.json's otherwise."""
    path = folder / "generation_config.json"
    ids = read_json(path).get("eos_token_id") if path.exists() else None
    ids = config.get("eos_token_id") if ids is None else ids
    return frozenset(ids if isinstance(ids, list) else [] if ids is None else [ids])
