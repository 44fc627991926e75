"""Many agents on a small pool of a real server, and clients that vanish while their tools run."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.conftest import ServerProcess, serve, wait_until


@pytest.fixture(scope="module")
def small() -> Iterator[ServerProcess]:
    """Room for a few conversations."""
    with serve("--policy", "agentic", "--kv-memory", "16MiB", "--host-memory", "32MiB") as running:
        yield running


def ask(server: ServerProcess, prompt: str, program: str, *, retain: float = 0.0) -> httpx.Response:
    hints = {"agent": {"program": program, "agent": "worker", "tool_seconds": 1}, "actions": []}
    if retain:
        hints["actions"] = [{"verb": "retain", "seconds": retain}]  # type: ignore[assignment]
    body = {"prompt": prompt, "max_tokens": 4, "temperature": 0, "kv_hints": hints}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)


def event(server: ServerProcess, **fields: object) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/agents/events", json=fields, timeout=60)


def is_idle(server: ServerProcess) -> bool:
    return server.metric("kvarn_agent_calls") == 0 and server.metric("kvarn_agent_held_blocks") == 0


def test_fifty_agents_with_tools_on_a_small_pool_all_end(small: ServerProcess) -> None:
    def run(number: int) -> list[int]:
        prompt, codes = f"Agent {number} counts: " + "one two three four five six seven eight " * 4, []
        first = ask(small, prompt, f"p{number}")
        codes.append(first.status_code)
        id = first.json()["id"]
        codes.append(event(small, type="call_start", request=id, tool="wait", seconds=1).status_code)
        codes.append(event(small, type="call_finish", request=id).status_code)
        codes.append(ask(small, prompt + first.json()["choices"][0]["text"] + " and", f"p{number}").status_code)
        codes.append(event(small, type="close", program=f"p{number}").status_code)
        return codes

    with ThreadPoolExecutor(50) as pool:
        assert list(pool.map(run, range(50))) == [[200] * 5] * 50
    wait_until(lambda: is_idle(small), "nothing is held any more")
    assert httpx.get(f"{small.url}/v1/agents", timeout=30).json()["calls"] == {}


def test_a_client_that_vanishes_while_its_tool_runs_keeps_nobody_out(small: ServerProcess) -> None:
    """Ten conversations are held for clients that never come back: the others are served, these time out."""
    for number in range(10):
        held = ask(small, f"Held {number}: " + "red green blue yellow " * 40, f"gone {number}", retain=3)
        assert held.status_code == 200
    assert ask(small, "A large question: " + "why and how and when " * 60, "still here").status_code == 200
    wait_until(lambda: is_idle(small), "what was held is let go")
