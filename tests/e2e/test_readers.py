"""Readers and their server, over sockets: who is believed to read how fast, and what is sent when.

One server, small and in float32, that schedules by its readers and sends tokens as they are read.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvarn.serving.api.pacing import LEAD
from tests.conftest import ServerProcess, serve, wait_until

SLOW = {"Authorization": "Bearer key-of-slow-readers"}
OTHER = {"Authorization": "Bearer key-of-others"}
SMALL = ("--precision", "float32", "--kv-memory", "24MiB", "--host-memory", "256MiB", "--max-stream-rate", "60")
"""34 blocks of 16 tokens on the device."""


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    keys: Path = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text("key-of-slow-readers 6\nkey-of-others\n")
    with serve("--policy", "streaming", "--pace", "--api-key-file", str(keys), *SMALL) as server:
        yield server


def body(tokens: int, **fields: Any) -> dict[str, Any]:
    return {"prompt": "Once upon a time", "max_tokens": tokens, "ignore_eos": True, "temperature": 0, **fields}


def streams(server: ServerProcess) -> dict[str, Any]:
    told: dict[str, Any] = httpx.get(f"{server.url}/v1/streams", headers=OTHER, timeout=30).json()
    return told


def texts(response: httpx.Response) -> Iterator[tuple[str, str]]:
    """Each chunk's id and text."""
    for line in response.iter_lines():
        if line.startswith("data: {"):
            chunk = json.loads(line.removeprefix("data: "))
            yield chunk["id"], chunk["choices"][0]["text"]


def rate_of(server: ServerProcess, id: str) -> float:
    """What the engine believes of this stream. What the server tells of streams may be a fifth of a second old."""
    found: list[dict[str, Any]] = []

    def told() -> bool:
        found[:] = [one for one in streams(server)["data"] if one["id"].startswith(id)]
        return len(found) == 1

    wait_until(told, f"{id} is among the streams")
    return float(found[0]["rate"])


@pytest.mark.parametrize(
    ("key", "header", "field", "believed"),
    [(SLOW, None, 1000, 6), (SLOW, "50", None, 6), (SLOW, None, None, 6), (SLOW, "50", 3, 3), (OTHER, "1000", None, 60),
     (OTHER, None, 1000, 60), (OTHER, "12", None, 12), (OTHER, None, None, 20)],
)  # fmt: skip
def test_a_reader_is_believed_up_to_what_his_key_allows(readers: ServerProcess, key, header, field, believed):
    headers = {**key, **({"X-Stream-Rate": header} if header else {})}
    asked = body(400, stream=True, **({"stream_rate": field} if field else {}))
    with readers.client(headers=headers) as http, http.stream("POST", "/v1/completions", json=asked) as response:
        chunks = texts(response)  # named, since a forgotten generator would close the response
        id, _ = next(chunks)
        assert rate_of(readers, id) == believed
    wait_until(lambda: streams(readers)["streams"]["total"] == 0, "he has left")


def test_who_says_how_far_he_is_changes_how_fast_he_is_believed_to_read(readers: ServerProcess):
    """He had said nothing, so 20 tokens a second; then he tells of eight."""
    with (
        readers.client(headers=OTHER) as http,
        http.stream("POST", "/v1/completions", json=body(400, stream=True)) as r,
    ):
        chunks = texts(r)
        id, _ = next(chunks)

        began, received, seen = time.monotonic(), 1, [rate_of(readers, id)]
        for _ in chunks:
            received += 1
            read = min(received - 1, int(8 * (time.monotonic() - began)))
            with readers.client(headers=OTHER) as other:
                assert other.post(f"/v1/streams/{id}/read", json={"tokens": read}).status_code == 200
            seen.append(rate_of(readers, id))
            if seen[-1] <= 15:  # halfway from 20 to eight, or to fewer where the server makes fewer
                break
        assert seen[0] == 20 and seen[-1] <= 15, seen


def test_nothing_is_sent_a_second_before_it_is_read(readers: ServerProcess):
    rate, tokens = 20.0, 60
    with readers.client(headers=OTHER) as http:
        whole = http.post("/v1/completions", json=body(tokens)).json()["choices"][0]["text"]
        asked, times, text = body(tokens, stream=True, stream_rate=rate), [], ""
        with http.stream("POST", "/v1/completions", json=asked) as response:
            for _, piece in texts(response):
                times.append(time.monotonic())
                text += piece
    assert text == whole
    # The last token is read (tokens - 1) / rate after the first; chunks may hold several tokens, or come late.
    assert times[-1] - times[0] >= (tokens - 1) / rate - LEAD - 0.2
