"""Turns one step's logits into tokens, each request by its own parameters.

In: logits [R, V] and the R requests they belong to; out: R `SampledToken`s. Logits pass through: grammar mask,
logit_bias, min_tokens, penalties, temperature, top-k, top-p, min-p, draw. Reported logprobs are those of the model
itself: log-softmax of the logits as they came in. The sampler holds per-request state (seed, token counts, place in
the grammar) from `add` to `remove`; the logits are left as they are.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvarn.errors import RequestError
from kvarn.serving.batch import SampledToken, TokenLogprobs
from kvarn.serving.request import Request
from kvarn.serving.sampling import draw
from kvarn.serving.sampling.edits import LogitEdits, add_biases, apply_penalties, ban_stop_tokens
from kvarn.serving.sampling.grammar import GrammarFactory, GrammarMatcher
from kvarn.serving.sampling.params import UNSET_SEED

GREEDY_BELOW = 1e-4
"""Temperatures below this are greedy: logits divided by them would lose what tells tokens apart."""

_CPU_SLAB = 2**21
"""Logits worked on at a time on a CPU."""


@dataclass(slots=True, eq=False)
class _RequestState:
    """What the sampler knows of one request."""

    request: Request
    seed: int
    """As an unsigned 64-bit number."""
    greedy: bool
    truncated: bool
    edits: LogitEdits
    matcher: GrammarMatcher | None

    @property
    def edited(self) -> bool:
        """True when the next token is not chosen from the logits as they come."""
        return self.matcher is not None or self.edits.any


class Sampler:
    """Samples for a model with `vocab_size` logits; without `grammars`, constrained requests are refused."""

    def __init__(self, vocab_size: int, grammars: GrammarFactory | None = None) -> None:
        self.vocab_size = vocab_size
        self._grammars = grammars
        self._states: dict[str, _RequestState] = {}

    def add(self, request: Request) -> None:
        """Start a request's state. Raises RequestError for impossible parameters or a grammar that does not compile."""
        params = request.params
        params.validate(self.vocab_size)
        matcher = None
        if params.grammar is not None:
            if self._grammars is None:
                raise RequestError("this model cannot constrain its output to a grammar", field="response_format")
            matcher = self._grammars.compile(params.grammar)
        seed = secrets.randbits(64) if params.seed == UNSET_SEED else params.seed % 2**64
        # A top_p of 0 keeps the most likely token alone.
        greedy = params.temperature < GREEDY_BELOW or params.top_p == 0.0
        truncated = 0 < params.top_k < self.vocab_size or params.top_p < 1.0 or params.min_p > 0.0
        self._states[request.id] = _RequestState(request, seed, greedy, truncated, LogitEdits(request), matcher)

    def remove(self, request: Request) -> None:
        """Forget a request's state."""
        self._states.pop(request.id, None)

    def sample(self, logits: Tensor, requests: list[Request]) -> list[SampledToken]:
        """The next token of each request, in order, from its row of `logits` [R, V] (any float type and device)."""
        # On a CPU temporaries larger than the allocator keeps are paid for in page faults, several times their use.
        slab = max(1, _CPU_SLAB // self.vocab_size) if logits.device.type == "cpu" else len(requests)
        sampled: list[SampledToken] = []
        for first in range(0, len(requests), slab):
            sampled += self._sample(logits[first : first + slab], requests[first : first + slab])
        return sampled

    def _sample(self, logits: Tensor, requests: list[Request]) -> list[SampledToken]:
        states = [self._states[request.id] for request in requests]
        edited = [row for row, state in enumerate(states) if state.edited]
        if not edited:
            tokens = _choose(logits, states)
        else:
            tokens = [0] * len(states)
            plain = sorted(set(range(len(states))).difference(edited))
            for rows, values in ((plain, _take(logits, plain)), (edited, self._edit(logits, edited, states))):
                for row, token in zip(rows, _choose(values, [states[row] for row in rows]), strict=True):
                    tokens[row] = token
        sampled = [SampledToken(token) for token in tokens]
        _report_logprobs(logits, requests, sampled)
        for row in edited:
            _advance_grammar(states[row], sampled[row])
        return sampled

    def _edit(self, logits: Tensor, rows: list[int], states: list[_RequestState]) -> Tensor:
        """The given rows with every ban, bias and penalty applied [len(rows), V], a copy."""
        values = logits[rows].float()
        edits = [states[row].edits for row in rows]
        self._mask(values, [states[row] for row in rows])
        add_biases(values, edits)
        ban_stop_tokens(values, edits)
        apply_penalties(values, edits)
        return values

    def _mask(self, values: Tensor, states: list[_RequestState]) -> None:
        """Set to -inf, in place, what the rows' grammars forbid."""
        rows = [row for row, state in enumerate(states) if state.matcher is not None]
        if not rows or self._grammars is None:
            return
        allowed = self._grammars.allowed([m for state in states if (m := state.matcher) is not None])
        forbidden = torch.from_numpy(allowed == 0).to(values.device)
        if len(rows) == len(states):
            values.masked_fill_(forbidden, -torch.inf)
        else:
            values[rows] = values[rows].masked_fill_(forbidden, -torch.inf)


def _choose(logits: Tensor, states: Sequence[_RequestState]) -> list[int]:
    """Tokens of rows whose logits need no edit any more."""
    groups: dict[tuple[bool, bool], list[int]] = {}
    for row, state in enumerate(states):
        groups.setdefault((state.greedy, state.truncated and not state.greedy), []).append(row)
    if len(groups) == 1 and states[0].greedy:
        greedy: list[int] = draw.largest(logits).tolist()
        return greedy
    tokens = [0] * len(states)
    for (is_greedy, is_truncated), rows in groups.items():
        values = _take(logits, rows)
        members = [states[row] for row in rows]
        chosen = draw.largest(values) if is_greedy else _draw(values, members, truncated=is_truncated)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            tokens[row] = token
    return tokens


def _draw(logits: Tensor, states: Sequence[_RequestState], *, truncated: bool) -> Tensor:
    """One random token per row [R]."""
    params = [state.request.params for state in states]
    device = logits.device
    seeds = np.array([state.seed for state in states], dtype=np.uint64)
    indexes = np.array([state.request.num_outputs for state in states], dtype=np.uint64)
    uniform = torch.from_numpy(draw.uniforms(seeds, indexes)).to(device)
    heat = torch.tensor([[each.temperature] for each in params], device=device)
    scaled = logits.float() / heat
    if not truncated:
        return draw.draw(scaled, uniform)
    truncation = draw.Truncation(
        top_k=torch.tensor([min(each.top_k, logits.shape[1]) for each in params], device=device),
        top_p=torch.tensor([each.top_p for each in params], dtype=torch.float64, device=device),
        min_p=torch.tensor([each.min_p for each in params], dtype=torch.float64, device=device),
    )
    return draw.draw_truncated(scaled, truncation, uniform)


def _report_logprobs(logits: Tensor, requests: Sequence[Request], sampled: Sequence[SampledToken]) -> None:
    """Fill in `logprobs` of the rows that ask for them, from the unmodified logits."""
    rows = [row for row, request in enumerate(requests) if request.params.logprobs >= 0]
    if not rows:
        return
    logprobs = _take(logits, rows).float().log_softmax(dim=1)
    chosen = logprobs.gather(1, torch.tensor([[sampled[row].token] for row in rows], device=logits.device))
    top = logprobs.topk(min(max(requests[row].params.logprobs for row in rows), logits.shape[1]), dim=1)
    columns = zip(rows, chosen.squeeze(1).tolist(), top.indices.tolist(), top.values.tolist(), strict=True)
    for row, logprob, tokens, values in columns:
        count = requests[row].params.logprobs
        sampled[row].logprobs = TokenLogprobs(logprob, list(zip(tokens[:count], values[:count], strict=True)))


def _advance_grammar(state: _RequestState, sampled: SampledToken) -> None:
    """Move the request's matcher past its token and tell the engine when it has come to an end, good or bad."""
    matcher = state.matcher
    if matcher is None:
        return
    if matcher.error is None:
        matcher.advance(sampled.token)
    sampled.error = matcher.error
    sampled.grammar_done = sampled.error is None and matcher.done


def _take(logits: Tensor, rows: list[int]) -> Tensor:
    return logits if len(rows) == len(logits) else logits[rows]
