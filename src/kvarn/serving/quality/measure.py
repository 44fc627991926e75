"""Measures what reuse does to a model's answers: the engine as it serves, its sampler told what to say.

The exact engine answers the tasks of a group; what it said and how likely it held every token of the vocabulary each
time is the reference. Then the same tasks are served with segments reused, each agent made to say what the reference
said, and its distributions are compared with the reference's token by token. Questions are answered freely both times.

Every way of reuse is a tenant of its own, so none finds what another has computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np
import torch

from kvarn.errors import KvarnError
from kvarn.kernels import ops
from kvarn.serving.assemble import LoadedEngine
from kvarn.serving.batch import SampledToken
from kvarn.serving.executors.torch_executor import TorchExecutor
from kvarn.serving.quality.figures import Quality
from kvarn.serving.quality.groups import Group, Prompt
from kvarn.serving.request import Request
from kvarn.serving.rounds.hints import RoundHint
from kvarn.serving.rounds.settings import ReuseSettings
from kvarn.serving.sampling.params import SamplingParams
from kvarn.serving.sampling.sampler import Sampler
from kvarn.serving.speculation import Speculator

_TASK_TOKENS = 32
"""Compared for each task."""
_ANSWER_TOKENS = 8
_TENANTS = count()
"""One for each way and group, whatever else the engine has measured."""


@dataclass(slots=True)
class _Heard:
    """What one request said, and its distributions."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[torch.Tensor] = field(default_factory=list)


class _Dictation(Sampler):
    """Lets requests say what they are told, or what is likeliest, and notes the distributions of some."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self.told: dict[str, list[int]] = {}
        self.noted: dict[str, list[torch.Tensor]] = {}

    def sample(self, logits: torch.Tensor, requests: Sequence[Request]) -> list[SampledToken]:
        tokens: list[int] = ops.largest(logits).tolist()
        for row, request in enumerate(requests):
            if request.id in self.noted:
                self.noted[request.id].append(logits[row].float().log_softmax(0).cpu())
            if request.id in self.told:
                tokens[row] = self.told[request.id][request.num_outputs]
        return [SampledToken(token) for token in tokens]


class _Prompter(Speculator):
    """Drafts what requests are told to say, so that it takes one step."""

    def __init__(self, told: dict[str, list[int]]) -> None:
        super().__init__(_TASK_TOKENS, only_where_it_pays=False)
        self._told = told

    def drafts(self, requests: list[Request], budget: int) -> list[list[int]]:
        left = [self._told.get(each.id, [])[each.num_outputs : each.params.max_tokens - 1] for each in requests]
        return left if sum(map(len, left)) <= budget else [[] for _ in requests]


def measure(
    loaded: LoadedEngine,
    ways: Sequence[ReuseSettings],
    groups: Iterable[Group],
    decode: Callable[[list[int]], str],
    *,
    on_group: Callable[[], None] = lambda: None,
) -> list[Quality]:
    """The quality of each way of reuse; `loaded` is an engine built with any mode of reuse but exact.

    Raises KvarnError when a prompt cannot be served.
    """
    listener = _Listener(loaded)
    tallies = [_Tally() for _ in ways]
    for group in groups:
        exactly = f"measured {next(_TENANTS)}"
        reference = listener.hear(group.tasks, exactly, limit=_TASK_TOKENS)
        found = [
            prompt.answer in decode(heard.tokens)
            for prompt, heard in zip(
                group.questions, listener.hear(group.questions, exactly, limit=_ANSWER_TOKENS), strict=True
            )
        ]
        for way, tally in zip(ways, tallies, strict=True):
            tenant = f"measured {next(_TENANTS)}"
            told = [each.tokens for each in reference]
            heard = listener.hear(group.tasks, tenant, limit=_TASK_TOKENS, way=way, told=told)
            for exact, reused in zip(reference, heard, strict=True):
                tally.compare(exact, reused)
            answers = listener.hear(group.questions, tenant, limit=_ANSWER_TOKENS, way=way)
            for prompt, answer, was_found in zip(group.questions, answers, found, strict=True):
                tally.right += prompt.answer in decode(answer.tokens)
                tally.right_exactly += was_found
            tally.shared += listener.shared
            tally.refreshed += listener.refreshed
        on_group()
    return [tally.quality() for tally in tallies]


class _Listener:
    """Runs rounds on an engine and hears what its members say."""

    def __init__(self, loaded: LoadedEngine) -> None:
        engine = loaded.engine
        if engine.rounds is None or not isinstance(engine.executor, TorchExecutor):
            raise KvarnError("reuse is measured on an engine that reuses segments: load it with a mode of reuse")
        self._engine, self._rounds, self._eos = engine, engine.rounds, loaded.spec.eos_tokens
        self._sampler = engine.executor.sampler = _Dictation(loaded.spec.vocab_size)
        engine.speculator = _Prompter(self._sampler.told)
        self.shared = self.refreshed = 0
        """Tokens of shared segments in the last round, and those computed anew."""

    def hear(
        self,
        prompts: Sequence[Prompt],
        tenant: str,
        *,
        limit: int,
        way: ReuseSettings | None = None,
        told: Sequence[list[int]] | None = None,
    ) -> list[_Heard]:
        """Serve prompts as one round, `way` None: exactly. With `told`, or exactly, distributions are noted."""
        engine, sampler = self._engine, self._sampler
        params = SamplingParams(temperature=0.0, max_tokens=limit)
        heard: dict[str, _Heard] = {}
        reused = self._rounds.counters.reused_tokens
        if way is not None:
            self._rounds.settings = way
        for i, prompt in enumerate(prompts):
            id = f"{tenant} {limit} {i}"
            heard[id] = each = _Heard()
            if told is not None:
                sampler.told[id] = told[i]
                params = SamplingParams(temperature=0.0, max_tokens=len(told[i]))
            if told is not None or limit == _TASK_TOKENS:
                sampler.noted[id] = each.logprobs
            request = Request.create(
                id, prompt.tokens, params, arrival=engine.clock.now(), eos_tokens=self._eos, tenant=tenant,
                segments=() if way is None else prompt.segments,
                round=None if way is None else RoundHint(f"{tenant} {limit}", len(prompts), id),
            )  # fmt: skip
            engine.add(request)
        while engine.has_work:
            for news in engine.step():
                if news.error is not None:
                    raise KvarnError(f"a round that reuse is measured on failed: {news.error}")
                if news.token is not None:
                    heard[news.request.id].tokens.append(news.token)
        sampler.told.clear()
        sampler.noted.clear()
        total = sum(part.tokens for prompt in prompts for part in prompt.segments if part.kind == "shared")
        self.shared, self.refreshed = total, total - (self._rounds.counters.reused_tokens - reused)
        return list(heard.values())


@dataclass(slots=True)
class _Tally:
    divergences: list[float] = field(default_factory=list)
    same: int = 0
    tasks: int = 0
    same_first: int = 0
    exact_nats: float = 0.0
    reused_nats: float = 0.0
    right: int = 0
    right_exactly: int = 0
    shared: int = 0
    refreshed: int = 0

    def compare(self, exact: _Heard, reused: _Heard) -> None:
        p, q = torch.stack(exact.logprobs), torch.stack(reused.logprobs)  # [tokens, vocabulary]
        self.divergences += ((p.exp() * (p - q)).sum(1)).tolist()
        same = p.argmax(1) == q.argmax(1)
        self.same += int(same.sum())
        self.tasks += 1
        self.same_first += bool(same[0])
        said = torch.tensor(exact.tokens)[:, None]
        self.exact_nats -= float(p.gather(1, said).sum())
        self.reused_nats -= float(q.gather(1, said).sum())

    def quality(self) -> Quality:
        total = len(self.divergences)
        return Quality(
            mean_kl=float(np.mean(self.divergences)),
            p95_kl=float(np.quantile(self.divergences, 0.95)),
            top1=self.same / total,
            first=self.same_first / self.tasks,
            perplexity_ratio=float(np.exp((self.reused_nats - self.exact_nats) / total)),
            needle=self.right / self.right_exactly if self.right_exactly else None,
            questions=self.right_exactly,
            tokens=total,
            refreshed=self.refreshed / self.shared if self.shared else 0.0,
        )
