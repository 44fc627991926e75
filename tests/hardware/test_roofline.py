"""Step times: known limits, and laws that hold for every batch."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvarn.hardware.accelerators import known_accelerators, load_accelerator
from kvarn.hardware.models import load_model_shape
from kvarn.hardware.roofline import Roofline, Work, query_key_pairs

LLAMA = load_model_shape("llama3-8b")
ROWS = st.lists(st.tuples(st.integers(0, 20_000), st.integers(1, 2048)), min_size=1, max_size=20)
DEVICES = st.sampled_from(list(known_accelerators().values()))


def llama_on(name: str) -> Roofline:
    return Roofline(load_accelerator(name), LLAMA)


def test_decoding_one_sequence_takes_as_long_as_reading_the_weights() -> None:
    h100 = load_accelerator("h100")
    read = (LLAMA.num_weights - LLAMA.head_weights) * 2 / (h100.memory_bandwidth * h100.weights_share)
    seconds = llama_on("h100").step_seconds(Work.of([(100, 1)], 1))
    assert seconds - h100.step_seconds == pytest.approx(read, rel=0.01)
    assert 5e-3 < seconds < 8e-3


def test_a_long_prompt_takes_as_long_as_its_operations() -> None:
    h100 = load_accelerator("h100")
    operations = LLAMA.linear_flops * 4096 / (h100.flops * h100.compute_share)
    attention = LLAMA.attention_flops * 4096 * 4097 / 2 / (h100.flops * h100.attention_share)
    assert llama_on("h100").step_seconds(Work.of([(0, 4096)], 1)) == pytest.approx(operations + attention, rel=0.05)


def test_decode_attention_reads_every_key_and_value() -> None:
    h100 = load_accelerator("h100")
    short, long = (llama_on("h100").step_seconds(Work.of([(past, 1)] * 64, 64)) for past in (100, 4100))
    read = 64 * 4000 * LLAMA.kv_bytes_per_token() / (h100.memory_bandwidth * h100.kv_share)
    assert long - short == pytest.approx(read)


def test_pools_are_as_large_as_the_published_setups() -> None:
    """Source: TokenFlow's setups, back-solved: about 50k tokens on a 4090 at 0.88, 200-221k on an H200 at 0.3."""
    assert llama_on("rtx4090").kv_tokens(0.88) == pytest.approx(50_000, rel=0.02)
    assert 200_000 < llama_on("h200").kv_tokens(0.3) < 225_000
    assert llama_on("rtx4090").kv_tokens(0.5) == 0


def test_nothing_takes_no_time() -> None:
    assert llama_on("h100").step_seconds(Work()) == 0.0


@given(st.integers(0, 50), st.integers(1, 50))
def test_pairs_are_those_of_causal_attention(past: int, count: int) -> None:
    assert query_key_pairs(past, count) == sum(past + i + 1 for i in range(count))


@given(ROWS, DEVICES, st.data())
def test_more_tokens_are_never_cheaper(rows: list[tuple[int, int]], device, data) -> None:
    """Law: another token in any row, another row, and a longer context each cost at least nothing."""
    roofline = Roofline(device, LLAMA)
    before = roofline.step_seconds(Work.of(rows, len(rows)))
    which = data.draw(st.integers(0, len(rows) - 1))
    past, count = rows[which]
    more = data.draw(st.sampled_from(["token", "row", "context", "sample"]))
    rows = list(rows)
    if more == "row":
        rows.append((past, count))
    elif more != "sample":
        rows[which] = (past, count + 1) if more == "token" else (past + 1, count)
    after = roofline.step_seconds(Work.of(rows, len(rows) + (more == "sample")))
    assert after >= before * (1 - 1e-12)


@given(ROWS, DEVICES)
def test_batching_is_never_dearer_than_one_by_one(rows: list[tuple[int, int]], device) -> None:
    """Law: sharing the reading of weights and the overhead of a step only saves."""
    roofline = Roofline(device, LLAMA)
    together = roofline.step_seconds(Work.of(rows, len(rows)))
    assert together <= sum(roofline.step_seconds(Work.of([row], 1)) for row in rows) * (1 + 1e-12)


@given(ROWS, st.sampled_from([("h100", "h200"), ("a6000", "a100-80")]))
def test_a_better_device_is_never_slower(rows: list[tuple[int, int]], pair: tuple[str, str]) -> None:
    slow, fast = (llama_on(name).step_seconds(Work.of(rows, len(rows))) for name in pair)
    assert fast <= slow


@given(ROWS)
def test_smaller_weights_and_caches_are_never_slower(rows: list[tuple[int, int]]) -> None:
    device = load_accelerator("h100")
    work = Work.of(rows, len(rows))
    usual = Roofline(device, LLAMA).step_seconds(work)
    assert Roofline(device, LLAMA, weight_bytes=1.0).step_seconds(work) <= usual
    assert Roofline(device, LLAMA, kv_bytes=1.0).step_seconds(work) <= usual
