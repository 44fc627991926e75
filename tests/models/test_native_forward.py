"""The forward pass as one native call: bit for bit what its ops give one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from kvarn.kernels import ops
from kvarn.models.decoder_llama import LlamaDecoder
from kvarn.models.loader import load_decoder
from kvarn.models.precision import Precision
from tests.models.paged import PagedRunner
from tests.models.test_decoders import random_tokens
from tests.models.tiny import SIZES, save_model

FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen2_bias_window": lambda: transformers.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=24, max_window_layers=1
    ),
    "qwen3_head_norms": lambda: transformers.Qwen3Config(**SIZES, head_dim=16),
}


def both(family: str, precision: Precision, folder: Path) -> tuple[LlamaDecoder, LlamaDecoder]:
    """The model with its native forward pass, and one op at a time."""
    files = save_model(FAMILIES[family](), folder)
    decoders = load_decoder(files, precision=precision), load_decoder(files, precision=precision)
    assert isinstance(decoders[0], LlamaDecoder) and isinstance(decoders[1], LlamaDecoder)
    decoders[1].native = None
    return decoders[0], decoders[1]


@pytest.mark.parametrize("precision", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_call_gives_the_bits_of_single_ops(family: str, precision: Precision, tmp_path: Path) -> None:
    native, single = both(family, precision, tmp_path)
    if native.native is None:
        assert precision == "bfloat16" and ops.native_kernels() != "avx512_bf16"
        return
    prompts = {0: random_tokens(70, 1), 1: random_tokens(5, 2), 2: random_tokens(33, 3)}
    runners = PagedRunner(native), PagedRunner(single)
    steps = [prompts, {0: [7], 1: [8], 2: [9]}, {1: random_tokens(20, 4), 2: [3]}]
    for step in steps:
        first, second = (runner.step(dict(step), every_row=True) for runner in runners)
        assert first.dtype == torch.float32
        assert torch.equal(first, second.float())
    silent = [runner.step({0: [5, 6]}, no_rows=True) for runner in runners]
    assert silent[0].shape == silent[1].shape == (0, SIZES["vocab_size"])
    assert torch.equal(runners[0].step({0: [4]}), runners[1].step({0: [4]}).float())


def test_threads_and_company_do_not_change_a_bit(tmp_path: Path, three_threads: None) -> None:
    decoder, _ = both("llama", "int8", tmp_path)
    prompts = {i: random_tokens(10 + 7 * i, i) for i in range(6)}
    together = PagedRunner(decoder).step(dict(prompts))
    torch.set_num_threads(1)
    alone = torch.cat([PagedRunner(decoder).step({0: prompts[i]}) for i in prompts])
    assert torch.equal(together, alone)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("inputs", torch.zeros(1, 8).bfloat16(), "hidden size"),
        ("inputs", torch.zeros(1, 64), "bfloat16"),
        ("positions", torch.tensor([256], dtype=torch.int32), "positions"),
        ("slots", torch.tensor([-1], dtype=torch.int32), "slots"),
        ("block_tables", torch.tensor([[99]], dtype=torch.int32), "block ids"),
        ("query_starts", torch.tensor([0, 2], dtype=torch.int32), "rising"),
        ("logit_rows", torch.tensor([1]), "rows"),
        ("pages", torch.zeros(4, 2, 2, 2, 16, 16).bfloat16(), "layers"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(field: str, value: torch.Tensor, message: str, tmp_path: Path) -> None:
    decoder, _ = both("llama", "int8", tmp_path)
    one = torch.zeros(1, dtype=torch.int32)
    batch = {
        "inputs": torch.zeros(1, decoder.spec.hidden_size).bfloat16(), "positions": one, "slots": one,
        "block_tables": one[None], "kv_slots": one + 1, "query_starts": torch.tensor([0, 1], dtype=torch.int32),
        "logit_rows": torch.tensor([0]), "pages": torch.zeros(4, 3, 2, 2, 16, 16).bfloat16(),
        "slot_positions": torch.zeros(4, 16, dtype=torch.int32),
    }  # fmt: skip
    assert decoder.native is not None
    decoder.native(**batch)
    with pytest.raises(RuntimeError, match=message):
        decoder.native(**{**batch, field: value})
