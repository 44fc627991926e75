"""The same engine on CUDA: same text as transformers there, same draws as on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from kvarn.kernels import flashinfer
from kvarn.serving.offline import OfflineEngine
from kvarn.serving.sampling.params import SamplingParams

pytestmark = pytest.mark.gpu

TOKENS = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with random weights, grouped queries and tied embeddings."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def _prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 1000, (n,), generator=generator).tolist() for n in (1, 5, 16, 17, 100, 700, 33, 64)]


def test_greedy_equals_transformers_with_chunks_preemption_and_prefixes(folder: Path):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to("cuda")
    expected = []
    for prompt in _prompts():
        ids = torch.tensor([prompt], device="cuda")
        output = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
        expected.append(output[0, len(prompt) :].tolist())
    engine = OfflineEngine.load(
        str(folder), device="cuda", precision="float32", token_budget=64, max_context=800, kv_memory_bytes=4 * 2**20
    )
    engine.engine._check = True
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    for _ in range(2):  # the second time from the prefix cache
        assert [r.token_ids for r in engine.generate(_prompts(), params)] == expected
    assert engine.engine.cache.hit_tokens > 0


def test_seeded_sampling_does_not_depend_on_the_batch(folder: Path):
    engine = OfflineEngine.load(str(folder), device="cuda", precision="float32", kv_memory_bytes=16 * 2**20)
    params = SamplingParams(temperature=0.8, top_p=0.9, top_k=50, seed=7, max_tokens=TOKENS, ignore_eos=True)
    together = [r.token_ids for r in engine.generate(_prompts(), params)]
    alone = [engine.generate([prompt], params)[0].token_ids for prompt in _prompts()]
    assert together == alone


def test_bfloat16_runs(folder: Path):
    engine = OfflineEngine.load(str(folder), device="cuda", precision="bfloat16", kv_memory_bytes=16 * 2**20)
    (result,) = engine.generate([_prompts()[4]], SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True))
    assert len(result.token_ids) == TOKENS


def test_flashinfer_gives_the_text_that_triton_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Prompts, chunks and (without graphs) decode steps: the same first tokens, by its kernels alone."""
    pytest.importorskip("flashinfer")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    calls: list[int] = []
    attend = flashinfer.PlannedAttention.attend
    monkeypatch.setattr(
        flashinfer.PlannedAttention, "attend", lambda self, *rest: (calls.append(1), attend(self, *rest))[1]
    )
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    texts = []
    for planned in (False, True):
        engine = OfflineEngine.load(
            str(tmp_path), device="cuda", precision="bfloat16", cuda_graphs=False, flashinfer=planned,
            token_budget=64, max_context=800, kv_memory_bytes=16 * 2**20,
        )  # fmt: skip
        calls.clear()
        texts.append([result.token_ids for result in engine.generate(_prompts(), params)])
        assert bool(calls) == planned
    assert sum(one[0] == other[0] for one, other in zip(*texts, strict=True)) >= len(_prompts()) - 1  # near ties


@pytest.mark.parametrize("name", ["paged_attention", "rms_norm", "add_rms_norm", "rope_and_cache", "write_cache",
                                  "silu_mul", "int_linear"])  # fmt: skip
def test_operators_have_cuda_kernels(name: str):
    """The kernels themselves are held to the reference by tests/kernels/test_triton_*.py, which run here too."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"kvarn::{name}", "CUDA")


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8", "int4"])
def test_graphs_do_not_change_the_text(folder: Path, precision: str):
    """With graphs, batches are filled up to the next size: 8 requests and, as they end one by one, all sizes below."""
    params = [SamplingParams(temperature=0.0, max_tokens=4 + 3 * i, ignore_eos=True) for i in range(len(_prompts()))]
    texts = []
    for graphs in (False, True):
        engine = OfflineEngine.load(
            str(folder), device="cuda", precision=precision, cuda_graphs=graphs, kv_memory_bytes=16 * 2**20
        )
        texts.append([result.token_ids for result in engine.generate(_prompts(), params)])
    if precision == "float32":
        assert texts[0] == texts[1]
    # Otherwise a batch of another size may be summed in another order, which decides near ties.
    for one, other in zip(*texts, strict=True):
        assert (len(one), one[0]) == (len(other), other[0])
