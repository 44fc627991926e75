"""An int8 KV cache: half the memory, nearly the same model, one result however a prompt is computed."""

from __future__ import annotations

import pytest
import torch

from kvarn.errors import KvarnError
from kvarn.models.loader import load_decoder
from kvarn.models.sources import resolve
from kvarn.models.spec import Decoder
from kvarn.models.tokenizer import Tokenizer
from kvarn.serving.executors.torch_executor import allocate_kv
from kvarn.serving.offline import OfflineEngine
from kvarn.serving.sampling.params import SamplingParams
from tests.conftest import MODEL
from tests.models.paged import PagedRunner

TEXT = (
    "The water cycle describes how water moves through the environment. Heat from the sun turns water in rivers, "
    "lakes and oceans into vapour, which rises, cools and becomes clouds. From there it falls as rain or snow, runs "
    "down hills into streams, and some of it sinks into the ground, where roots of plants take it up. "
)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return load_decoder(resolve(MODEL), precision="float32")


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return Tokenizer.load(resolve(MODEL).folder).encode(TEXT)


def run_in_chunks(decoder: Decoder, tokens: list[int], dtype: torch.dtype, *chunks: int) -> torch.Tensor:
    """Log-probabilities of every row, the text computed in chunks of these sizes and the rest at once."""
    runner, parts, begin = PagedRunner(decoder, num_blocks=16, kv_dtype=dtype), list[torch.Tensor](), 0
    for size in (*chunks, len(tokens) - sum(chunks)):
        parts.append(runner.step({0: tokens[begin : begin + size]}, every_row=True))
        begin += size
    return torch.cat(parts).log_softmax(-1)


def divergence(exact: torch.Tensor, rough: torch.Tensor) -> float:
    """Mean Kullback-Leibler divergence in nats a token."""
    return float((exact.exp() * (exact - rough)).sum(-1).mean())


@torch.inference_mode()
def test_real_text_is_as_likely_with_an_int8_cache_however_it_is_computed(decoder: Decoder, tokens: list[int]) -> None:
    exact = run_in_chunks(decoder, tokens, torch.float32)
    for chunks in ((), (20, 33), (len(tokens) - 16, *[1] * 15)):  # at once, in chunks, the end token by token
        rough = run_in_chunks(decoder, tokens, torch.int8, *chunks)
        assert divergence(exact, rough) < 2e-3
        assert (exact.argmax(-1) == rough.argmax(-1)).float().mean() > 0.95


def test_int8_takes_little_more_than_half_of_bfloat16(decoder: Decoder) -> None:
    spec, cpu = decoder.spec, torch.device("cpu")
    whole, half = (allocate_kv(spec, 5, 16, cpu, dtype).pages for dtype in (torch.bfloat16, torch.int8))
    assert half.nbytes / whole.nbytes == (spec.head_dim + 4) / (2 * spec.head_dim)
    assert whole.shape == (5, 30, 2, 3, 16, 64)


def test_prefix_cache_and_preemption_work_with_int8() -> None:
    """A pool too small for all requests at once, whose common beginning is shared: the text is what each gets alone."""
    engine = OfflineEngine.load(
        MODEL, precision="float32", kv_dtype="int8", token_budget=48, kv_memory_bytes=9 * 30 * 2 * 3 * 16 * 68,
        threads=1, speculation="off",
    )  # fmt: skip
    counting = Tokenizer.load(engine.folder).encode("Counting up: " + ", ".join(str(i) for i in range(1, 40)))
    prompts = [counting[: 60 + 9 * i] for i in range(4)]
    params = [SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)] * len(prompts)
    crowded = [result.token_ids for result in engine.generate(prompts, params)]
    assert engine.engine.counters.preemptions > 0
    assert crowded == [engine.generate([prompt], params[:1])[0].token_ids for prompt in prompts]


def test_a_cache_finer_than_the_model_is_refused() -> None:
    with pytest.raises(KvarnError, match="kv-dtype bfloat16 needs"):
        OfflineEngine.load(MODEL, precision="float32", kv_dtype="bfloat16")
    with pytest.raises(KvarnError, match="kv_dtype"):
        OfflineEngine.load(MODEL, kv_dtype="int4")
