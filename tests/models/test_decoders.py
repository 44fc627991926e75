"""Both decoders against transformers' own models in fp32: whole, in chunks, and mixed with other sequences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kvarn.errors import ModelError
from kvarn.models.decoder_llama import LlamaDecoder
from kvarn.models.decoder_transformers import TransformersDecoder
from kvarn.models.loader import load_decoder
from tests.models.paged import PagedRunner
from tests.models.tiny import SIZES, VOCABULARY, reference_logits, reference_model, save_model

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 10000.0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}

FUSED: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "llama_tied": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama_biased": lambda: transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama_wide_heads": lambda: transformers.LlamaConfig(**SIZES, head_dim=24),
    "llama3_rope": lambda: transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "yarn_rope": lambda: transformers.LlamaConfig(**SIZES, rope_parameters=YARN),
    "linear_rope": lambda: transformers.LlamaConfig(**SIZES, rope_parameters=LINEAR),
    "dynamic_rope": lambda: transformers.LlamaConfig(**SIZES, rope_parameters=DYNAMIC),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=9),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "qwen2_sliding": lambda: transformers.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=9, max_window_layers=1
    ),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=16),
}
GENERIC: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=3, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96
    ),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=64, ffn_dim=96, num_hidden_layers=3, num_attention_heads=4,
        word_embed_proj_dim=64,
    ),
    "gemma2_softcap": lambda: transformers.Gemma2Config(
        **SIZES, head_dim=16, sliding_window=9, query_pre_attn_scalar=16, attn_logit_softcapping=5.0
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=9, query_pre_attn_scalar=16),
    "phi3": lambda: transformers.Phi3Config(**SIZES),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SIZES, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    "gpt_oss_sinks": lambda: transformers.GptOssConfig(
        **SIZES, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=9, rope_parameters=YARN
    ),
    "deepseek_latent_attention": lambda: transformers.DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 4}, q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=8,
        qk_nope_head_dim=16, v_head_dim=16, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2,
        moe_intermediate_size=32, first_k_dense_replace=1,
    ),
}  # fmt: skip
REJECTED: dict[str, Callable[[], Any]] = {
    "bloom": lambda: transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4),
    "mpt": lambda: transformers.MptConfig(vocab_size=VOCABULARY, d_model=64, n_layers=2, n_heads=4),
    "falcon": lambda: transformers.FalconConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4
    ),
    "mamba": lambda: transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2),
}


def random_tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()
    return tokens


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max() / expected.abs().max()) < 1e-4


@pytest.mark.parametrize("family", [*FUSED, *GENERIC])
def test_logits_equal_transformers_in_chunks_and_in_mixed_batches(family: str, tmp_path: Path) -> None:
    files = save_model({**FUSED, **GENERIC}[family](), tmp_path)
    decoder = load_decoder(files, precision="float32")
    assert type(decoder) is (LlamaDecoder if family in FUSED else TransformersDecoder)
    reference = reference_model(tmp_path)
    runner = PagedRunner(decoder)
    long, short = random_tokens(90, seed=1), random_tokens(21, seed=2)

    first = runner.step({0: long[:37]}, every_row=True)
    mixed = runner.step({0: long[37:89], 1: short}, every_row=True)  # a chunk beside another prompt
    last = runner.step({1: [5], 0: long[89:]}, every_row=True)  # two decode rows, in another order

    expected = reference_logits(reference, long)
    assert_close(torch.cat((first, mixed[:52], last[1:])), expected)
    assert_close(torch.cat((mixed[52:], last[:1])), reference_logits(reference, [*short, 5]))


@pytest.mark.parametrize("family", ["llama_tied", "qwen3", "gpt2"])
def test_only_rows_that_want_logits_get_them(family: str, tmp_path: Path) -> None:
    decoder = load_decoder(save_model({**FUSED, **GENERIC}[family](), tmp_path), precision="float32")
    prompts = {index: random_tokens(5 + 7 * index, seed=index) for index in range(4)}
    every = PagedRunner(decoder).step(prompts, every_row=True)
    ends = torch.tensor([len(prompt) for prompt in prompts.values()]).cumsum(0) - 1
    assert_close(PagedRunner(decoder).step(prompts), every[ends])


def test_a_pass_that_wants_no_logits_still_writes_its_keys_and_values(tmp_path: Path) -> None:
    decoder = load_decoder(save_model(FUSED["llama"](), tmp_path), precision="float32")
    tokens = random_tokens(40, seed=3)
    runner = PagedRunner(decoder)
    assert runner.step({0: tokens[:30]}, no_rows=True).shape == (0, VOCABULARY)
    assert_close(runner.step({0: tokens[30:]}), PagedRunner(decoder).step({0: tokens}))


@pytest.mark.parametrize("family", ["llama", "qwen2_sliding", "qwen3", "gemma3", "gpt2"])
def test_bfloat16_stays_near_float32(family: str, tmp_path: Path) -> None:
    files = save_model({**FUSED, **GENERIC}[family](), tmp_path)
    tokens = random_tokens(60, seed=4)
    exact = PagedRunner(load_decoder(files, precision="float32")).step({0: tokens}, every_row=True)
    decoder = load_decoder(files, precision="bfloat16")
    rough = PagedRunner(decoder).step({0: tokens}, every_row=True).float()
    assert decoder.spec.dtype == torch.bfloat16
    assert float(torch.nn.functional.cosine_similarity(exact, rough, dim=-1).min()) > 0.99


@pytest.mark.parametrize("family", REJECTED)
def test_models_that_paged_attention_cannot_serve_are_refused_with_the_reason(family: str, tmp_path: Path) -> None:
    files = save_model(REJECTED[family](), tmp_path)
    with pytest.raises(ModelError, match=r"paged|plain causal"):
        load_decoder(files, precision="float32")


def test_real_weights_give_transformers_greedy_text(model_folder: Path) -> None:
    from kvarn.models.sources import ModelFiles
    from kvarn.models.tokenizer import Tokenizer

    decoder = load_decoder(ModelFiles("smollm2", model_folder, "bundled"), precision="float32")
    tokenizer, reference = Tokenizer.load(model_folder), reference_model(model_folder)
    for text in ("The capital of France is", "def fibonacci(n):", "東京の天気は 🎉"):
        prompt = tokenizer.encode(text)
        assert_close(PagedRunner(decoder).step({0: prompt}, every_row=True), reference_logits(reference, prompt))
        expected = reference.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0, len(prompt) :]
        assert PagedRunner(decoder).generate(prompt, len(expected)) == expected.tolist()


def test_real_weights_through_the_generic_decoder(model_folder: Path) -> None:
    from kvarn.models.config import read_config
    from kvarn.models.sources import ModelFiles

    files = ModelFiles("smollm2", model_folder, "bundled")
    config = read_config(model_folder)
    generic = TransformersDecoder.load(files, config, torch.float32, torch.device("cpu"))
    fused = load_decoder(files, precision="float32")
    assert generic.spec.kv_bytes_per_token == fused.spec.kv_bytes_per_token
    prompt = list(range(1000, 1050))
    assert_close(PagedRunner(generic).step({0: prompt}), PagedRunner(fused).step({0: prompt}))


def test_a_model_that_attends_otherwise_than_it_says_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading compares paged attention with the model's own: here the scale that the model hands over is off."""
    from transformers.models.phi3 import modeling_phi3

    class OtherScale(modeling_phi3.Phi3Attention):  # type: ignore[misc]
        def forward(self, *arguments: Any, **named: Any) -> Any:
            self.scaling = self.head_dim**-0.5 * (1.0 if self.config._attn_implementation == "eager" else 0.5)
            return super().forward(*arguments, **named)

    files = save_model(GENERIC["phi3"](), tmp_path)
    monkeypatch.setattr(modeling_phi3, "Phi3Attention", OtherScale)
    with pytest.raises(ModelError, match="cosine"):
        load_decoder(files, precision="float32")
