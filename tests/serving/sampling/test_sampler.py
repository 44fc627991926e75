"""The sampler as the engine uses it: what each parameter does to one request, and that requests do not mix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from kvarn.errors import RequestError
from kvarn.serving.request import Request
from kvarn.serving.sampling.params import Grammar
from kvarn.serving.sampling.sampler import Sampler

from .making import EOS, make_request

VOCAB = 500


def sample(logits: Tensor, requests: list[Request]) -> list[int]:
    sampler = Sampler(logits.shape[1])
    for request in requests:
        sampler.add(request)
    return [sampled.token for sampled in sampler.sample(logits, requests)]


def penalised(logits: NDArray[np.float32], request: Request) -> NDArray[np.float64]:
    """The definition, token by token."""
    params = request.params
    prompt = request.tokens[: request.prompt_length].tolist()
    output = request.tokens[request.prompt_length : request.num_tokens].tolist()
    result = logits.astype(np.float64)
    for token, bias in params.logit_bias.items():
        result[token] += bias
    for token in set(prompt) | set(output):
        result[token] *= params.repetition_penalty ** (-1 if result[token] > 0 else 1)
    for token in set(output):
        result[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    if len(output) < params.min_tokens:
        result[list(request.stop_tokens)] = -np.inf
    return result


def test_greedy_takes_the_largest_logit_and_the_lowest_id_of_a_tie() -> None:
    logits = torch.randn(3, VOCAB)
    logits[1, [7, 70, 300]] = 50.0
    requests = [make_request(temperature=0.0) for _ in range(3)]
    assert sample(logits, requests) == [int(logits[0].argmax()), 7, int(logits[2].argmax())]


def test_top_p_of_zero_keeps_the_most_likely_token_alone() -> None:
    logits = torch.randn(20, VOCAB)
    requests = [make_request(temperature=1.5, top_p=0.0) for _ in range(20)]
    assert sample(logits, requests) == logits.argmax(dim=1).tolist()


def test_a_batch_larger_than_is_worked_on_at_once_keeps_its_order() -> None:
    logits = torch.randn(70, 49152, generator=torch.Generator().manual_seed(2))
    requests = [make_request(temperature=0.0, logprobs=0 if row % 3 else -1) for row in range(70)]
    assert sample(logits, requests) == logits.argmax(dim=1).tolist()


@given(
    seed=st.integers(0, 2**32 - 1),
    repetition=st.sampled_from([1.0, 0.5, 1.3]),
    frequency=st.sampled_from([0.0, -1.0, 0.7]),
    presence=st.sampled_from([0.0, 1.5]),
    min_tokens=st.sampled_from([0, 30]),
)
@settings(max_examples=40, deadline=None)
def test_edits_change_logits_as_defined_while_outputs_grow(
    seed: int, repetition: float, frequency: float, presence: float, min_tokens: int
) -> None:
    """Greedy decoding by the definition, recomputed from scratch each step, and by the sampler's counts agree."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 30, size=20).tolist() for _ in range(3)]
    bias = {int(token): float(rng.normal()) for token in rng.integers(0, 30, size=4)}
    requests = [
        make_request(prompt, temperature=0.0, repetition_penalty=repetition, frequency_penalty=frequency,
             presence_penalty=presence, min_tokens=min_tokens, logit_bias=bias)
        for prompt in prompts
    ]  # fmt: skip
    sampler = Sampler(30)
    for request in requests:
        sampler.add(request)
    for _ in range(40):
        logits = (rng.standard_normal((3, 30)) * 2).astype(np.float32)
        tokens = [sampled.token for sampled in sampler.sample(torch.from_numpy(logits), requests)]
        for row, request in enumerate(requests):
            assert tokens[row] == penalised(logits[row], request).argmax()
            request.append(tokens[row])


def test_drawn_frequencies_follow_the_distribution() -> None:
    """Chi-square over 5,000 output indexes of one seed, and over 5,000 seeds of one index."""
    logits = torch.linspace(0, 3, 20)
    expected = 5000 * torch.softmax(logits / 0.8, 0).numpy()
    one = make_request(seed=11, temperature=0.8, max_tokens=5000)
    sampler = Sampler(20)
    sampler.add(one)
    over_indexes = []
    for _ in range(5000):
        over_indexes.append(sampler.sample(logits[None], [one])[0].token)
        one.append(over_indexes[-1])
    over_seeds = sample(logits.expand(5000, -1), [make_request(seed=s, temperature=0.8) for s in range(5000)])
    for tokens in (over_indexes, over_seeds):
        counts = np.bincount(tokens, minlength=20)
        assert ((counts - expected) ** 2 / expected).sum() < 45  # 19 degrees of freedom: p = 0.0007


def mixed_requests() -> list[Request]:
    return [
        make_request(temperature=0.0),
        make_request(seed=1),
        make_request(seed=1, temperature=0.7),
        make_request(seed=2, top_k=20),
        make_request(seed=3, top_p=0.8),
        make_request(seed=4, min_p=0.1, top_k=300, top_p=0.95),
        make_request([5, 6, 7], seed=5, repetition_penalty=1.5),
        make_request([5, 6, 7], temperature=0.0, frequency_penalty=1.0, logit_bias={9: 5.0}),
        make_request(seed=6, min_tokens=5, logprobs=2),
        make_request(seed=-7, top_p=0.5, presence_penalty=1.0),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_seeded_request_gets_its_tokens_whatever_the_batch(dtype: torch.dtype) -> None:
    """Ten kinds of request over ten steps: together, alone, and in changing order with steps left out."""
    steps = torch.randn(10, 10, VOCAB, generator=torch.Generator().manual_seed(5)).mul(3).to(dtype)

    def run(schedule: list[list[int]]) -> list[list[int]]:
        requests = mixed_requests()
        sampler = Sampler(VOCAB)
        for request in requests:
            sampler.add(request)
        for members in schedule:
            batch = [requests[member] for member in members]
            logits = torch.stack(
                [steps[request.num_outputs, member] for member, request in zip(members, batch, strict=True)]
            )
            for request, sampled in zip(batch, sampler.sample(logits, batch), strict=True):
                request.append(sampled.token)
        return [request.tokens[request.prompt_length : request.num_tokens].tolist() for request in requests]

    together = run([list(range(10))] * 10)
    alone = run([[member] for member in range(10) for _ in range(10)])
    rng = np.random.default_rng(0)
    left = np.full(10, 10)
    scattered = []
    while left.any():
        members = rng.permutation([m for m in range(10) if left[m] and rng.random() < 0.5]).astype(int).tolist()
        left[members] -= 1
        scattered += [members] if members else []
    assert together == alone == run(scattered)


def test_the_same_seed_draws_anew_at_every_output_index_and_unset_seeds_differ() -> None:
    flat = torch.zeros(1, 10000)
    request = make_request(seed=9)
    sampler = Sampler(10000)
    sampler.add(request)
    drawn = []
    for _ in range(50):
        drawn.append(sampler.sample(flat, [request])[0].token)
        request.append(drawn[-1])
    assert len(set(drawn)) > 45
    assert len(set(sample(flat.expand(50, -1), [make_request() for _ in range(50)]))) > 45


def test_logprobs_are_the_models_own_whatever_is_done_to_the_logits() -> None:
    logits = torch.randn(4, VOCAB) * 3
    before = logits.clone()
    requests = [
        make_request(logprobs=5, temperature=0.3, seed=1),
        make_request(logprobs=0, logit_bias={3: 100.0}, temperature=0.0),
        make_request(seed=2),
        make_request([4, 5], logprobs=20, top_k=2, repetition_penalty=2.0, seed=4),
    ]
    sampler = Sampler(VOCAB)
    for request in requests:
        sampler.add(request)
    results = sampler.sample(logits, requests)
    assert torch.equal(logits, before)
    assert results[2].logprobs is None
    reference = torch.log_softmax(logits.double(), dim=1)
    for row, count in ((0, 5), (1, 0), (3, 20)):
        reported = results[row].logprobs
        assert reported is not None
        assert reported.logprob == pytest.approx(float(reference[row, results[row].token]), abs=1e-4)
        best = reference[row].topk(count)
        assert [token for token, _ in reported.top] == best.indices.tolist()
        assert [value for _, value in reported.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert results[1].token == 3


def test_min_tokens_bans_every_stop_token_until_it_is_reached() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, EOS], logits[0, 40], logits[0, 41] = 30.0, 20.0, 10.0
    request = make_request(temperature=0.0, min_tokens=2, stop_token_ids=(40,))
    sampler = Sampler(VOCAB)
    sampler.add(request)
    for expected in (41, 41, EOS):
        (sampled,) = sampler.sample(logits, [request])
        assert sampled.token == expected
        request.append(expected)


def test_a_logit_bias_of_100_decides_and_of_minus_100_forbids() -> None:
    logits = torch.randn(2, VOCAB)
    best = int(logits[1].argmax())
    requests = [make_request(logit_bias={77: 100.0}), make_request(logit_bias={best: -100.0}, temperature=0.0)]
    forced, other = sample(logits, requests)
    assert forced == 77
    assert other == int(logits[1].topk(2).indices[1])


def test_removed_requests_leave_nothing_behind_and_impossible_ones_are_refused() -> None:
    sampler = Sampler(VOCAB)
    request = make_request()
    sampler.add(request)
    sampler.remove(request)
    with pytest.raises(KeyError):
        sampler.sample(torch.zeros(1, VOCAB), [request])
    with pytest.raises(RequestError, match="logit_bias names token 500"):
        sampler.add(make_request(logit_bias={VOCAB: 1.0}))
    with pytest.raises(RequestError, match="cannot constrain") as caught:
        sampler.add(make_request(grammar=Grammar("json_object")))
    assert caught.value.field == "response_format"
