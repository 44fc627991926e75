"""Tables of facts in TOML files: a file's table in, a checked frozen dataclass out. Errors name the field."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kvarn.errors import KvarnError, reason

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
_KINDS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,)}
Tables = dict[str, dict[str, Any]]


def bundled_tables(file: str) -> Tables:
    """The tables of a data file of this package."""
    return tomllib.loads(resources.files("kvarn.hardware").joinpath(file).read_text("utf-8"))


def read_tables(path: Path) -> Tables:
    """The tables of a file on disk; KvarnError when it cannot be read or holds anything but tables."""
    try:
        tables = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise KvarnError(f"cannot read {path}: {reason(error)}") from error
    if not tables or not all(isinstance(table, dict) for table in tables.values()):
        raise KvarnError(f"{path} is not a profile; expected one table, [name], as `kvarn calibrate` writes it")
    return tables


def record(kind: type[T], name: str, table: Mapping[str, Any], where: str) -> T:
    """`kind(name=name, **table)`, once every field of `kind` is there with a value of its type."""
    expected = {field.name: field.type for field in fields(kind) if field.name != "name"}
    for field in expected:
        if field not in table:
            raise KvarnError(f"{where}: [{name}] has no {field}; add it")
    for field, value in table.items():
        if field not in expected:
            raise KvarnError(f"{where}: [{name}] has an unknown field {field}; remove it")
        if not _is(value, str(expected[field])):
            raise KvarnError(f"{where}: {field} of [{name}] is {value!r}; expected {expected[field]}")
    return kind(**{"name": name, **table})


def pick(tables: Tables, name: str, what: str, elsewhere: str) -> dict[str, Any]:
    """The table of this name; KvarnError with the names that exist. `elsewhere`: what else could be named."""
    if name not in tables:
        raise KvarnError(f"{what} {name!r} is not known; choose one of {', '.join(tables)}, or {elsewhere}")
    return tables[name]


def write_table(path: Path, name: str, table: Mapping[str, Any], comments: list[str]) -> None:
    """Write one table that `read_tables` reads; KvarnError when the file cannot be written."""
    lines = [f"# {comment}" for comment in comments] + [f"[{_toml(name)}]"]
    lines += [f"{field} = {_toml(value)}" for field, value in table.items()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", "utf-8")
    except OSError as error:
        raise KvarnError(f"cannot write {path}: {error.strerror}; name a file that can be written") from error


def _is(value: object, kind: str) -> bool:
    if kind == "bool" or isinstance(value, bool):
        return kind == "bool" and isinstance(value, bool)
    return isinstance(value, _KINDS[kind])


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    return repr(value)
