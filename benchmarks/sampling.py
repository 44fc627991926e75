"""What sampling costs a step: `python -m benchmarks.sampling [--json] [--seconds S] [--vocab V]`.

Milliseconds a call of `Sampler.sample`, over batches of 1, 32 and 256 and the kinds of request there are, beside the
same choice written with torch as transformers writes it: sorting the rows where a truncation asks for it. The two
take turns. Logits are peaked as a language model's are: normal noise and, in each row, 40 tokens that share most of
the mass; "flat" rows have the noise alone and are top-p's worst case. Each figure is the best of several calls;
`foreign_cores` says how much of the machine others used.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from benchmarks import machine

from kvarn.models.sources import resolve
from kvarn.serving.request import Request
from kvarn.serving.sampling.grammar import GrammarFactory
from kvarn.serving.sampling.params import Grammar, SamplingParams
from kvarn.serving.sampling.sampler import Sampler

EOS = 2
BATCHES = (1, 32, 256)
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top-p 0.95": {"temperature": 0.8, "top_p": 0.95},
    "top-p 0.95, flat": {"temperature": 0.8, "top_p": 0.95},
    "top-k 50": {"top_k": 50},
    "min-p 0.05": {"min_p": 0.05},
    "penalties": {"temperature": 0.0, "repetition_penalty": 1.1, "frequency_penalty": 0.5},
    "logprobs 5": {"temperature": 0.0, "logprobs": 5},
    "JSON grammar": {"temperature": 0.0, "grammar": Grammar("json_object")},
}


@dataclass(frozen=True)
class Figure:
    kind: str
    batch: int
    milliseconds: float
    torch_milliseconds: float | None
    """Of the plain torch version; None where there is none."""


def logits_for(batch: int, vocab: int, *, flat: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, vocab, generator=generator)
    if not flat:
        likely = torch.rand(batch, vocab, generator=generator).topk(40, dim=1).indices
        logits.scatter_add_(1, likely, 16.0 - 3.0 * torch.arange(1.0, 41.0).log().expand(batch, -1))
    return logits


def with_torch(logits: torch.Tensor, params: SamplingParams) -> list[int]:
    """The tokens of one step, all rows with the same parameters, as transformers' logit processors choose them."""
    if params.logprobs >= 0:
        logits.log_softmax(dim=1).topk(params.logprobs, dim=1)
    if params.temperature == 0.0:
        return logits.argmax(dim=1).tolist()
    scaled = logits / params.temperature
    if params.top_k:
        scaled = scaled.masked_fill(scaled < scaled.topk(params.top_k, dim=1).values[:, -1:], -torch.inf)
    if params.top_p < 1.0:
        ordered, index = scaled.sort(dim=1)
        dropped = ordered.softmax(dim=1).cumsum(dim=1) <= 1.0 - params.top_p
        scaled = scaled.masked_fill(dropped.scatter(1, index, dropped), -torch.inf)
    if params.min_p:
        probabilities = scaled.softmax(dim=1)
        scaled = scaled.masked_fill(probabilities < params.min_p * probabilities.amax(dim=1, keepdim=True), -torch.inf)
    return torch.multinomial(scaled.softmax(dim=1), 1).squeeze(1).tolist()


def best_milliseconds(kind: str, batch: int, vocab: int, grammars: GrammarFactory, seconds: float) -> Figure:
    """Best calls while the requests, 200 tokens of prompt each, grow by what they sample."""
    ids = itertools.count()
    logits = logits_for(batch, vocab, flat="flat" in kind)
    params = SamplingParams(max_tokens=32, **KINDS[kind])
    comparable = "grammar" not in KINDS[kind] and "repetition_penalty" not in KINDS[kind]

    def begin() -> tuple[Sampler, list[Request]]:
        sampler = Sampler(vocab, grammars)
        requests = [Request.create(f"r{next(ids)}", list(range(200)), params, arrival=0.0) for _ in range(batch)]
        for request in requests:
            sampler.add(request)
        return sampler, requests

    sampler, requests = begin()
    best = best_torch = float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        sampled = sampler.sample(logits, requests)
        best = min(best, time.perf_counter() - started)
        finished = [request.append(each.token) for request, each in zip(requests, sampled, strict=True)]
        if any(finished) or any(each.grammar_done for each in sampled):
            sampler, requests = begin()
        if comparable:
            started = time.perf_counter()
            with_torch(logits, params)
            best_torch = min(best_torch, time.perf_counter() - started)
    return Figure(kind, batch, round(best * 1e3, 3), round(best_torch * 1e3, 3) if comparable else None)


def measure(vocab: int, seconds: float) -> Iterator[Figure]:
    grammars = GrammarFactory(resolve("smollm2").folder / "tokenizer.json", EOS, vocab)
    for kind in KINDS:
        for batch in BATCHES:
            yield best_milliseconds(kind, batch, vocab, grammars, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each figure")
    parser.add_argument("--vocab", type=int, default=49_152, help="number of logits a row")
    options = parser.parse_args()
    load = machine.ForeignLoad()
    figures = list(measure(options.vocab, options.seconds))
    facts = {
        "machine": machine.describe(),
        "threads": torch.get_num_threads(),
        "vocab": options.vocab,
        "foreign_cores": round(load.cores(), 2),
    }
    if options.json:
        print(json.dumps({**facts, "figures": [asdict(figure) for figure in figures]}, indent=2))
        return
    print(f"{options.vocab} logits, {facts['threads']} threads, {facts['foreign_cores']} cores used by others")
    print(f"{'ms a call (torch)':<18}" + "".join(f"{batch:>18}" for batch in BATCHES))
    for kind, group in itertools.groupby(figures, key=lambda figure: figure.kind):
        cells = [f"{each.milliseconds:.3f} ({each.torch_milliseconds or '-'})" for each in group]
        print(f"{kind:<18}" + "".join(f"{text:>18}" for text in cells))


if __name__ == "__main__":
    main()
