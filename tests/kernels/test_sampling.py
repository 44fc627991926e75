"""Draws against a slow oracle in numpy that sorts, in float64: every native version, and the reference."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from kvarn.kernels import ops, reference

Probabilities = NDArray[np.float64]
CLOSE = 1e-5
"""Cumulative masses nearer to top_p than this may be cut on either side: weights are float32."""
BELOW_ONE = 1.0 - 2.0**-52
by_hypothesis = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", params=[*ops.native_variants(), "reference"])
def kernels(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """Where `sample`, `largest` and `token_logprobs` are taken from."""
    before = ops.native_kernels()
    if request.param == "reference":
        yield reference
        return
    ops.use_native_variant(request.param)
    yield ops
    assert before is not None
    ops.use_native_variant(before)


def sample(
    kernels: ModuleType,
    logits: Tensor,
    uniform: Tensor | Probabilities,
    *,
    temperature: float | list[float] = 1.0,
    top_k: int | list[int] = 0,
    top_p: float | list[float] = 1.0,
    min_p: float | list[float] = 0.0,
) -> list[int]:
    rows = len(logits)

    def column(value: float | list[float] | list[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(value if isinstance(value, list) else [value] * rows, dtype=dtype)

    drawn: Tensor = kernels.sample(
        logits, column(temperature, torch.float64), column(top_k, torch.int64), column(top_p, torch.float64),
        column(min_p, torch.float64), torch.as_tensor(uniform),
    )  # fmt: skip
    return drawn.tolist()


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
    temperature=st.sampled_from([1.0, 0.5, 2.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    tied=st.booleans(),
)
@settings(by_hypothesis, max_examples=100)
def test_every_kept_token_owns_exactly_its_probability(
    kernels: ModuleType, seed: int, vocab: int, spread: float, top_k: int, top_p: float, min_p: float,
    temperature: float, dtype: torch.dtype, tied: bool,
) -> None:  # fmt: skip
    """A draw inverts the cumulative distribution, so token t owns the uniforms from cdf(t - 1) to cdf(t): near both
    ends of that interval of the oracle's, t is drawn. So the kept set and the probabilities are the oracle's."""
    logits = (np.random.default_rng(seed).standard_normal(vocab) * spread).astype(np.float32)
    if tied:
        logits = np.round(logits * 2) / 2  # bfloat16 models tie all the time
    logits = torch.from_numpy(logits).to(dtype).float().numpy()
    expected, near = oracle(logits / temperature, top_k := min(top_k, vocab), top_p, min_p)
    if near:
        return
    cumulative = np.cumsum(expected)
    starts = np.concatenate([[0.0], cumulative[:-1]])
    margin = np.minimum(1e-6, expected / 4)
    kept = np.flatnonzero(expected > 1e-6)[:: max(1, vocab // 100)]  # of a large set, every so many
    points = np.concatenate([(starts + margin)[kept], (cumulative - margin)[kept]]).clip(0, BELOW_ONE)
    rows = torch.from_numpy(logits).to(dtype).expand(len(points), -1)
    drawn = sample(kernels, rows, points, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assert drawn == [*kept, *kept]


@pytest.mark.parametrize("vocab", [1, 255, 256, 257, 1000, 49152])
def test_a_draw_from_everything_inverts_the_whole_distribution(kernels: ModuleType, vocab: int) -> None:
    logits = np.random.default_rng(vocab).standard_normal(vocab).astype(np.float32)
    cumulative = np.cumsum(softmax(logits.astype(np.float64)))
    uniform = np.random.default_rng(1).random(200)
    drawn = sample(kernels, torch.from_numpy(logits).expand(200, -1), uniform)
    low = np.concatenate([[0.0], cumulative])[drawn]
    assert np.all((low - 1e-6 <= uniform) & (uniform <= cumulative[drawn] + 1e-6))


@given(
    seed=st.integers(0, 2**32 - 1),
    peaks=st.sampled_from([0, 3, 40, 3000]),
    top_k=st.sampled_from([0, 50, 2000, 40000]),
    top_p=st.sampled_from([0.1, 0.9, 0.9999, 1.0]),
)
@settings(by_hypothesis, max_examples=20)
def test_rows_of_a_real_vocabulary_keep_what_the_reference_keeps(
    kernels: ModuleType, seed: int, peaks: int, top_k: int, top_p: float
) -> None:
    """Over flat and peaked rows, the first and the last token kept are the reference's."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 49152, generator=generator)
    logits[:, torch.randperm(49152, generator=generator)[:peaks]] += 9.0
    logits[1:, 30000:40000] = -torch.inf  # as a grammar leaves it
    for uniform in (0.0, BELOW_ONE):
        ends = torch.full((4,), uniform, dtype=torch.float64)
        drawn, expected = (sample(each, logits, ends, top_k=top_k, top_p=top_p) for each in (kernels, reference))
        assert drawn == expected


@pytest.mark.parametrize("vocab", [1, 32, 50, 1024, 49152])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_largest_is_the_first_of_the_maxima(kernels: ModuleType, vocab: int, dtype: torch.dtype) -> None:
    wide = torch.randint(-3, 4, (50, vocab + 7), generator=torch.Generator().manual_seed(vocab)).to(dtype)
    logits = wide[:, :vocab]
    expected = logits.float().numpy().argmax(axis=1).tolist()
    assert kernels.largest(logits).tolist() == expected
    assert sample(kernels, logits, torch.rand(50).double(), temperature=0.0, top_k=3, top_p=0.5) == expected


def test_extreme_uniforms_stay_on_tokens_with_mass(kernels: ModuleType) -> None:
    logits = torch.full((2, 1000), -torch.inf)
    logits[:, 400:600] = torch.randn(200)
    edges = torch.tensor([0.0, BELOW_ONE], dtype=torch.float64)
    for top_p in (1.0, 0.999999):
        first, last = sample(kernels, logits, edges, top_p=top_p)
        assert 400 <= first <= last < 600
    assert sample(kernels, logits, edges) == [400, 599]
    assert sample(kernels, logits, edges, top_k=500) == [400, 599]


def test_ties_with_the_last_kept_token_are_kept(kernels: ModuleType) -> None:
    """2,000 tokens tie for the second place: top_k=2 keeps all of them, and so does a top_p that ends there."""
    logits = torch.full((400, 5000), -20.0)
    logits[:, 1000:3000] = 1.0
    logits[:, 4000] = 2.0
    uniform = torch.linspace(0, 0.999, 400, dtype=torch.float64)
    for kept in ({"top_k": 2}, {"top_p": 0.01}):
        drawn = set(sample(kernels, logits, uniform, **kept))  # type: ignore[arg-type]
        assert drawn <= set(range(1000, 3000)) | {4000}
        assert len(drawn) > 300


def test_a_row_does_not_depend_on_its_neighbours(kernels: ModuleType, three_threads: None) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(24, 20000, generator=generator) * 3
    uniform = torch.rand(24, dtype=torch.float64, generator=generator)
    each: dict[str, list[float]] = {
        "temperature": [0.0, 0.5, 1.0, 1.5] * 6,
        "top_k": [0, 5, 100, 0] * 6,
        "top_p": [0.9, 1.0, 0.7] * 8,
        "min_p": [0.0, 0.1] * 12,
    }
    together = sample(kernels, logits, uniform, **each)  # type: ignore[arg-type]
    alone = [
        sample(kernels, logits[[row]], uniform[[row]], **{name: [values[row]] for name, values in each.items()})[0]  # type: ignore[arg-type]
        for row in range(24)
    ]
    assert together == alone


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", [slice(None), slice(5, 6), slice(10, 200)])
def test_rows_that_are_not_finite_give_some_token(kernels: ModuleType, broken: float, where: slice) -> None:
    logits = torch.randn(3, 300)
    logits[1, where] = broken
    for kept in ({}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.1}, {"temperature": 0.0}):
        drawn = sample(kernels, logits, torch.tensor([0.3, 0.5, 0.9]).double(), **kept)  # type: ignore[arg-type]
        alone = sample(kernels, logits[[0, 2]], torch.tensor([0.3, 0.9]).double(), **kept)  # type: ignore[arg-type]
        assert [drawn[0], drawn[2]] == alone
        assert 0 <= drawn[1] < 300


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocab", "count"), [(1, 1), (40, 0), (40, 40), (1000, 20), (49152, 5)])
def test_logprobs_are_those_of_a_log_softmax(kernels: ModuleType, vocab: int, count: int, dtype: torch.dtype) -> None:
    logits = (torch.randn(6, vocab, generator=torch.Generator().manual_seed(vocab)) * 4).to(dtype)
    tokens = torch.arange(6) % vocab
    expected = logits.double().log_softmax(dim=1)
    chosen, ids, values = kernels.token_logprobs(logits, tokens, count)
    tight = {"atol": 2e-6, "rtol": 1e-6, "check_dtype": False}
    torch.testing.assert_close(chosen, expected.gather(1, tokens[:, None]).squeeze(1), **tight)
    torch.testing.assert_close(values, expected.topk(count).values, **tight)
    torch.testing.assert_close(values, expected.gather(1, ids), **tight)
    assert all(len(set(row)) == count for row in ids.tolist())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 5, dtype=torch.float16),), "float32 or bfloat16"),
        ((torch.zeros(5),), r"\[R, V\]"),
        ((torch.zeros(2, 0),), "at least one logit"),
        ((torch.zeros(2, 5), torch.tensor([0, 5]), 1), r"tokens in \[0, 5\), got 5 for row 1"),
        ((torch.zeros(2, 5), torch.tensor([0]), 1), "rows of logits"),
        ((torch.zeros(2, 5), torch.tensor([0, 1]), 6), "count"),
    ],
)
def test_native_kernels_refuse_what_does_not_fit(arguments: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        (ops.largest if len(arguments) == 1 else ops.token_logprobs)(*arguments)
