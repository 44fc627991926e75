"""Recorded workloads, each format in miniature; unreadable files name the line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from kvarn.serving.rounds.hints import RoundHint, Segment
from kvarn.simulation.prompts import prompt_tokens
from kvarn.simulation.traces import FORMATS, detect_format, load_trace
from kvarn.simulation.workloads import RequestSpec, WorkloadError

REAL_TRACES = Path(os.environ.get("KVARN_TRACES", Path(__file__).resolve().parents[3] / "shared" / "data"))


def words(text: str) -> int:
    return len(text.split())


def write(folder: Path, text: str) -> Path:
    file = folder / "trace"
    file.write_text(text)
    return file


def test_mooncake(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]},
        {"timestamp": 2500, "input_length": 700, "output_length": 6, "hash_ids": [0, 2]},
        {"timestamp": 2600, "input_length": 700, "output_length": 0, "hash_ids": []},
    ]
    specs = load_trace(write(tmp_path, "\n".join(map(json.dumps, rows)) + "\n\n"), "mooncake")
    assert specs == [
        RequestSpec(0.0, 600, 5, prefix_ids=(0, 1), prefix_block_tokens=512),
        RequestSpec(2.5, 700, 6, prefix_ids=(0, 2), prefix_block_tokens=512),
    ]


def test_azure_counts_from_its_first_row(tmp_path: Path) -> None:
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,48,10\n2023-11-16 18:17:05.4799600,31,8\n"
    )
    assert load_trace(write(tmp_path, text), "azure") == [RequestSpec(0.0, 48, 10), RequestSpec(1.5, 31, 8)]


def test_burstgpt_leaves_failed_requests_out(tmp_path: Path) -> None:
    text = (
        "Timestamp,Session ID,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,7,ChatGPT,472,18,490,Conversation log\n45,8,ChatGPT,1087,0,1087,Conversation log\n"
        "118,,GPT-4,417,276,693,API log\n"
    )
    specs = load_trace(write(tmp_path, text), "burstgpt")
    assert specs == [RequestSpec(5.0, 472, 18, session="7"), RequestSpec(118.0, 417, 276)]


def test_sharegpt_takes_the_first_exchange(tmp_path: Path) -> None:
    said = [
        {"id": "a", "conversations": [{"from": "human", "value": "one two three"}, {"from": "gpt", "value": "four"}]},
        {"id": "b", "conversations": [{"from": "gpt", "value": "who is first"}, {"from": "human", "value": "me"}]},
        {"id": "c", "conversations": [{"from": "human", "value": "alone"}]},
    ]
    file = write(tmp_path, json.dumps(said))
    assert load_trace(file, "sharegpt", words) == [RequestSpec(0.0, 3, 1, session="a")]
    with pytest.raises(WorkloadError, match="tokenizer"):
        load_trace(file, "sharegpt")


def test_a_recorded_run_replays_with_its_shared_prefixes(tmp_path: Path) -> None:
    rows = [
        {"arrival": 101.0, "prompt_tokens": 20, "output_tokens": 3, "block_hashes": ["ff" * 32]},  # finished first
        {"arrival": 100.5, "prompt_tokens": 40, "output_tokens": 7, "block_hashes": ["ff" * 32, "0a" * 32]},
        {"arrival": 102.0, "prompt_tokens": 20, "output_tokens": 0},
    ]
    first, second = load_trace(write(tmp_path, "\n".join(map(json.dumps, rows))), "kvarn")
    assert (first.arrival, second.arrival) == (0.0, 0.5)
    assert (first.prompt_tokens, second.output_tokens) == (40, 3)
    assert first.prefix_ids[:1] == second.prefix_ids
    assert first.prefix_block_tokens == 16


def _with_segments(segments: str) -> str:
    return f'{{"arrival": 1.0, "prompt_tokens": 4, "output_tokens": 5, "segments": {segments}}}\n'


def test_segments_and_rounds_are_replayed(tmp_path: Path) -> None:
    """Equal hashes are equal tokens wherever they stand; where nothing is told of parts there are none."""

    def row(own: int, *hashes: str) -> dict[str, Any]:
        shared = [{"kind": "shared", "tokens": 16, "hash": hash, "id": "x"} for hash in hashes]
        parts = [{"kind": "private", "tokens": own}, *shared, {"kind": "task", "tokens": 4}]
        told = {"segments": parts, "round": {"id": "r", "size": 2, "agent": str(own)}}
        return {"arrival": 1.0, "prompt_tokens": own + 16 * len(hashes) + 4, "output_tokens": 3} | told

    rows = [row(5, "aa" * 16, "bb" * 16), row(9, "bb" * 16), {"arrival": 2.0, "prompt_tokens": 20, "output_tokens": 1}]
    first, second, plain = load_trace(write(tmp_path, "\n".join(map(json.dumps, rows))), "kvarn")
    assert [part.segment for part in second.segments] == [
        Segment("private", 9), Segment("shared", 16, "x"), Segment("task", 4)
    ]  # fmt: skip
    assert (first.round, second.round) == (RoundHint("r", 2, "5"), RoundHint("r", 2, "9"))
    assert plain.segments == () and plain.round is None
    one, other = prompt_tokens(first, 0, 1000), prompt_tokens(second, 1, 1000)
    assert one[21:37].tolist() == other[9:25].tolist() != one[5:21].tolist()
    assert one[:5].tolist() != other[:5].tolist()


@pytest.mark.parametrize(
    ("format", "text", "said"),
    [
        ("mooncake", '{"timestamp": 0}\n', r"line 1: no field 'output_length'"),
        ("mooncake", '{"timestamp": 0, "input_length": 5, "output_length": 1}\n{broken\n', "line 2 is not JSON"),
        ("mooncake", "[1, 2]\n", "line 1 holds a list"),
        ("mooncake", '{"timestamp": "x", "input_length": 5, "output_length": 1}\n', "line 1"),
        ("kvarn", '{"arrival": 1.0, "prompt_tokens": 0, "output_tokens": 5}\n', "line 1: a request of 0 prompt"),
        ("kvarn", _with_segments('[{"kind": "shared", "tokens": 3}]'), r"line 1: segments of \[3\] tokens"),
        ("kvarn", _with_segments('[{"kind": "public", "tokens": 4}]'), "line 1: Invalid enum value 'public'"),
        ("azure", "time,in,out\n1,2,3\n", "line 2: no field 'TIMESTAMP'"),
        ("azure", "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n", "line 2: Invalid isoformat"),
        ("burstgpt", "Timestamp,Request tokens,Response tokens\n1,many,2\n", "line 2"),
        ("sharegpt", "{}", "holds a dict"),
        ("sharegpt", "[", "cannot read"),
        ("vidur", "", "expected one of mooncake"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, format: str, text: str, said: str) -> None:
    with pytest.raises(WorkloadError, match=said):
        load_trace(write(tmp_path, text), format, words)


@pytest.mark.parametrize("format", FORMATS)
def test_a_missing_or_binary_file_is_named(tmp_path: Path, format: str) -> None:
    with pytest.raises(WorkloadError, match="cannot read"):
        load_trace(tmp_path / "absent", format, words)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(WorkloadError, match="cannot read"):
        load_trace(tmp_path / "binary", format, words)


@pytest.mark.skipif(not (REAL_TRACES / "mooncake_conversation.jsonl").exists(), reason="the real traces are not here")
def test_the_published_traces_load_whole() -> None:
    mooncake = load_trace(REAL_TRACES / "mooncake_conversation.jsonl", "mooncake")
    azure = load_trace(REAL_TRACES / "azure_2023_code.csv", "azure")
    assert len(mooncake) == 12_031
    assert len(azure) == 8_819
    assert 3_500 < mooncake[-1].arrival < 3_600
    assert 3_400 < azure[-1].arrival < 3_500


@pytest.mark.parametrize(
    ("text", "format"),
    [
        ('{"timestamp": 0, "input_length": 6, "output_length": 5, "hash_ids": []}', "mooncake"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens", "azure"),
        ("\ufeffTimestamp,Model,Request tokens,Response tokens", "burstgpt"),
        ('{"id": "a", "arrival": 1.0, "prompt_tokens": 4}', "kvarn"),
        ('[{"id": "a"}]', "sharegpt"),
    ],
)
def test_a_format_is_known_by_its_first_line(tmp_path: Path, text: str, format: str) -> None:
    assert detect_format(write(tmp_path, text + "\n")) == format


def test_an_unknown_format_asks_for_its_name(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="name its format"):
        detect_format(write(tmp_path, "hello"))
