"""The definitions behind the side-by-side figures, on token times worked out by hand."""

from __future__ import annotations

import pytest

from kvarn.bench.offline import Reading, Workload, decode_rate, measure, prefill_rate, random_prompts
from kvarn.errors import KvarnError


def test_decode_counts_from_when_every_sequence_has_begun() -> None:
    """The first sequence's early tokens fall into the others' prefill and do not count."""
    assert decode_rate([[1.0, 1.5, 2.0, 3.0], [2.0, 3.0, 4.0]]) == pytest.approx(3 / 2.0)
    assert decode_rate([[0.5, 1.0, 1.5]]) == pytest.approx(2.0)
    with pytest.raises(KvarnError, match="at least 2"):
        decode_rate([[1.0]])


def test_prefill_is_over_when_the_last_sequence_has_its_first_token() -> None:
    assert prefill_rate([[1.0], [2.0]], prompt_tokens=256) == pytest.approx(128.0)


def test_measuring_takes_medians_with_new_prompts_every_time() -> None:
    seen: list[tuple[int, int, int]] = []
    contents: set[tuple[int, ...]] = set()
    pace = iter([1.0, 1.0, 9.0, 2.0, 1.0, 2.0, 8.0])

    def generate(prompts: list[list[int]], output_tokens: int) -> list[list[float]]:
        seen.append((len(prompts), len(prompts[0]), output_tokens))
        contents.update(map(tuple, prompts))
        step = next(pace)
        return [[step * (j + 1) for j in range(output_tokens)] for _ in prompts]

    heard: list[Reading] = []
    workload = Workload(batches=(2,), input_tokens=5, output_tokens=4, prefills=(16,), repeats=3)
    readings = measure(generate, workload, on_reading=heard.append)
    assert readings == heard
    assert [(one.kind, one.size) for one in readings] == [("decode", 2), ("prefill", 16)]
    assert readings[0].repeats == pytest.approx((2.0, 2 / 9, 1.0))
    assert readings[0].tokens_per_second == pytest.approx(1.0)
    assert readings[1].tokens_per_second == pytest.approx(8.0)
    assert seen == [(2, 5, 8), *[(2, 5, 4)] * 3, *[(1, 16, 1)] * 3]
    assert len(contents) == 2 * 4 + 3


def test_random_prompts_share_nothing_and_repeat_with_their_seed() -> None:
    one, two = random_prompts(2, 64, [3])
    assert one[:8] != two[:8]
    assert random_prompts(2, 64, [3]) == [one, two]
