"""/v1/streams over the stand-in engine, and the page that shows it: who may ask, what it costs, what may be loaded."""

from __future__ import annotations

import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from kvarn.serving.api.pages import HEADERS
from kvarn.serving.api.speed import Speed
from tests.conftest import wait_until
from tests.serving.api.conftest import Server

SLOW = {"KVARN_STANDIN_STEP": "0.01"}


def test_streams_are_told_in_numbers_and_without_their_text(start: Any) -> None:
    with start(SLOW) as server, server.http() as http:
        stream = server.openai().completions.create(
            model="smollm2",
            prompt="nobody else's business ",
            max_tokens=900,
            stream=True,
            extra_body={"ignore_eos": True, "stream_rate": 7},
        )
        id = next(iter(stream)).id
        answer = http.get("/v1/streams")
        (told,) = answer.json()["data"]
        assert told["id"].startswith(id) and told["rate"] == 7 and told["output_tokens"] > 0
        assert told["blocks"] == {"needed": 4, "device": 3, "host": 2, "disk": 1}
        assert answer.json()["streams"] == {"total": 1, "waiting": 0, "loading": 0, "running": 1, "paused": 0}
        assert answer.json()["model"] == "smollm2" and "business" not in answer.text
        stream.close()
        wait_until(lambda: http.get("/v1/streams").json()["data"] == [], "who has gone is not told any more")


@pytest.mark.parametrize("limit", ["0", "1001", "-1", "many", "", "1.5", "٣", "9" * 5000])
def test_a_limit_that_is_none_is_refused(server: Server, limit: str) -> None:
    with server.http() as http:
        answer = http.get("/v1/streams", params={"limit": limit})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "limit"


def test_only_who_has_a_key_sees_streams_while_the_page_itself_is_open(start: Any) -> None:
    with start(api_keys=["a"]) as server, server.http() as http:
        assert http.get("/v1/streams").status_code == 401
        assert http.get("/v1/streams", headers={"authorization": "Bearer b"}).status_code == 401
        assert http.get("/v1/streams", headers={"authorization": "Bearer a"}).status_code == 200
        assert http.get("/dashboard").status_code == 200


def test_the_engine_is_asked_a_few_times_a_second_whatever_the_number_of_watchers(start: Any) -> None:
    with start() as server, ThreadPoolExecutor(16) as watchers, server.http() as http:
        answers = list(watchers.map(lambda _: http.get("/v1/streams?limit=5").status_code, range(300)))
        assert answers == [200] * 300
        assert len(server.engine_log("watch")) < 100
        assert http.get("/v1/streams?limit=500").status_code == 200
        assert server.engine_log("watch")[-1]["limit"] == 500  # a shorter answer would not do


def test_a_watcher_hears_when_the_engine_is_gone_or_too_busy_to_answer(start: Any) -> None:
    with start() as server, server.http() as http, ThreadPoolExecutor(1) as other:
        (engine,) = server.wait_for("start")
        os.kill(engine["pid"], signal.SIGSTOP)
        asked = other.submit(http.get, "/v1/streams")
        with server.http() as another:
            assert another.get("/v1/models").status_code == 200
        wait_until(asked.running, "the question is asked")
        os.kill(engine["pid"], signal.SIGKILL)
        answer = asked.result()
        assert answer.status_code == 503 and "retry-after" in answer.headers
        server.wait_for("start", 2)
        wait_until(lambda: http.get("/v1/streams").status_code == 200, "the next engine answers")


def test_the_page_is_whole_and_may_load_nothing_from_elsewhere(server: Server) -> None:
    with server.http() as http:
        seen, left = set(), ["/dashboard"]
        while left:
            path = left.pop()
            answer = http.get(path)
            assert answer.status_code == 200, path
            assert {name: answer.headers[name] for name in HEADERS} == HEADERS
            assert answer.headers["content-type"].startswith(("text/html", "text/css", "text/javascript", "image/svg"))
            seen.add(path)
            found = re.findall(r'(?:src|href)="([^"#]+)"|from "\./([^"]+)"', answer.text)
            parts = {f"/{named}" if named else f"/pages/{beside}" for named, beside in found}
            left += parts - seen
            assert "http://" not in answer.text.replace("http://www.w3.org/2000/svg", "") and "//cdn" not in answer.text
            assert "innerHTML" not in answer.text and not re.search(r"<script>|\son\w+=|style=", answer.text)
        assert len(seen) == 11
    assert "unsafe" not in HEADERS["Content-Security-Policy"]
    assert HEADERS["Content-Security-Policy"].startswith("default-src 'none'")


def test_the_server_says_where_its_dashboard_is(server: Server) -> None:
    assert f"{server.url}/dashboard" in server.output()
    assert httpx.get(f"{server.url}/dashboard/../pages/../../pyproject.toml").status_code == 404


def test_speed_is_that_of_the_last_two_seconds() -> None:
    speed = Speed()
    assert speed.rate(5.0) == 0
    for tenth in range(101):
        speed.note(10 + tenth / 10, 3 * tenth)
    assert speed.rate(20.0) == pytest.approx(30)
    assert speed.rate(21.0) == pytest.approx(15, rel=0.1)
    assert speed.rate(23.0) == 0
