"""Readers of recorded workloads: a file in, `RequestSpec`s out.

Formats: Mooncake (jsonl with prefix block ids), Azure LLM inference traces (csv), BurstGPT (csv), ShareGPT
(json of conversations; no times, see `with_arrivals`) and what `kvarn serve --record` writes (jsonl). Requests
that produced nothing (no output tokens) are left out: there is nothing to replay. A line that cannot be read
raises `WorkloadError` with its number.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from kvarn.errors import reason
from kvarn.serving.rounds.hints import RoundHint, Segment
from kvarn.simulation.workloads import RequestSpec, SegmentSpec, WorkloadError

MOONCAKE_BLOCK_TOKENS = 512
_HUMAN = {"human", "user"}


def load_trace(path: Path, format: str, count_tokens: Callable[[str], int] | None = None) -> list[RequestSpec]:
    """Read `path` in one of `FORMATS`; "sharegpt" also needs `count_tokens` (text -> number of tokens)."""
    if format == "sharegpt":
        if count_tokens is None:
            raise WorkloadError("a ShareGPT file holds text; give a tokenizer to count its tokens (--tokenizer)")
        return load_sharegpt(path, count_tokens)
    if format not in _LOADERS:
        raise WorkloadError(f"trace format is {format!r}; expected one of {', '.join(FORMATS)}")
    return _LOADERS[format](path)


def detect_format(path: Path) -> str:
    """Which of `FORMATS` a file is in, by its first line; WorkloadError when it looks like none."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            first = file.readline(65536).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise WorkloadError(f"cannot read {path}: {reason(error)}") from error
    for format, signs in _SIGNS.items():
        if all(sign in first for sign in signs):
            return format
    if first.startswith("["):
        return "sharegpt"
    raise WorkloadError(f"{path} looks like no known trace; name its format, one of {', '.join(FORMATS)}")


def load_mooncake(path: Path) -> list[RequestSpec]:
    """Mooncake: `timestamp` in ms, `input_length`, `output_length`, `hash_ids` of chained 512-token blocks."""

    def spec(row: dict[str, Any]) -> RequestSpec | None:
        if row["output_length"] < 1:
            return None
        ids = tuple(int(block) for block in row.get("hash_ids", ()))
        return RequestSpec(
            row["timestamp"] / 1000, row["input_length"], row["output_length"],
            prefix_ids=ids, prefix_block_tokens=MOONCAKE_BLOCK_TOKENS,
        )  # fmt: skip

    return _collect(path, _json_lines(path), spec)


def load_azure(path: Path) -> list[RequestSpec]:
    """Azure 2023/2024: `TIMESTAMP` (ISO date and time), `ContextTokens`, `GeneratedTokens`."""

    def spec(row: dict[str, str]) -> RequestSpec | None:
        time = datetime.fromisoformat(row["TIMESTAMP"])
        arrival = (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
        output = int(row["GeneratedTokens"])
        return RequestSpec(arrival, int(row["ContextTokens"]), output) if output else None

    return _from_zero(_collect(path, _csv_rows(path), spec))


def load_burstgpt(path: Path) -> list[RequestSpec]:
    """BurstGPT: `Timestamp` in s, `Request tokens`, `Response tokens` (0: the request failed), maybe `Session ID`."""

    def spec(row: dict[str, str]) -> RequestSpec | None:
        output = int(row["Response tokens"])
        session = row.get("Session ID") or None
        arrival = float(row["Timestamp"])
        return RequestSpec(arrival, int(row["Request tokens"]), output, session=session) if output else None

    return _collect(path, _csv_rows(path), spec)


def load_sharegpt(path: Path, count_tokens: Callable[[str], int]) -> list[RequestSpec]:
    """ShareGPT: the first exchange of every conversation, all arriving at 0 (the file has no times)."""
    try:
        conversations = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise WorkloadError(f"cannot read {path}: {reason(error)}") from error
    if not isinstance(conversations, list):
        raise WorkloadError(f"{path} holds a {type(conversations).__name__}; expected a JSON list of conversations")

    def spec(row: dict[str, Any]) -> RequestSpec | None:
        turns = row.get("conversations") or row.get("conversation") or []
        if len(turns) < 2 or turns[0].get("from") not in _HUMAN or turns[1].get("from") in _HUMAN:
            return None
        prompt, output = (count_tokens(turn["value"]) for turn in turns[:2])
        session = str(row["id"]) if "id" in row else None
        return RequestSpec(0.0, prompt, output, session=session) if prompt and output else None

    return _collect(path, enumerate(conversations, 1), spec)


def load_record(path: Path) -> list[RequestSpec]:
    """What `kvarn serve --record` writes: `arrival` in s, lengths in tokens, `block_hashes` (hex), `block_size`; maybe
    `segments` and `round`.

    Its lines are in the order in which requests finished; the result is in the order of arrival.
    """

    def spec(row: dict[str, Any]) -> RequestSpec | None:
        if not row["output_tokens"]:
            return None
        hashes = tuple(map(_id_of, row.get("block_hashes") or ()))
        segments = tuple(
            SegmentSpec(msgspec.convert(part, Segment), _id_of(part.get("hash", "0")))
            for part in row.get("segments") or ()
        )
        round = msgspec.convert(row.get("round"), RoundHint | None)
        return RequestSpec(
            row["arrival"], row["prompt_tokens"], row["output_tokens"], row.get("stream_rate"),
            prefix_ids=hashes, prefix_block_tokens=row.get("block_size", 16), session=row.get("session"),
            segments=segments, round=round,
        )  # fmt: skip

    return _from_zero(_collect(path, _json_lines(path), spec))


def _id_of(hash: str) -> int:
    return int(hash[:15], 16)  # 60 bits: fits an int64


_LOADERS = {"mooncake": load_mooncake, "azure": load_azure, "burstgpt": load_burstgpt, "kvarn": load_record}
FORMATS = (*_LOADERS, "sharegpt")
_SIGNS = {
    "mooncake": ('"timestamp"', '"input_length"'),
    "azure": ("TIMESTAMP", "ContextTokens"),
    "burstgpt": ("Timestamp", "Request tokens"),
    "kvarn": ('"arrival"', '"prompt_tokens"'),
}
"""What the first line of a file in each format holds."""


def _collect(
    path: Path, rows: Iterator[tuple[int, dict[str, Any]]], spec: Callable[[dict[str, Any]], RequestSpec | None]
) -> list[RequestSpec]:
    """Turn every (line number, row) into a request; a row that is not one of this format names its line."""
    found = []
    for line, row in rows:
        try:
            one = spec(row)
        except KeyError as error:
            raise WorkloadError(f"{path} line {line}: no field {error}; is the trace format the right one?") from error
        except (TypeError, ValueError, AttributeError, WorkloadError, msgspec.ValidationError) as error:
            raise WorkloadError(f"{path} line {line}: {error}") from error
        if one is not None:
            found.append(one)
    return found


def _from_zero(specs: list[RequestSpec]) -> list[RequestSpec]:
    """Calendar times to seconds from the first arrival, in order of arrival."""
    start = min((spec.arrival for spec in specs), default=0.0)
    moved = [replace(spec, arrival=round(spec.arrival - start, 6)) for spec in specs]
    return sorted(moved, key=lambda spec: spec.arrival)


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _json_row(path, number, line)
    except (OSError, UnicodeDecodeError) as error:
        raise WorkloadError(f"cannot read {path}: {reason(error)}") from error


def _json_row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise WorkloadError(f"{path} line {number} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise WorkloadError(f"{path} line {number} holds a {type(row).__name__}; expected a JSON object")
    return row


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from enumerate(csv.DictReader(file), 2)  # line 1 is the header
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise WorkloadError(f"cannot read {path}: {reason(error)}") from error
