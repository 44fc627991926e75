"""Who is measured: each system in each precision it offers, and the class that precision competes in.

A class is what the weights of the matrices are stored as: 16 bits ("bf16"), 8 bits ("8-bit") or 4 ("4-bit").
Names of contenders are the keys of the results; `benchmarks.render` shows their labels.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from benchmarks import model, peers


@dataclass(frozen=True)
class Contender:
    """One system in one precision."""

    system: str
    """Module in `benchmarks/adapters`, and the environment it runs in."""
    weights: str
    """The class it competes in."""
    label: str
    source: str = "folder"
    """What it loads: "folder" (Hugging Face), "onnx", or a kind of `model.gguf_file`."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Passed on to its adapter."""
    batches_up_to: int = 64
    """Larger batches are left out: there it is far behind other contenders, and slow to measure."""

    @property
    def is_installed(self) -> bool:
        return self.system not in peers.PEERS or peers.is_installed(self.system)

    def order(self, threads: int) -> dict[str, Any]:
        """What the adapter is told to load; makes the model's file on first use."""
        return {"model": str(model.path_of(self.source)), "threads": threads, **self.settings}


CONTENDERS = {
    "kvarn-bf16": Contender("kvarn", "bf16", "kvarn bf16", settings={"precision": "bfloat16"}),
    "kvarn-int8": Contender(
        "kvarn", "8-bit", "kvarn int8, int8 KV", settings={"precision": "int8", "kv_dtype": "int8"}
    ),
    "kvarn-int4": Contender(
        "kvarn", "4-bit", "kvarn int4, int8 KV", settings={"precision": "int4", "kv_dtype": "int8"}
    ),
    "vllm-bf16": Contender("vllm", "bf16", "vLLM (CPU) bf16"),
    "openvino-bf16": Contender("openvino", "bf16", "OpenVINO GenAI bf16", "f16", {"hint": "bf16"}),
    "openvino-8bit": Contender("openvino", "8-bit", "OpenVINO GenAI Q8_0", "q8_0"),
    "openvino-4bit": Contender("openvino", "4-bit", "OpenVINO GenAI Q4_1", "q4_1"),
    "onnx-4bit": Contender("onnx", "4-bit", "ONNX Runtime GenAI int4", "onnx", batches_up_to=32),
    "llamacpp-bf16": Contender("llamacpp", "bf16", "llama.cpp bf16", "bf16", batches_up_to=16),
    "llamacpp-8bit": Contender("llamacpp", "8-bit", "llama.cpp Q8_0", "q8_0", batches_up_to=16),
    "llamacpp-4bit": Contender("llamacpp", "4-bit", "llama.cpp Q4_1", "q4_1", batches_up_to=4),
    "transformers-bf16": Contender("transformers", "bf16", "transformers bf16", batches_up_to=4),
}

LONG_CONTEXT = {
    "kvarn-bf16": Contender(
        "kvarn", "bf16", "kvarn bf16, bf16 KV", settings={"precision": "bfloat16", "kv_dtype": "bfloat16"}
    ),
    "kvarn-int4": Contender(
        "kvarn", "4-bit", "kvarn int4, int8 KV", settings={"precision": "int4", "kv_dtype": "int8"}
    ),
    "kvarn-auto": Contender("kvarn", "auto", "kvarn, defaults"),
    "vllm-bf16": Contender("vllm", "bf16", "vLLM (CPU) bf16, bf16 KV", settings={"context": 8192}),
    "openvino-4bit": Contender("openvino", "4-bit", "OpenVINO GenAI Q4_1, u8 KV", "q4_1", {"share_prefixes": True}),
    "llamacpp-f16kv": Contender(
        "llamacpp", "bf16", "llama.cpp bf16, f16 KV", "bf16", {"kv": "f16", "copy_prefill": True}
    ),
    "llamacpp-q8kv": Contender(
        "llamacpp", "8-bit", "llama.cpp Q8_0, q8_0 KV", "q8_0", {"kv": "q8_0", "copy_prefill": True}
    ),
}


class Installed(Protocol):
    """A Contender or a Server."""

    @property
    def system(self) -> str: ...
    @property
    def is_installed(self) -> bool: ...


def chosen(names: Sequence[str] | None, table: Mapping[str, Installed]) -> list[str]:
    """The names asked for (a system's name means all of its precisions), or all that are installed."""
    if not names:
        missing = sorted({one.system for one in table.values() if not one.is_installed})
        for system in missing:
            print(f"{system} left out; to measure it: python -m benchmarks.peers install {system}", file=sys.stderr)
        return [name for name, one in table.items() if one.is_installed]
    found = [name for name, one in table.items() if name in set(names) or one.system in set(names)]
    if unknown := [name for name in names if name not in table and name not in {one.system for one in table.values()}]:
        raise SystemExit(f"nothing is called {', '.join(unknown)}; choose from {', '.join(table)} or a system's name")
    return found
