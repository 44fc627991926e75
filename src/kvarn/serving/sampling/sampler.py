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
from kvarn.kernels import ops
from kvarn.serving.batch import SampledToken, TokenLogprobs
from kvarn.serving.request import Request
from kvarn.serving.sampling import draw
from kvarn.serving.sampling.edits import LogitEdits, add_biases, apply_penalties, ban_stop_tokens
from kvarn.serving.sampling.grammar import GrammarFactory, GrammarMatcher
from kvarn.serving.sampling.params import UNSET_SEED

GREEDY_BELOW = 1e-4
"""Temperatures below this are greedy: logits divided by them would lose what tells tokens apart."""

_CPU_SLAB = 2**21
"""Logits edited at a time on a CPU."""


@dataclass(slots=True, eq=False)
class _RequestState:
    """What the sampler knows of one request."""

    seed: int
    """As an unsigned 64-bit number."""
    temperature: float
    """0 when greedy."""
    edits: LogitEdits
    matcher: GrammarMatcher | None

    @property
    def editable(self) -> bool:
        """False when tokens are always chosen from the logits as they come."""
        return self.matcher is not None or self.edits.ever

    def edited_at(self, index: int) -> bool:
        """True when the output token of this index is not chosen from the logits as they come."""
        return self.matcher is not None or self.edits.at(index)


class _Group:
    """The requests of a step, and all that their settings say, as tensors: made anew when their set changes."""

    def __init__(
        self, requests: list[Request], states: list[_RequestState], vocab_size: int, device: torch.device
    ) -> None:
        self.requests = requests
        self.states = states
        self.vocab_size = vocab_size
        self.device = device
        self.editable = [row for row, state in enumerate(states) if state.editable]
        self.reporting = [row for row, request in enumerate(requests) if request.params.logprobs >= 0]
        self._greedy = all(state.temperature == 0.0 for state in states)
        if self._greedy:
            return
        params = [request.params for request in requests]
        self._seeds = np.array([state.seed for state in states], dtype=np.uint64)
        self._settings = (
            torch.tensor([state.temperature for state in states], dtype=torch.float64, device=device),
            torch.tensor([min(each.top_k, vocab_size) for each in params], dtype=torch.int64, device=device),
            torch.tensor([each.top_p for each in params], dtype=torch.float64, device=device),
            torch.tensor([each.min_p for each in params], dtype=torch.float64, device=device),
        )

    def part(self, rows: list[int]) -> _Group:
        requests, states = [self.requests[row] for row in rows], [self.states[row] for row in rows]
        return _Group(requests, states, self.vocab_size, self.device)

    def choose(self, logits: Tensor, indexes: Sequence[int]) -> list[int]:
        """Tokens of rows whose logits need no edit any more."""
        if self._greedy:
            chosen = ops.largest(logits)
        else:
            uniform = draw.uniforms(self._seeds, np.array(indexes, dtype=np.uint64))
            chosen = ops.sample(logits, *self._settings, torch.from_numpy(uniform).to(self.device))
        tokens: list[int] = chosen.tolist()
        return tokens


class Sampler:
    """Samples for a model with `vocab_size` logits; without `grammars`, constrained requests are refused."""

    def __init__(self, vocab_size: int, grammars: GrammarFactory | None = None) -> None:
        self.vocab_size = vocab_size
        self._grammars = grammars
        self._states: dict[str, _RequestState] = {}
        self._group: _Group | None = None

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
        temperature = 0.0 if greedy else params.temperature
        self._states[request.id] = _RequestState(seed, temperature, LogitEdits(request), matcher)

    def remove(self, request: Request) -> None:
        """Forget a request's state."""
        self._states.pop(request.id, None)
        self._group = None

    def sample(self, logits: Tensor, requests: Sequence[Request]) -> list[SampledToken]:
        """The next token of each request, in order, from its row of `logits` [R, V] (any float type and device)."""
        group = self._group
        if group is None or group.requests != requests or group.device != logits.device:
            states = [self._states[request.id] for request in requests]
            group = self._group = _Group(list(requests), states, logits.shape[1], logits.device)
        indexes = [request.num_outputs for request in requests]
        edited = [row for row in group.editable if group.states[row].edited_at(indexes[row])]
        tokens = self._choose_edited(logits, group, indexes, edited) if edited else group.choose(logits, indexes)
        sampled = [SampledToken(token) for token in tokens]
        if group.reporting:
            _report_logprobs(logits, group, sampled)
        for row in edited:
            _advance_grammar(group.states[row], sampled[row])
        return sampled

    def _choose_edited(self, logits: Tensor, group: _Group, indexes: Sequence[int], edited: list[int]) -> list[int]:
        """Tokens of a group some of whose rows need their logits edited."""
        tokens = [0] * len(group.states)
        plain = sorted(set(range(len(tokens))).difference(edited))
        # On a CPU temporaries larger than the allocator keeps are paid for in page faults, several times their use.
        slab = max(1, _CPU_SLAB // self.vocab_size) if logits.device.type == "cpu" else len(edited)
        parts = [plain] + [edited[first : first + slab] for first in range(0, len(edited), slab)]
        for rows in filter(None, parts):
            part = group.part(rows)
            at = [indexes[row] for row in rows]
            values = logits[rows] if rows is plain else self._edit(logits[rows].float(), part.states, at)
            for row, token in zip(rows, part.choose(values, at), strict=True):
                tokens[row] = token
        return tokens

    def _edit(self, values: Tensor, states: list[_RequestState], indexes: list[int]) -> Tensor:
        """Apply every ban, bias and penalty to `values` [R, V], in place."""
        edits = [state.edits for state in states]
        self._mask(values, states)
        add_biases(values, edits)
        ban_stop_tokens(values, edits, indexes)
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


def _report_logprobs(logits: Tensor, group: _Group, sampled: Sequence[SampledToken]) -> None:
    """Fill in `logprobs` of the rows that ask for them, from the unmodified logits."""
    rows = group.reporting
    counts = [group.requests[row].params.logprobs for row in rows]
    values = logits if len(rows) == len(logits) else logits[rows]
    tokens = torch.tensor([sampled[row].token for row in rows], device=logits.device)
    chosen, ids, best = ops.token_logprobs(values, tokens, min(max(counts), logits.shape[1]))
    columns = zip(rows, counts, chosen.tolist(), ids.tolist(), best.tolist(), strict=True)
    for row, count, logprob, top_ids, top_values in columns:
        top = list(zip(top_ids[:count], top_values[:count], strict=True))
        sampled[row].logprobs = TokenLogprobs(logprob, top)


def _advance_grammar(state: _RequestState, sampled: SampledToken) -> None:
    """Move the request's matcher past its token and tell the engine when it has come to an end, good or bad."""
    matcher = state.matcher
    if matcher is None:
        return
    if matcher.error is None:
        matcher.advance(sampled.token)
    sampled.error = matcher.error
    sampled.grammar_done = sampled.error is None and matcher.done
