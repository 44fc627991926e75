"""Shared by all tests: the real model, a server in its own process, the reference implementation."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
from hypothesis import settings

# How long an example takes says something of the machine and its other guests, nothing of the code.
settings.register_profile("kvarn", deadline=None)
settings.load_profile("kvarn")

# Triton decides when it is imported. Without a GPU its interpreter runs the CUDA kernels on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

MODEL = "smollm2"


@dataclass
class ServerProcess:
    """A running `kvarn serve`."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def client(self, **settings: object) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **settings)  # type: ignore[arg-type]

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples of one metric whose labels match."""
        total = 0.0
        for line in httpx.get(f"{self.url}/metrics").text.splitlines():
            key, _, value = line.rpartition(" ")
            if key.partition("{")[0] == name and all(f'{k}="{v}"' in key for k, v in labels.items()):
                total += float(value)
        return total

    def engine_pid(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for pid in children:
            if b"engine_process" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return int(pid)
        raise AssertionError(f"no engine among the children of the server:\n{self.log.read_text()}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    """Poll until `condition()`; for events of other processes, which no virtual clock reaches."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


@contextmanager
def serve(*flags: str, model: str = MODEL, wait: bool = True) -> Iterator[ServerProcess]:
    """`kvarn serve MODEL FLAGS` on a free port; stopped at the end however the test went."""
    port = free_port()
    command = [sys.executable, "-m", "kvarn.cli.main", "serve", model, "--port", str(port), *flags]
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "KVARN_CHECK": "1"})
        server = ServerProcess(process, f"http://127.0.0.1:{port}", Path(log.name))
        try:
            if wait:
                wait_until(
                    lambda: process.poll() is not None or _answers(f"{server.url}/ready"), "the server is ready", 120
                )
                assert process.poll() is None, f"the server ended:\n{server.log.read_text()}"
            yield server
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()
                    raise


@pytest.fixture(scope="session")
def model_folder() -> Path:
    """The default model as a Hugging Face folder."""
    from kvarn.models.sources import resolve

    return resolve(MODEL).folder


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    """One server for all tests that do it no harm. In float32: near ties must not decide what a test reads."""
    with serve("--kv-memory", "512MiB", "--precision", "float32") as running:
        yield running


@pytest.fixture
def three_threads() -> Iterator[None]:
    """Kernels share their work among three threads during the test."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)
