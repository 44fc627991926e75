"""Precisions of weights: what is chosen, what GGUF's 4-bit blocks become, and how far the model moves."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers

from kvarn.errors import ModelError
from kvarn.kernels import ops
from kvarn.models.gguf import convert
from kvarn.models.gguf_blocks import Int4Blocks, read_int4
from kvarn.models.gguf_reader import GGUFFile
from kvarn.models.loader import load_decoder
from kvarn.models.precision import Precision, choose_precision
from kvarn.models.sources import ModelFiles
from kvarn.models.weights import Weights
from tests.models.paged import PagedRunner
from tests.models.test_decoders import random_tokens
from tests.models.tiny import SIZES, save_model, write_gguf

CPU = torch.device("cpu")
LLAMA = SIZES


@pytest.fixture(scope="module")
def q4_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    save_model(transformers.LlamaConfig(**LLAMA), source)
    convert(write_gguf(source, source / "m.gguf", gguf.GGMLQuantizationType.Q4_1), target)
    return target


def test_auto_keeps_what_the_file_holds() -> None:
    whole = choose_precision("auto", CPU, has_int4_blocks=False)
    assert whole in ("bfloat16", "float32")
    fast = ops.native_kernels() in ("avx512_bf16", "avx512_vnni")
    assert choose_precision("auto", CPU, has_int4_blocks=True) == ("int4" if fast else whole)
    with pytest.raises(ModelError, match="float32, bfloat16, int8, int4"):
        choose_precision("int3", CPU, has_int4_blocks=False)  # type: ignore[arg-type]


def test_blocks_of_a_file_are_kept_in_the_model_s_row_order(q4_folder: Path) -> None:
    weights, blocks = Weights(q4_folder), Int4Blocks(q4_folder)
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj", "mlp.gate_proj")
    for name in (f"model.layers.0.{part}.weight" for part in names):
        dense = next(weights.get(name, shape) for shape in _shapes(weights, name))
        kept = blocks.get(name, tuple(dense.shape)).dequantized()  # type: ignore[arg-type]
        torch.testing.assert_close(kept, dense.float(), rtol=2e-3, atol=1e-3)
    with pytest.raises(ModelError, match="q_proj"):
        blocks.get("model.layers.0.self_attn.q_proj.weight", (1, 2))


def _shapes(weights: Weights, name: str) -> list[tuple[int, ...]]:
    return [tuple(weights._files[weights._where[name]].get_slice(name).get_shape())]


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K"])
def test_every_kind_of_4_bit_block_means_what_gguf_says(kind: str, tmp_path: Path) -> None:
    quantisation = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[quantisation]
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (6, 512 // block, size), dtype=np.uint8)
    factors = 1 if kind == "Q4_0" else 2
    raw[..., : 2 * factors] = rng.uniform(0.01, 0.1, (6, 512 // block, factors)).astype(np.float16).view(np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tensor("t", raw.reshape(6, -1), raw_dtype=quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "t.gguf")
    kept = read_int4(file, "t")
    assert kept is not None
    torch.testing.assert_close(kept.dequantized(), torch.from_numpy(file.read("t")), rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize(("precision", "similarity"), [("bfloat16", 0.999), ("int8", 0.995), ("int4", 0.995)])
def test_logits_stay_near_those_of_float32(precision: Precision, similarity: float, q4_folder: Path) -> None:
    files = ModelFiles("tiny", q4_folder, "gguf")
    tokens = random_tokens(60, seed=4)
    exact = PagedRunner(load_decoder(files, precision="float32")).step({0: tokens}, every_row=True)
    decoder = load_decoder(files, precision=precision)
    assert (decoder.spec.precision, decoder.spec.dtype) == (precision, torch.bfloat16)
    rough = PagedRunner(decoder).step({0: tokens}, every_row=True)
    assert float(torch.nn.functional.cosine_similarity(exact, rough.float(), dim=-1).min()) > similarity


def test_models_of_transformers_say_which_precisions_they_have(tmp_path: Path) -> None:
    files = save_model(transformers.GPT2Config(vocab_size=200, n_embd=32, n_layer=1, n_head=2), tmp_path)
    with pytest.raises(ModelError, match="--precision bfloat16 or float32"):
        load_decoder(files, precision="int8")
