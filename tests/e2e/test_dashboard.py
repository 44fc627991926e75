"""/v1/streams and the dashboard over the real model, with twice the readers that the KV cache has room for."""

from __future__ import annotations

import os
import random
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.conftest import ServerProcess, serve, wait_until

if TYPE_CHECKING:
    from playwright.sync_api import Page

KEY = "a key of the tests"
AUTHORISED = {"Authorization": f"Bearer {KEY}"}
SMALL = ("--kv-memory", "24MiB", "--host-memory", "256MiB")
"""About 128 blocks of 16 tokens on the device: room for five of the streams below."""


@pytest.fixture(scope="module")
def busy() -> Iterator[ServerProcess]:
    with serve("--policy", "streaming", "--api-key", KEY, *SMALL) as server:
        yield server


@contextmanager
def readers(server: ServerProcess, count: int, tokens: int) -> Iterator[list[threading.Thread]]:
    """So many streams of different prompts, read while inside as fast as they come; they end by themselves."""
    rng = random.Random(7)
    prompts = [[rng.randrange(1000, 20_000) for _ in range(200)] for _ in range(count)]
    stop = threading.Event()

    def read(prompt: list[int]) -> None:
        body = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True, "stream_rate": 5}
        with server.client(headers=AUTHORISED) as http, http.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            for _ in answer.iter_lines():
                if stop.is_set():
                    return

    threads = [threading.Thread(target=read, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    try:
        yield threads
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def streams(server: ServerProcess) -> dict[str, Any]:
    answer = httpx.get(f"{server.url}/v1/streams", headers=AUTHORISED, timeout=30)
    assert answer.status_code == 200
    told: dict[str, Any] = answer.json()
    return told


def check(told: dict[str, Any]) -> None:
    """Each stream is in one state, and no tier has more than it holds."""
    data, counts, blocks = told["data"], told["streams"], told["blocks"]
    assert counts["total"] == len(data) == counts["waiting"] + counts["loading"] + counts["running"]
    for state in ("waiting", "loading", "running"):
        assert counts[state] == sum(stream["state"] == state for stream in data)
    assert counts["paused"] == sum(stream["paused"] for stream in data)
    held = sum(stream["blocks"]["device"] for stream in data if stream["state"] == "running")
    assert held <= blocks["device"]["used"] - blocks["device"]["cached"] <= blocks["device"]["total"]
    for tier in ("host", "disk"):
        assert sum(stream["blocks"][tier] for stream in data) <= blocks[tier]["used"] <= blocks[tier]["total"]
    for stream in data:
        tokens = stream["prompt_tokens"] + stream["output_tokens"]
        assert (stream["blocks"]["needed"] - 1) * 16 < tokens <= stream["blocks"]["needed"] * 16
        assert max(stream["blocks"].values()) <= stream["blocks"]["needed"] + 1
        assert 0 <= stream["unread_tokens"] <= stream["output_tokens"]


def test_states_and_blocks_add_up_while_streams_are_moved_to_the_host_and_back(busy: ServerProcess):
    seen: list[dict[str, Any]] = []
    with readers(busy, 10, 120) as reading:
        wait_until(lambda: streams(busy)["streams"]["total"] == 10, "all have come")
        while any(thread.is_alive() for thread in reading):
            check(told := streams(busy))
            seen += told["data"]
    moved = [stream for stream in seen if stream["state"] == "waiting" and stream["preemptions"]]
    assert any(stream["blocks"]["host"] > stream["blocks"]["device"] for stream in moved), "some lived on the host"
    assert any(stream["state"] == "running" and stream["preemptions"] for stream in seen), "and came back"
    wait_until(lambda: streams(busy)["streams"]["total"] == 0, "nobody is left")
    left = streams(busy)
    assert left["data"] == [] and left["blocks"]["device"]["used"] == left["blocks"]["device"]["cached"]
    assert left["blocks"]["host"]["used"] == left["blocks"]["host"]["cached"]
    assert left["copy_bytes_per_second"]["to_host"] > 0


# ---- in a browser ----------------------------------------------------------------------------------------


def give_key(page: Page, key: str) -> None:
    page.get_by_label("API key").fill(key)
    page.get_by_role("button").click()


@pytest.mark.browser
def test_the_page_shows_each_streams_buffer_and_where_its_kv_lives(busy: ServerProcess, page: Page):
    from playwright.sync_api import expect

    page.goto(f"{busy.url}/dashboard")
    expect(page.get_by_role("status")).to_have_text("needs an API key")
    give_key(page, "a wrong one")
    expect(page.get_by_role("status")).to_have_text("the API key was not accepted")
    expect(page.locator("#board")).to_be_hidden()
    give_key(page, KEY)
    expect(page.get_by_role("status")).to_have_text("live")
    expect(page.locator("#empty")).to_contain_text(f"curl -N {busy.url}/v1/completions")
    expect(page.locator("#agents-none")).to_contain_text("tracks no agents")
    expect(page.locator("#agents-area")).to_be_hidden()

    rows = page.locator("#streams tr")
    with readers(busy, 10, 400):
        expect(rows).to_have_count(10, timeout=30_000)
        expect(page.locator("#empty")).to_be_hidden()
        buffer, places = rows.first.locator(".words"), rows.first.locator("[aria-label*='on the host']")
        expect(buffer).to_contain_text("unread", timeout=30_000)
        before = buffer.inner_text(), places.get_attribute("aria-label")
        expect(buffer).not_to_have_text(before[0])
        expect(places).not_to_have_attribute("aria-label", before[1], timeout=30_000)
        # Somebody's KV is, for the most part, on the host alone; and the bar is drawn so.
        page.wait_for_function(
            "() => [...document.querySelectorAll('#streams .bar .host')].some((part) => part.offsetWidth > 50)",
            timeout=30_000,
        )
        expect(page.locator("#waiting")).not_to_have_text("0", timeout=30_000)
        expect(page.locator("#tier-host")).not_to_contain_text("0 of")
        expect(page.locator("#chart polyline.running")).to_have_attribute("points", re.compile(r"\d+,\d+.* \d"))
        page.get_by_label("order").select_option("urgency")
        expect(rows.first).to_be_visible()
    expect(rows).to_have_count(0, timeout=30_000)
    expect(page.locator("#empty")).to_be_visible()


@pytest.mark.browser
def test_the_page_says_when_the_server_is_gone_and_comes_back_with_it(page: Page):
    from playwright.sync_api import expect

    with serve("--policy", "agentic", "--kv-memory", "64MiB") as server:
        page.goto(f"{server.url}/dashboard")
        expect(page.get_by_role("status")).to_have_text("live")
        program = {"prompt": "Once", "max_tokens": 2, "kv_hints": {"agent": {"program": "lost"}}}
        assert httpx.post(f"{server.url}/v1/completions", json=program, timeout=60).status_code == 200
        expect(page.locator(".program")).to_have_count(1)
        os.kill(server.engine_pid(), 9)
        expect(page.get_by_role("status")).to_contain_text("engine")
        expect(page.get_by_role("status")).to_have_text("live", timeout=60_000)
        expect(page.locator(".program")).to_have_count(0)  # the engine of that program is gone
        expect(page.locator("#agents-area")).to_be_visible()
