"""Truncation and draws against a slow oracle in numpy that sorts, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvarn.serving.sampling import draw

Probabilities = NDArray[np.float64]
CLOSE = 1e-5
"""Cumulative masses nearer to top_p than this may be cut on either side: logits are float32."""


def softmax(logits: NDArray[np.float64]) -> Probabilities:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def oracle(logits: NDArray[np.float32], top_k: int, top_p: float, min_p: float) -> tuple[Probabilities, bool]:
    """Probability of each token, one rule after the other; and whether top_p fell too near a boundary to tell."""
    values = logits.astype(np.float64)
    if top_k:
        values = np.where(values >= np.sort(values)[::-1][top_k - 1], values, -np.inf)
    near = False
    if top_p < 1.0:
        probabilities = softmax(values)
        total, cut = 0.0, np.inf
        for token in np.argsort(-values, kind="stable"):
            near |= abs(total - top_p) < CLOSE
            if total >= top_p:
                break
            total, cut = total + probabilities[token], values[token]
        values = np.where(values >= cut, values, -np.inf)
    if min_p:
        largest, ratio = values.max(), np.exp(values - values.max())
        near |= bool(np.any(np.abs(ratio - min_p) < CLOSE * min_p))
        values = np.where(values >= largest + np.log(min_p), values, -np.inf)
    return softmax(values), near


@given(
    seed=st.integers(0, 2**32 - 1),
    vocab=st.sampled_from([5, 63, 300, 700, 9001]),
    spread=st.sampled_from([0.1, 1.0, 4.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 40, 63, 64, 200]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    tied=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_every_kept_token_owns_exactly_its_probability(
    seed: int, vocab: int, spread: float, top_k: int, top_p: float, min_p: float, tied: bool
) -> None:
    """A draw inverts the cumulative distribution, so token t owns the uniforms from cdf(t - 1) to cdf(t): near both
    ends of that interval of the oracle's, t is drawn. So the kept set and the probabilities are the oracle's."""
    logits = (np.random.default_rng(seed).standard_normal(vocab) * spread).astype(np.float32)
    if tied:
        logits = np.round(logits * 2) / 2  # bfloat16 models tie all the time
    top_k = min(top_k, vocab)
    expected, near = oracle(logits, top_k, top_p, min_p)
    if near:
        return
    cumulative = np.cumsum(expected)
    starts = np.concatenate([[0.0], cumulative[:-1]])
    margin = np.minimum(1e-6, expected / 4)
    kept = np.flatnonzero(expected > 1e-6)[:: max(1, vocab // 100)]  # of a large set, every so many
    points = np.concatenate([(starts + margin)[kept], (cumulative - margin)[kept]]).clip(0, 1 - 2**-52)
    count = len(points)
    truncation = draw.Truncation(
        torch.full((count,), top_k),
        torch.full((count,), top_p, dtype=torch.float64),
        torch.full((count,), min_p, dtype=torch.float64),
    )
    rows = torch.from_numpy(np.tile(logits, (count, 1)))
    drawn = draw.draw_truncated(rows, truncation, torch.from_numpy(points))
    assert drawn.tolist() == [*kept, *kept]


@pytest.mark.parametrize("vocab", [1, 255, 256, 257, 1000, 49152])
def test_plain_draw_inverts_the_whole_distribution(vocab: int) -> None:
    logits = np.random.default_rng(vocab).standard_normal(vocab).astype(np.float32)
    cumulative = np.cumsum(softmax(logits.astype(np.float64)))
    uniform = np.random.default_rng(1).random(200)
    drawn = draw.draw(torch.from_numpy(np.tile(logits, (200, 1))), torch.from_numpy(uniform)).numpy()
    low = np.concatenate([[0.0], cumulative])[drawn]
    assert np.all((low - 1e-6 <= uniform) & (uniform <= cumulative[drawn] + 1e-6))


@pytest.mark.parametrize("vocab", [1, 32, 50, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_largest_is_the_first_of_the_maxima(vocab: int, dtype: torch.dtype) -> None:
    logits = torch.randint(-3, 4, (50, vocab), generator=torch.Generator().manual_seed(vocab)).to(dtype)
    assert draw.largest(logits).tolist() == logits.float().numpy().argmax(axis=1).tolist()


def test_extreme_uniforms_stay_on_tokens_with_mass() -> None:
    logits = torch.full((2, 1000), -torch.inf)
    logits[:, 400:600] = torch.randn(200)
    edges = torch.tensor([0.0, 1.0 - 2.0**-52], dtype=torch.float64)
    assert draw.draw(logits.clone(), edges).tolist() == [400, 599]
    keep_all = draw.Truncation(torch.zeros(2, dtype=torch.int64), torch.full((2,), 0.999999), torch.zeros(2).double())
    first, last = draw.draw_truncated(logits, keep_all, edges).tolist()
    assert 400 <= first <= last < 600


def test_ties_with_the_last_kept_token_are_kept_whatever_the_width_of_the_search() -> None:
    """2,000 tokens tie for the second place, more than the candidates looked at first: top_k=2 keeps all of them."""
    logits = torch.full((400, 5000), -20.0)
    logits[:, 1000:3000] = 1.0
    logits[:, 4000] = 2.0
    uniform = torch.linspace(0, 0.999, 400, dtype=torch.float64)
    truncation = draw.Truncation(torch.full((400,), 2), torch.ones(400).double(), torch.zeros(400).double())
    drawn = set(draw.draw_truncated(logits, truncation, uniform).tolist())
    assert drawn <= set(range(1000, 3000)) | {4000}
    assert len(drawn) > 300


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(24, 20000, generator=generator) * 3
    uniform = torch.rand(24, dtype=torch.float64, generator=generator)
    truncation = draw.Truncation(
        torch.tensor([0, 5, 100, 0] * 6),
        torch.tensor([0.9, 1.0, 0.7] * 8).double(),
        torch.tensor([0.0, 0.1] * 12).double(),
    )
    together = draw.draw_truncated(logits, truncation, uniform).tolist()
    alone = [
        int(draw.draw_truncated(logits[[row]], truncation.rows(torch.tensor([row])), uniform[[row]]))
        for row in range(24)
    ]
    assert together == alone


def test_uniforms_are_uniform_and_independent_between_seeds_and_indexes() -> None:
    seeds, indexes = np.meshgrid(np.arange(300, dtype=np.uint64), np.arange(300, dtype=np.uint64))
    numbers = draw.uniforms(seeds.ravel(), indexes.ravel())
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    assert len(np.unique(numbers)) == numbers.size
    counts = np.histogram(numbers, bins=100, range=(0, 1))[0]
    assert ((counts - 900) ** 2 / 900).sum() < 150  # chi-square, 99 degrees of freedom: p = 0.0007
    grid = numbers.reshape(300, 300)
    assert abs(np.corrcoef(grid[:-1].ravel(), grid[1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.02
