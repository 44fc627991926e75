"""Settings of policies as people write them: "tick=0.5", "pause=eager", "local_search=off"."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin, get_type_hints

from kvarn.errors import KvarnError

_WORDS = {"on": True, "true": True, "off": False, "false": False}


def parse_options(settings: type, options: Iterable[str]) -> dict[str, Any]:
    """Values by name for the fields of a dataclass; KvarnError for what is no field or no value of it."""
    kinds, values = get_type_hints(settings), dict[str, Any]()
    for option in options:
        name, _, word = option.partition("=")
        if name not in kinds:
            raise KvarnError(f"policy option is {option!r}; expected NAME=VALUE with one of {', '.join(kinds)}")
        values[name] = _parsed(kinds[name], word, option)
    return values


def _parsed(kind: Any, word: str, option: str) -> Any:
    if get_origin(kind) is Literal:
        if word not in get_args(kind):
            raise KvarnError(f"policy option is {option!r}; choose one of {', '.join(get_args(kind))}")
        return word
    if kind is bool:
        if word not in _WORDS:
            raise KvarnError(f"policy option is {option!r}; expected on or off")
        return _WORDS[word]
    try:
        return float(word) if kind is float else int(word)
    except ValueError as error:
        expected = "a number" if kind is float else "a whole number"
        raise KvarnError(f"policy option is {option!r}; expected {expected} behind the =") from error
