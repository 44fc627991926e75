"""GGUF file -> Hugging Face folder, once: config.json, safetensors, tokenizer.json, tokenizer_config.json.

Tensors kept as float32 in the file stay so. Quantised ones are stored as float16: half the bytes of float32, and its
rounding (2^-12 of a weight) is lost in the error that quantising to 8 or fewer bits left. Tensors that were bfloat16,
or leave float16's range, are stored as bfloat16. 4-bit blocks are kept besides, for the precision int4.
Llama, Mistral, Qwen2 and Qwen3 are converted here, in seconds; other architectures through transformers' loader.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from kvarn.errors import ModelError
from kvarn.kernels.quantized import Int4Weight
from kvarn.models.gguf_blocks import read_int4, save_int4
from kvarn.models.gguf_reader import GGUFFile
from kvarn.models.gguf_tokenizer import write_tokenizer
from kvarn.models.sources import Progress

SHARD_BYTES: Final = 2 << 30
_ARCHITECTURES: Final = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}
_GLOBAL_NAMES: Final = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS: Final = "rope_freqs.weight"
_FLOAT32, _BFLOAT16 = 0, 30  # GGMLQuantizationType


def convert(source: Path, target: Path, *, progress: Progress | None = None) -> None:
    """Write the model of `source` as a Hugging Face folder into `target`, an existing empty folder.

    Raises ModelError for a file that cannot be read or an architecture that nobody here knows.
    """
    file = GGUFFile(source)
    try:
        _convert(file, target, progress or (lambda stage, fraction: None))
    except (KeyError, IndexError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ModelError(
            f"{source} contradicts itself ({type(error).__name__}: {error}); it is corrupt, download it again"
        ) from error


def _convert(file: GGUFFile, target: Path, report: Progress) -> None:
    report("converting the tokenizer", 0.0)
    write_tokenizer(file, target)
    _write_json(target / "generation_config.json", _generation_config(file.metadata))
    names = {name: _hf_name(name) for name in file.tensors if name != _ROPE_FACTORS}
    config = _config(file)
    if config is None or None in names.values():
        _convert_with_transformers(file, target, report)
        return
    _write_json(target / "config.json", config)
    _write_tensors(file, target, {name: new for name, new in names.items() if new}, config, report)


def _hf_name(name: str) -> str | None:
    """Hugging Face's name of a Llama-family tensor; None when there is none."""
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if layer:
        module = _LAYER_NAMES.get(layer[2])
        return module and f"model.layers.{layer[1]}.{module}.{layer[3]}"
    stem, _, kind = name.rpartition(".")
    return f"{_GLOBAL_NAMES[stem]}.{kind}" if stem in _GLOBAL_NAMES else None


def _config(file: GGUFFile) -> dict[str, Any] | None:
    """config.json of a Llama-family model; None when the file holds something else."""
    meta = file.metadata
    arch = meta.get("general.architecture")
    if not isinstance(arch, str):
        raise ModelError(
            f"{file.path} does not say its architecture (general.architecture); it is not a language model"
        )
    if arch not in _ARCHITECTURES or meta.get(f"{arch}.expert_count"):
        return None
    model_type, class_name = _ARCHITECTURES[arch]
    try:
        hidden, heads = meta[f"{arch}.embedding_length"], meta[f"{arch}.attention.head_count"]
        head_dim = meta.get(f"{arch}.attention.key_length", hidden // heads)
        config = {
            "architectures": [class_name],
            "model_type": model_type,
            "hidden_size": hidden,
            "num_hidden_layers": meta[f"{arch}.block_count"],
            "intermediate_size": meta[f"{arch}.feed_forward_length"],
            "num_attention_heads": heads,
            "num_key_value_heads": meta.get(f"{arch}.attention.head_count_kv", heads),
            "head_dim": head_dim,
            "max_position_embeddings": meta[f"{arch}.context_length"],
            "rms_norm_eps": _shortest(meta[f"{arch}.attention.layer_norm_rms_epsilon"]),
            "hidden_act": "silu",
            "vocab_size": file.tensors["token_embd.weight"].shape[0],
            "tie_word_embeddings": "output.weight" not in file.tensors,
            "rope_parameters": _rope(file, arch, head_dim),
            "attention_bias": "blk.0.attn_output.bias" in file.tensors,
            "dtype": "bfloat16",
            **{key: value for key, value in _generation_config(meta).items() if value is not None},
        }
    except KeyError as missing:
        raise ModelError(f"{file.path} lacks {missing}; it is incomplete, download it again") from None
    return config if meta.get(f"{arch}.rope.dimension_count", head_dim) == head_dim else None


def _rope(file: GGUFFile, arch: str, head_dim: int) -> dict[str, Any]:
    meta = file.metadata
    theta = meta.get(f"{arch}.rope.freq_base", 10000.0)
    scaling = meta.get(f"{arch}.rope.scaling.type", "none")
    if _ROPE_FACTORS in file.tensors:
        return _llama3_rope(file.read(_ROPE_FACTORS), theta, head_dim, str(file.path))
    if scaling == "none":
        return {"rope_type": "default", "rope_theta": theta}
    rope = {"rope_type": scaling, "rope_theta": theta, "factor": meta[f"{arch}.rope.scaling.factor"]}
    if scaling == "yarn":
        rope["original_max_position_embeddings"] = meta[f"{arch}.rope.scaling.original_context_length"]
    return rope


def _llama3_rope(factors: NDArray[np.float32], theta: float, head_dim: int, path: str) -> dict[str, Any]:
    """GGUF keeps Llama 3's scaling as one divisor a frequency: find the published parameters that give these."""
    from kvarn.models.rope import inverse_frequencies

    rope = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    plain, _ = inverse_frequencies({"rope_type": "default", "rope_theta": theta}, head_dim, 8192)
    scaled, _ = inverse_frequencies(rope, head_dim, 8192)
    if not np.allclose((plain / scaled).numpy(), factors, rtol=1e-3):
        raise ModelError(
            f"{path} scales its rotary frequencies in a way kvarn does not know; use the safetensors model"
        )
    return rope


def _generation_config(meta: dict[str, Any]) -> dict[str, Any]:
    ends = [meta.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")]
    known = sorted({end for end in ends if end is not None})
    return {
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": known[0] if len(known) == 1 else known or None,
    }


def _write_tensors(
    file: GGUFFile, target: Path, names: dict[str, str], config: dict[str, Any], report: Progress
) -> None:
    shards = list(_shards(file, names))
    index: dict[str, str] = {}
    blocks: dict[str, Int4Weight] = {}
    done = 0
    for number, shard in enumerate(shards, 1):
        tensors: dict[str, torch.Tensor] = {}
        for name in shard:
            tensors[names[name]] = _tensor(file, name, config)
            if (kept := _int4(file, name, config)) is not None:
                blocks[names[name]] = kept
            done += 1
            report("converting the weights", done / len(names))
        single = len(shards) == 1
        shard_name = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, str(target / shard_name), metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, shard_name))
    save_int4(blocks, target)
    if len(shards) > 1:
        _write_json(target / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})


def _shards(file: GGUFFile, names: dict[str, str]) -> Iterator[list[str]]:
    """Group tensors so that one group's converted weights stay below SHARD_BYTES: memory holds one group at a time."""
    shard: list[str] = []
    size = 0
    for name in names:
        nbytes = 4 * int(np.prod(file.tensors[name].shape))
        if shard and size + nbytes > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += nbytes
    yield shard


def _tensor(file: GGUFFile, name: str, config: dict[str, Any]) -> torch.Tensor:
    tensor = _unpermuted(torch.from_numpy(file.read(name)), name, config)
    kind = file.tensors[name].kind
    if kind == _FLOAT32:
        return tensor
    if kind == _BFLOAT16 or float(tensor.abs().max()) > torch.finfo(torch.float16).max:
        return tensor.bfloat16()
    return tensor.half()


def _int4(file: GGUFFile, name: str, config: dict[str, Any]) -> Int4Weight | None:
    """The tensor's 4-bit blocks, its rows in the same order as `_tensor`'s."""
    weight = read_int4(file, name)
    return weight and Int4Weight(*(_unpermuted(part, name, config) for part in weight))


def _unpermuted(rows: torch.Tensor, name: str, config: dict[str, Any]) -> torch.Tensor:
    """llama.cpp stores Llama's q and k rows for interleaved rotary pairs; transformers rotates halves. Swap back."""
    counts = {".attn_q.": "num_attention_heads", ".attn_k.": "num_key_value_heads"}
    heads = next((config[count] for part, count in counts.items() if part in name), 0)
    if config["model_type"] != "llama" or not heads:
        return rows
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    swapped: torch.Tensor = pairs.transpose(1, 2).reshape(rows.shape)
    return swapped


def _convert_with_transformers(file: GGUFFile, target: Path, report: Progress) -> None:
    from transformers import AutoModelForCausalLM

    report("converting the weights", 0.0)
    path = file.path
    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16)
    except Exception as error:  # transformers raises whatever its mapping stumbles over
        arch = file.metadata.get("general.architecture")
        raise ModelError(
            f"{path}: cannot convert a GGUF file of architecture {arch!r} ({type(error).__name__}: {error}); "
            "use the model's safetensors folder"
        ) from error
    state, seen = {}, set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:  # tied weights are stored once
            seen.add(tensor.data_ptr())
            state[name] = tensor.contiguous()
    save_file(state, str(target / "model.safetensors"), metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(target)


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(np.format_float_scientific(np.float32(value)))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not None}, indent=2) + "\n")
