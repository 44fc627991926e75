"""FlashInfer: what its wrappers are given describes the step, so that they compute what the reference does."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import MistralConfig, Qwen2Config

from kvarn.kernels import flashinfer, ops, reference
from kvarn.kernels.flashinfer import PagedRows, PlannedAttention
from kvarn.models.loader import load_decoder
from kvarn.models.spec import ForwardBatch, KVMemory
from kvarn.serving.executors.cuda_graphs import DeviceForward
from tests.kernels import flashinfer_stand_in as stand_in
from tests.kernels.paged import PagedCase
from tests.kernels.triton_device import there
from tests.models.paged import PagedRunner
from tests.models.tiny import SIZES, save_model

TOLERANCE = {"atol": 2e-2, "rtol": 2e-2}
SPARE_BLOCKS = 2


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The stand-in installed as `flashinfer`; gives its list of calls."""
    monkeypatch.setitem(sys.modules, "flashinfer", stand_in)
    stand_in.BatchPrefillWithPagedKVCacheWrapper.calls.clear()
    yield stand_in.BatchPrefillWithPagedKVCacheWrapper.calls


def never(*_: object) -> Tensor:
    raise AssertionError("this case is FlashInfer's")


def dense_case(
    chunks: list[tuple[int, int]], *, kv_heads: int, group: int, head_dim: int, block_size: int, seed: int,
    options: dict[str, Any],
) -> PagedCase:  # fmt: skip
    """A step as the engine makes it. chunks: (tokens computed before, rows now) of each sequence."""
    g = torch.Generator().manual_seed(seed)
    lengths = [before + rows for before, rows in chunks]
    blocks = [-(-length // block_size) for length in lengths]
    pool = torch.full((sum(blocks) + 1, 3, 2, kv_heads, block_size, head_dim), float("nan")).bfloat16()
    slot_positions = torch.full((sum(blocks) + 1, block_size), -1, dtype=torch.int32)
    tables = torch.full((len(chunks), max(blocks) + 1), 2**30, dtype=torch.int32)
    order = iter(torch.randperm(sum(blocks) + 1, generator=g).tolist())
    for sequence, length in enumerate(lengths):
        for index in range(blocks[sequence]):
            tables[sequence, index] = block = next(order)
            held = min(block_size, length - index * block_size)
            pool[block, :, :, :, :held] = torch.randn(3, 2, kv_heads, held, head_dim, generator=g).bfloat16()
            slot_positions[block, :held] = torch.arange(held, dtype=torch.int32) + index * block_size
    rows = sum(rows for _, rows in chunks)
    fused = torch.randn(rows, (group + 2) * kv_heads * head_dim, generator=g).bfloat16()
    starts = torch.tensor([0, *(rows for _, rows in chunks)], dtype=torch.int32).cumsum(0).int()
    return PagedCase(
        {
            "query": fused[:, : group * kv_heads * head_dim].view(rows, -1, head_dim),
            "kv": pool[:, 1],
            "slot_positions": slot_positions,
            "block_tables": tables,
            "kv_slots": torch.tensor(lengths, dtype=torch.int32),
            "query_starts": starts,
            "positions": torch.cat([torch.arange(a, a + n, dtype=torch.int32) for a, n in chunks]),
        },
        head_dim**-0.5 * 1.5,
        options,
    )


def paged_rows(case: PagedCase) -> PagedRows:
    block_size = case.tensors["slot_positions"].shape[1]
    return PagedRows.of(*(case.tensors[name] for name in ("block_tables", "kv_slots", "query_starts")), block_size)


@st.composite
def dense_cases(draw: st.DrawFn) -> PagedCase:
    rows = st.just(1) if draw(st.booleans()) else st.integers(1, 40)
    return dense_case(
        draw(st.lists(st.tuples(st.integers(0, 90), rows), min_size=1, max_size=5)),
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 4)),
        head_dim=64,
        block_size=draw(st.one_of(st.just(16), st.integers(1, 20))),
        seed=draw(st.integers(0, 2**31)),
        options={"window": draw(st.sampled_from([0, 1, 7, 200])), "softcap": draw(st.sampled_from([0.0, 5.0]))},
    )


@given(case=dense_cases())
@settings(max_examples=60, deadline=None)
def test_a_step_by_plan_equals_the_reference(case: PagedCase) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flashinfer", stand_in)
        with PlannedAttention(torch.device("cpu")).step(paged_rows(case)):
            got = case.run(flashinfer.or_else(never))
    expected = case.run(reference.paged_attention, torch.float32)
    torch.testing.assert_close(got.float(), expected, **TOLERANCE)


def test_layers_of_a_kind_share_a_plan_and_the_next_step_has_its_own(package: list[str]) -> None:
    planned, attend = PlannedAttention(torch.device("cpu")), flashinfer.or_else(never)
    for chunks in ([(4, 3), (0, 2)], [(7, 1), (2, 1)], [(8, 1), (3, 1)]):
        sizes = {"kv_heads": 2, "group": 2, "head_dim": 64, "block_size": 4, "seed": 1}
        case = dense_case(chunks, **sizes, options={})
        sliding = dense_case(chunks, **sizes, options={"window": 5})
        package.clear()
        with planned.step(paged_rows(case)):
            for layer in (case, sliding, case, sliding):
                expected = layer.run(reference.paged_attention, torch.float32)
                torch.testing.assert_close(layer.run(attend).float(), expected, **TOLERANCE)
        assert package == ["plan", "run", "plan", "run", "run", "run"]


def test_what_flashinfer_does_not_compute_goes_to_the_fallback(package: list[str]) -> None:
    sizes = {"kv_heads": 1, "group": 2, "block_size": 4, "seed": 1}
    narrow = dense_case([(3, 2)], head_dim=32, options={}, **sizes)
    sinks = dense_case([(3, 2)], head_dim=64, options={"sinks": torch.zeros(2)}, **sizes)
    wide = dense_case([(3, 2)], head_dim=64, options={}, **sizes)
    wide.tensors = {name: t.float() if t.is_floating_point() else t for name, t in wide.tensors.items()}
    int8 = dense_case([(3, 2)], head_dim=64, options={}, **sizes)
    int8.tensors["kv"] = torch.zeros(*int8.tensors["kv"].shape[:3], 4 * (64 + 4), dtype=torch.uint8)
    outside = dense_case([(3, 2)], head_dim=64, options={}, **sizes)
    attend = flashinfer.or_else(reference.paged_attention)
    for case in (narrow, sinks, wide, int8):
        with PlannedAttention(torch.device("cpu")).step(paged_rows(case)):
            assert torch.equal(case.run(attend), case.run(reference.paged_attention))
    assert torch.equal(outside.run(attend), outside.run(reference.paged_attention))
    assert not package


class _Forward:
    """A decoder whose attention is planned, and which never falls back."""

    def __init__(self, decoder: Any, kv: KVMemory, planned: PlannedAttention) -> None:
        self.spec = decoder.spec
        self._run = DeviceForward(
            decoder, kv, max_rows=64, max_requests=8, max_context=64, num_spare_blocks=SPARE_BLOCKS, capture=None,
            planned_attention=planned,
        ).run  # fmt: skip

    def forward(self, batch: ForwardBatch, kv: KVMemory) -> Tensor:
        return self._run(batch)


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SIZES, head_dim=64, sliding_window=6),
        Qwen2Config(
            **(SIZES | {"hidden_size": 256}), use_sliding_window=True, sliding_window=6, max_window_layers=2
        ),
    ],
    ids=["all layers slide", "one layer slides"],
)  # fmt: skip
def test_a_model_by_plans_equals_the_model(
    config: Any, tmp_path: Any, package: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = load_decoder(save_model(config, tmp_path), precision="bfloat16")
    monkeypatch.setattr(decoder, "native", None)
    plain, planned = PagedRunner(decoder, block_size=4), PagedRunner(decoder, block_size=4)
    for runner in (plain, planned):
        runner.free = [block for block in runner.free if block < len(runner.kv.pages) - SPARE_BLOCKS]
    attention = ops._paged_attention
    by_plan: Callable[..., Tensor] = flashinfer.or_else(never)
    monkeypatch.setattr(ops, "_paged_attention", by_plan)
    planned.decoder = _Forward(decoder, planned.kv, PlannedAttention(torch.device("cpu")))  # type: ignore[assignment]
    assert package.count("run") == 2 * config.num_hidden_layers, "tried as a decode step and as a prompt"
    steps: list[dict[int, list[int]]] = [
        {0: [5, 6, 7, 8, 9], 1: [10]}, {0: [11], 1: [12]}, {0: [13], 1: [14, 15, 16], 2: [17, 18]},
        {0: [19], 1: [20], 2: [21]},
    ]  # fmt: skip
    for chunks in steps:
        monkeypatch.setattr(ops, "_paged_attention", attention)
        expected = plain.step(chunks)
        monkeypatch.setattr(ops, "_paged_attention", by_plan)
        got = planned.step(chunks)
        assert torch.nn.functional.cosine_similarity(got.float(), expected.float(), dim=-1).min() > 0.995


def test_an_installation_that_does_not_run_is_done_without(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)  # importing it fails
    decoder = load_decoder(save_model(MistralConfig(**SIZES, head_dim=64), tmp_path), precision="bfloat16")
    monkeypatch.setattr(decoder, "native", None)
    attention = ops._paged_attention
    monkeypatch.setattr(ops, "_paged_attention", flashinfer.or_else(attention))
    plain, runner = PagedRunner(decoder, block_size=4), PagedRunner(decoder, block_size=4)
    for each in (plain, runner):
        each.free = [block for block in each.free if block < len(each.kv.pages) - SPARE_BLOCKS]
    with pytest.warns(UserWarning, match="FlashInfer is installed but does not run"):
        runner.decoder = _Forward(decoder, runner.kv, PlannedAttention(torch.device("cpu")))  # type: ignore[assignment]
    assert torch.equal(runner.step({0: [5, 6, 7]}), plain.step({0: [5, 6, 7]}))


def _names(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize("name", stand_in.PARAMETERS)
def test_the_stand_in_has_parameters_of_flashinfer(name: str) -> None:
    wrapper, method = name.split(".")
    recorded = stand_in.PARAMETERS[name].split()
    parameters = inspect.signature(getattr(getattr(stand_in, wrapper), method)).parameters
    by_place = [p for p, parameter in parameters.items() if parameter.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert by_place == recorded[: len(by_place)]
    assert set(parameters) <= set(recorded)


@pytest.mark.gpu
@pytest.mark.parametrize("name", stand_in.PARAMETERS)
def test_flashinfer_has_the_recorded_parameters(name: str) -> None:
    package = pytest.importorskip("flashinfer")
    wrapper, method = name.split(".")
    function = getattr(getattr(package, wrapper), method)
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(function).parameters.values()):
        function = getattr(getattr(package, wrapper), f"_{method}_impl")
    assert _names(function) == stand_in.PARAMETERS[name].split()


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.parametrize("options", [{}, {"window": 70}, {"softcap": 5.0}])
def test_flashinfer_equals_the_reference(options: dict[str, Any], rows: int, head_dim: int) -> None:
    pytest.importorskip("flashinfer")
    device = torch.device("cuda")
    case = dense_case(
        [(0, rows), (500, 1), (1300, rows)], kv_heads=2, group=3, head_dim=head_dim, block_size=16, seed=2,
        options=options,
    )  # fmt: skip
    expected = case.run(reference.paged_attention, torch.float32)
    rows_of_step = paged_rows(case)
    case.tensors = {name: there(tensor) for name, tensor in case.tensors.items()}
    with PlannedAttention(device).step(rows_of_step):
        first, second = (case.run(flashinfer.or_else(never)) for _ in range(2))
    torch.testing.assert_close(first.cpu().float(), expected, **TOLERANCE)
    assert torch.equal(first, second)
