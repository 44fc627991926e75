"""Faults caused on purpose: clients that vanish, an engine that is killed, a server that is told to stop."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
from pathlib import Path

import httpx
import pytest

from tests.conftest import ServerProcess, serve, wait_until


def _body(tokens: int, *, stream: bool = True, text: str = "Tell me a story.") -> dict[str, object]:
    return {"model": "smollm2", "prompt": text, "max_tokens": tokens, "stream": stream, "ignore_eos": True}


def _pool_is_empty(server: ServerProcess) -> bool:
    return (
        server.metric("kvarn_kv_blocks", state="active") == 0
        and server.metric("kvarn_sequences_running") == 0
        and server.metric("kvarn_sequences_waiting") == 0
    )


async def _vanish(client: httpx.AsyncClient, rng: random.Random) -> None:
    """Start a request and leave it: before, between or after its first tokens."""
    stream = rng.random() < 0.7
    body = _body(200, stream=stream, text="word " * rng.randint(1, 60))
    patience = rng.choice([0.0, 0.02, 0.1, 0.3])
    try:
        async with asyncio.timeout(patience + 0.01):
            if not stream:
                await client.post("/v1/completions", json=body)
                return
            async with client.stream("POST", "/v1/completions", json=body) as response:
                wanted = rng.randint(0, 3)
                async for _ in response.aiter_lines():
                    wanted -= 1
                    if wanted <= 0:
                        return
    except (TimeoutError, httpx.HTTPError):
        pass


async def _storm(server: ServerProcess, waves: int) -> None:
    """Waves of 40 clients, all of whom leave."""
    rng = random.Random(3)
    limits = httpx.Limits(max_connections=64, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as client:
        for _ in range(waves):
            await asyncio.gather(*(_vanish(client, rng) for _ in range(40)))


def test_a_thousand_vanished_clients_leave_the_pool_empty(server: ServerProcess):
    asyncio.run(_storm(server, 25))
    wait_until(lambda: _pool_is_empty(server), "no block is held and nothing runs")
    answer = httpx.post(f"{server.url}/v1/completions", json=_body(3, stream=False), timeout=60)
    assert answer.json()["usage"]["completion_tokens"] == 3


def test_clients_that_vanish_while_kv_moves_between_three_small_tiers_harm_nobody(tmp_path: Path):
    """Those who stay, too many for the device, read the texts that they would have read alone."""
    flags = ("--precision", "float32", "--block-size", "8", "--kv-memory", "12MiB", "--host-memory", "16MiB")
    bodies = [{**_body(60, stream=False, text=text), "temperature": 0} for text in ("A story:", "A song:", "A letter:")]

    async def answer(client: httpx.AsyncClient, body: dict[str, object]) -> str:
        response = await client.post("/v1/completions", json=body)
        return str(response.json()["choices"][0]["text"])

    async def one_by_one(url: str) -> list[str]:
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            return [await answer(client, body) for body in bodies]

    async def beside_a_storm(server: ServerProcess) -> list[str]:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            staying = asyncio.gather(*(answer(client, body) for body in bodies))
            await _storm(server, 2)
            return await staying

    with serve(*flags, "--disk-cache", str(tmp_path), "--disk-memory", "16MiB") as server:
        alone = asyncio.run(one_by_one(server.url))
        assert asyncio.run(beside_a_storm(server)) == alone
        wait_until(lambda: _pool_is_empty(server), "no block is held and nothing runs")
        assert server.metric("kvarn_kv_to_host_bytes_total") > 0 and server.metric("kvarn_kv_to_disk_bytes_total") > 0
        assert server.metric("kvarn_engine_restarts_total") == 0, server.log.read_text()


def test_half_a_request_and_a_reset_connection_do_no_harm(server: ServerProcess):
    host, port = server.url.removeprefix("http://").split(":")
    for data in (b"", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{", b"\x00\xff" * 50):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(data)
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_killed_engine_fails_its_requests_and_the_next_one_is_served(tmp_path: Path):
    with serve("--kv-memory", "64MiB") as server, server.client() as client:
        with client.stream("POST", "/v1/completions", json=_body(2000)) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            os.kill(server.engine_pid(), signal.SIGKILL)
            rest = [line for line in lines if line.startswith("data: ")]
        error = json.loads(rest[-1].removeprefix("data: "))["error"]
        assert error["message"] and "[DONE]" not in rest[-1]
        assert client.get("/health").status_code == 503
        answer = client.post("/v1/completions", json=_body(3, stream=False), timeout=120)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 3
        assert client.get("/health").status_code == 200
        assert server.metric("kvarn_engine_restarts_total") == 1


def test_sigterm_drains_then_exits_zero():
    with serve("--kv-memory", "64MiB") as server, server.client() as client:
        with client.stream("POST", "/v1/completions", json=_body(60)) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: httpx.get(f"{server.url}/ready").status_code == 503, "not ready while it drains")
            refused = httpx.post(f"{server.url}/v1/completions", json=_body(3))
            assert refused.status_code == 503 and "retry-after" in refused.headers
            data = [line for line in lines if line]
        assert data[-1] == "data: [DONE]"
        assert server.process.wait(60) == 0


def test_overload_is_refused_with_retry_after():
    async def burst(url: str) -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            return await asyncio.gather(
                *(client.post("/v1/completions", json=_body(20, stream=False)) for _ in range(30))
            )

    with serve("--kv-memory", "64MiB", "--max-running", "2", "--max-queued", "4") as server:
        answers = asyncio.run(burst(server.url))
        codes = {answer.status_code for answer in answers}
        assert codes == {200, 429}, server.log.read_text()
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        wait_until(lambda: _pool_is_empty(server), "the pool is empty")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["no-such-model"], "no-such-model"),
        (["--kv-memory", "1KiB"], "--kv-memory"),
        (["--kv-memory", "lots"], "--kv-memory"),
        (["--kv-memory", "900TiB", "--max-running", "4096", "--block-size", "4096"], "free"),
        (["--token-budget", "0"], "token_budget"),
    ],
)
def test_a_server_that_cannot_start_says_why(flags: list[str], message: str):
    model = flags.pop(0) if not flags[0].startswith("-") else "smollm2"
    with serve(*flags, model=model, wait=False) as server:
        assert server.process.wait(60) == 2
        log = server.log.read_text()
        assert message in log and "Traceback" not in log


def test_port_in_use_is_said_before_the_model_loads(server: ServerProcess):
    port = server.url.rsplit(":", 1)[1]
    with serve("--port", port, wait=False) as second:
        assert second.process.wait(30) == 2
        assert port in second.log.read_text()
