"""The API process over a stand-in engine, in processes of their own, spoken to over real sockets."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.conftest import wait_until

SCRIPT = Path(__file__).with_name("serve_standin.py")


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str
    folder: Path

    def http(self, **settings: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, **settings)

    def openai(self, key: str = "none", **settings: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=30, **settings)

    def engine_log(self, event: str) -> list[dict[str, Any]]:
        """What the engine heard, oldest first."""
        path = self.folder / "engine.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in map(json.loads, lines) if line["event"] == event]

    def metric(self, line_start: str) -> float:
        for line in httpx.get(f"{self.url}/metrics").text.splitlines():
            if line.startswith(line_start + " "):
                return float(line.rpartition(" ")[2])
        return 0.0

    def wait_for(self, event: str, count: int = 1, **facts: Any) -> list[dict[str, Any]]:
        """The log's events of one kind, once there are `count` of them."""

        def matching() -> list[dict[str, Any]]:
            return [line for line in self.engine_log(event) if facts.items() <= line.items()]

        wait_until(lambda: len(matching()) >= count, f"{count} x {event}")
        return matching()

    def output(self) -> str:
        return (self.folder / "server.log").read_text()


@contextmanager
def running(environment: dict[str, str] | None = None, *, wait: bool = True, **config: Any) -> Iterator[Server]:
    """A server with these fields of ServerConfig; stopped at the end however the test went."""
    with tempfile.TemporaryDirectory() as name, open(f"{name}/server.log", "w") as log:  # noqa: PTH123
        folder = Path(name)
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), json.dumps({"port": 0} | config)],
            env=os.environ | {"KVARN_STANDIN_LOG": str(folder / "engine.jsonl"), "TMPDIR": name} | (environment or {}),
            stdout=log,
            stderr=log,
            text=True,
        )
        server = Server(process, "", folder)
        try:
            if wait:
                wait_until(lambda: process.poll() is not None or "/v1" in server.output(), "the server is ready")
                found = re.search(r"(http://\S+)/v1", server.output())
                assert found, server.output()
                server.url = found[1]
            yield server
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


@pytest.fixture
def start() -> Callable[..., Any]:
    """Starts servers of a test's own, for tests that need settings or do harm."""
    return running


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One server for the tests of a module that do it no harm."""
    with running() as shared:
        yield shared


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return server.openai()
