"""kvarn on one CUDA device: decode by batch and prefill by prompt length, each with and without CUDA graphs.

    python -m benchmarks.gpu                        Llama-3-8B's shape with random weights, then SmolLM2
    python -m benchmarks.gpu --precisions bfloat16 int8 int4
    python -m benchmarks.gpu --device cpu --quick   does everything but the GPU's part run?

Needs no network. The random weights (16 GB) are written once, below `--folder`. Beside each figure stands its share of
the roofline: of what the same run measured as the device's memory bandwidth and its bfloat16 GEMM rate. Results:
`benchmarks/results/gpu.json` and `.md`.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from benchmarks import render
from benchmarks.results import QUICK_FOLDER, Results
from safetensors.torch import save_file

from kvarn.bench.offline import Workload, kvarn_engine, measure
from kvarn.kernels import flashinfer, ops

LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "bos_token_id": 128000, "eos_token_id": 128001, "torch_dtype": "bfloat16",
}  # fmt: skip
SMALL = LLAMA_3_8B | {
    "vocab_size": 50000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WORKLOAD = Workload(
    batches=(1, 2, 4, 8, 16, 32, 64, 128), input_tokens=512, output_tokens=128, prefills=(512, 2048, 4096)
)
QUICK = Workload(batches=(1, 3), input_tokens=16, output_tokens=8, prefills=(64,), repeats=1)
WEIGHT_BYTES = {"bfloat16": 2.0, "int8": 1.0, "int4": 0.625}


@dataclass(frozen=True)
class Limits:
    """What the device gives at best, as measured here."""

    bytes_per_second: float
    """Read and written in a copy of a large tensor."""
    flops_per_second: float
    """In a product of large square bfloat16 matrices."""


def limits_of(device: torch.device, *, quick: bool) -> Limits:
    """Measure them: the best of ten."""
    source = torch.empty((2**22 if quick else 2**30), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    side = 256 if quick else 8192
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    copy_seconds = best_seconds(lambda: target.copy_(source), device)
    product_seconds = best_seconds(lambda: torch.mm(a, b), device)
    return Limits(2 * source.numel() / copy_seconds, 2 * side**3 / product_seconds)


def best_seconds(work: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for _ in range(10):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def linear_weights(config: dict[str, Any]) -> int:
    """Weights that every token is multiplied with, the head's among them."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    width = config.get("head_dim") or hidden // heads
    attention = (2 * heads + 2 * config["num_key_value_heads"]) * width * hidden
    layer = attention + 3 * hidden * config["intermediate_size"]
    return config["num_hidden_layers"] * layer + config["vocab_size"] * hidden


def kv_bytes_per_token(config: dict[str, Any]) -> int:
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return 2 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * width


def roofline_share(
    kind: str, size: int, rate: float, config: dict[str, Any], precision: str, limits: Limits, workload: Workload
) -> float:
    """Tokens/s as a share of what reading (weights once, keys and values once a token) and computing allow."""
    weights = linear_weights(config)
    if kind == "prefill":
        layer_weights = weights - config["vocab_size"] * config["hidden_size"]  # one row of all wants logits
        return rate * 2 * layer_weights / limits.flops_per_second
    context = workload.input_tokens + workload.output_tokens / 2
    step_bytes = weights * WEIGHT_BYTES[precision] + size * context * kv_bytes_per_token(config)
    step_seconds = max(step_bytes / limits.bytes_per_second, size * 2 * weights / limits.flops_per_second)
    return rate / size * step_seconds


def random_model(config: dict[str, Any], folder: Path, device: torch.device) -> Path:
    """A folder with config.json and random weights, one file a layer; kept when it is complete."""
    done = folder / "config.json"
    if done.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    hidden, middle, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    width = hidden // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    shapes = {
        "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries), "mlp.gate_proj": (middle, hidden), "mlp.up_proj": (middle, hidden),
        "mlp.down_proj": (hidden, middle),
    }  # fmt: skip
    norms = ("input_layernorm", "post_attention_layernorm")

    def random(shape: tuple[int, int]) -> torch.Tensor:
        return (torch.randn(shape, device=device) * 0.02).bfloat16().cpu()

    torch.manual_seed(0)
    files = {
        "outer": {"model.embed_tokens": random((vocab, hidden)), "lm_head": random((vocab, hidden)),
                  "model.norm": torch.ones(hidden, dtype=torch.bfloat16)},
    }  # fmt: skip
    index: dict[str, str] = {}
    for number in range(-1, config["num_hidden_layers"]):
        prefix = f"model.layers.{number}"
        tensors = files["outer"] if number < 0 else (
            {f"{prefix}.{name}": random(shape) for name, shape in shapes.items()}
            | {f"{prefix}.{name}": torch.ones(hidden, dtype=torch.bfloat16) for name in norms}
        )  # fmt: skip
        name = f"{number + 1:03}.safetensors"
        save_file({f"{key}.weight": tensor for key, tensor in tensors.items()}, folder / name)
        index |= {f"{key}.weight": name for key in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    done.write_text(json.dumps(config))
    return folder


def describe_device(device: torch.device) -> dict[str, Any]:
    about: dict[str, Any] = {
        "device": str(device), "torch": torch.__version__, "triton_kernels": ops.has_triton(),
        "flashinfer": flashinfer.is_installed(device),
    }  # fmt: skip
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}", "cuda": torch.version.cuda,
            "processors": properties.multi_processor_count,
        }  # fmt: skip
    return about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precisions", nargs="+", choices=list(WEIGHT_BYTES), default=["bfloat16"])
    parser.add_argument("--folder", type=Path, default=QUICK_FOLDER, help="where the random weights are kept")
    parser.add_argument("--quick", action="store_true", help="tiny settings, results to .cache/benchmarks")
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(
            f"benchmarks.gpu measures a CUDA device and torch {torch.__version__} sees none; "
            "`--device cpu --quick` only checks that it runs"
        )
    if not arguments.device.startswith("cuda") and not arguments.quick:
        raise SystemExit(f"benchmarks.gpu measures CUDA devices; on {arguments.device!r} only --quick runs")
    device = torch.device(arguments.device)
    workload = QUICK if arguments.quick else WORKLOAD
    limits = limits_of(device, quick=arguments.quick)
    conditions = {
        "batches": workload.batches, "input_tokens": workload.input_tokens, "output_tokens": workload.output_tokens,
        "prefills": workload.prefills, "repeats": workload.repeats,
    }  # fmt: skip
    results = Results("gpu", conditions, merge=False, quick=arguments.quick)
    results.data["device"] = describe_device(device)
    results.data["limits"] = {"bytes_per_second": limits.bytes_per_second, "flops_per_second": limits.flops_per_second}
    rows = results.data["rows"] = []
    shape, name = (SMALL, "random-tiny") if arguments.quick else (LLAMA_3_8B, "random-llama-3-8b")
    for model in (str(random_model(shape, arguments.folder / name, device)), "smollm2"):
        for precision in arguments.precisions:
            for graphs in (False, True):
                rows += measured(model, precision, device, limits, workload, graphs=graphs)
                results.save()
    render.render(results.path)


def measured(
    model: str, precision: str, device: torch.device, limits: Limits, workload: Workload, *, graphs: bool
) -> list[dict[str, Any]]:
    """One row of results for each figure of one engine."""
    from kvarn.models.sources import resolve

    config = json.loads((resolve(model).folder / "config.json").read_text())
    engine = kvarn_engine(
        model, precision, device=str(device), cuda_graphs=graphs, max_running=max(workload.batches), token_budget=2048,
        max_context=8192 if config["max_position_embeddings"] >= 8192 else 0,
    )  # fmt: skip
    rows = []
    for reading in measure(engine.generate, workload):
        rate = median(reading.repeats)
        rows.append({
            "model": Path(model).name, "precision": precision, "graphs": graphs,
            "load_seconds": engine.load_seconds,
            **reading.to_json(), "step_ms": reading.size / rate * 1e3 if reading.kind == "decode" else None,
            "roofline_share": roofline_share(
                reading.kind, reading.size, rate, config, precision, limits, workload
            ),
        })  # fmt: skip
        print(
            f"{Path(model).name} {precision} graphs {'on ' if graphs else 'off'} {reading.kind:7} {reading.size:5} "
            f"{rate:10.1f} tokens/s  {rows[-1]['roofline_share']:.0%} of the roofline",
            flush=True,
        )
    del engine
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


if __name__ == "__main__":
    main()
