"""Clients that vanish, engines that die, servers that are told to stop."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.conftest import wait_until
from tests.serving.api.conftest import Server

SLOW = {"KVARN_STANDIN_STEP": "0.01"}
ENDLESS: dict[str, Any] = {"prompt": "on and on ", "max_tokens": 900, "ignore_eos": True}


def kill_engine(server: Server) -> None:
    os.kill(server.engine_log("start")[-1]["pid"], signal.SIGKILL)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_vanishes_is_cancelled_at_once(start: Any, stream: bool) -> None:
    with start(SLOW) as server:
        host, port = server.url.removeprefix("http://").split(":")
        body = json.dumps(ENDLESS | {"stream": stream, "n": 2}).encode()
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            submitted = {line["id"] for line in server.wait_for("submit", 2)}
        assert {line["id"] for line in server.wait_for("cancel", 2)} == submitted
        wait_until(
            lambda: server.metric('kvarn_requests_total{endpoint="completions",outcome="client_gone"}') == 1, "counted"
        )


def test_requests_in_flight_fail_with_the_engine_and_the_next_is_served(start: Any) -> None:
    with start(SLOW) as server, server.http() as http, ThreadPoolExecutor(2) as pool:
        whole = pool.submit(httpx.post, f"{server.url}/v1/completions", json=ENDLESS, timeout=30)
        with http.stream("POST", "/v1/completions", json=ENDLESS | {"stream": True}) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.wait_for("submit", 2)
            kill_engine(server)
            events = [line.removeprefix("data: ") for line in lines if line]
        assert json.loads(events[-1])["error"]["code"] == "engine_dead"
        failed = whole.result()
        assert failed.status_code == 503 and failed.headers["retry-after"]
        assert failed.json()["error"]["code"] == "engine_dead"
        answer = server.openai().completions.create(model="smollm2", prompt="still here", max_tokens=9)
        assert answer.choices[0].text == "still here"
        assert server.metric("kvarn_engine_restarts_total") == 1
        assert http.get("/health").status_code == 200


def test_health_is_red_while_the_engine_is_dead(start: Any) -> None:
    with start(restart_wait=0) as server, server.http() as http:
        # Each death doubles the pause before the next start, so sooner or later it is long enough to be seen.
        def killed_and_seen() -> bool:
            kill_engine(server)
            starts = len(server.engine_log("start"))
            while len(server.engine_log("start")) == starts:
                if http.get("/health").status_code == 503:
                    refused = http.post("/v1/completions", json={"prompt": "x"})
                    assert refused.status_code == 200 or int(refused.headers["retry-after"]) >= 1
                    return True
            return False

        wait_until(killed_and_seen, "a red health check")
        wait_until(lambda: http.get("/health").status_code == 200, "the engine is back")


def test_an_engine_that_cannot_start_ends_the_server_with_its_message(start: Any) -> None:
    with start({"KVARN_STANDIN_START_FAILURE": "too little memory: buy more"}, wait=False) as server:
        assert server.process.wait(30) == 2
        assert "error: too little memory: buy more" in server.output()


def test_a_taken_port_is_told_before_the_model_is_loaded(start: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with start(port=taken.getsockname()[1], wait=False) as server:
            assert server.process.wait(30) == 2
            assert "--port" in server.output() and not server.engine_log("start")


def test_drain_finishes_what_runs_and_refuses_what_comes(start: Any) -> None:
    enough = {"max_tokens": 150, "stream": True, "stream_options": {"include_usage": True}}
    with start(SLOW) as server, server.http() as http, server.http() as other:
        with http.stream("POST", "/v1/completions", json=ENDLESS | enough) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: other.get("/ready").status_code == 503, "not ready any more")
            refused = other.post("/v1/completions", json={"prompt": "x"})
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
            assert other.get("/health").status_code == 200
            events = [line.removeprefix("data: ") for line in lines if line]
        assert events[-1] == "[DONE]" and json.loads(events[-2])["usage"]["completion_tokens"] == 150
        assert server.process.wait(30) == 0
        assert server.engine_log("shutdown")


def test_drain_cancels_what_does_not_finish(start: Any) -> None:
    with start(SLOW, drain_seconds=0.2) as server, server.http() as http:
        with http.stream("POST", "/v1/completions", json=ENDLESS | {"stream": True}) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGINT)
            events = [line.removeprefix("data: ") for line in lines if line]
        assert json.loads(events[-1])["error"]["code"] == "unavailable"
        assert server.process.wait(30) == 0


def test_a_second_signal_ends_at_once(start: Any) -> None:
    endless = ("POST", "/v1/completions")
    with (
        start(SLOW, drain_seconds=600) as server,
        server.http() as http,
        http.stream(*endless, json=ENDLESS | {"stream": True}) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{server.url}/ready").status_code == 503, "draining")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 1


def test_the_engine_ends_with_a_killed_server(start: Any) -> None:
    with start() as server:
        engine = server.engine_log("start")[0]["pid"]
        server.process.kill()

        def gone() -> bool:
            try:
                with open(f"/proc/{engine}/stat") as stat:  # noqa: PTH123
                    return stat.read().rpartition(")")[2].split()[0] == "Z"
            except FileNotFoundError:
                return True

        wait_until(gone, "the engine is gone")


def test_many_disconnects_leave_nothing_running(start: Any) -> None:
    with start() as server:
        host, port = server.url.removeprefix("http://").split(":")
        body = json.dumps(ENDLESS | {"stream": True}).encode()
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        )

        def ask_and_leave(number: int) -> None:
            with socket.create_connection((host, int(port)), timeout=30) as connection:
                connection.sendall(head % len(body) + body)
                if number % 2:
                    connection.recv(100)

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(ask_and_leave, range(200)))

        def quiet() -> bool:
            ended = {line["id"] for line in server.engine_log("cancel")}
            return {line["id"] for line in server.engine_log("submit")} == ended and len(ended) >= 100

        wait_until(quiet, "every request is cancelled")
        answer = server.openai().completions.create(model="smollm2", prompt="fine", max_tokens=5)
        assert answer.choices[0].text == "fine"


def test_retrying_clients_do_not_notice_a_dead_engine(start: Any) -> None:
    with start() as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=3, timeout=30)
        stop = threading.Event()
        texts: list[str] = []

        def ask() -> None:
            while not stop.is_set():
                texts.append(client.completions.create(model="smollm2", prompt="steady", max_tokens=9).choices[0].text)

        with ThreadPoolExecutor(4) as pool:
            asking = [pool.submit(ask) for _ in range(4)]
            wait_until(lambda: len(texts) > 20, "some answers")
            kill_engine(server)
            server.wait_for("start", 2)
            before = len(texts)
            wait_until(lambda: len(texts) > before + 20, "answers from the new engine")
            stop.set()
            for future in asking:
                future.result()
        assert set(texts) == {"steady"}


def test_a_temporary_folder_with_a_long_path_is_no_obstacle(start: Any, tmp_path: Path) -> None:
    """Sockets in files have short names only; the processes then speak over the loopback interface."""
    folder = tmp_path / ("long" * 25)
    folder.mkdir()
    with start({"TMPDIR": str(folder)}) as server:
        answer = server.openai().completions.create(model="smollm2", prompt="fine", max_tokens=5)
        assert answer.choices[0].text == "fine" and not list(folder.iterdir())
