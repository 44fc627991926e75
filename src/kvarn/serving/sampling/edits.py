"""What a request changes in its logits before a token is drawn: bans, biases and penalties.

In: rows of logits and, per row, a `LogitEdits`. Out: the same rows, changed in place. All rows of a batch are
edited together through flat (row, token) indexes, so a step costs a few tensor operations and, per request, work
proportional to the *distinct* tokens it has seen at most, done by numpy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvarn.serving.request import Request

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]


class TokenCounts:
    """How often each distinct token occurs in a request's output; kept up to date token by token.

    With `with_prompt` the prompt's tokens are listed too, with count 0: the repetition penalty looks at them.
    """

    def __init__(self, request: Request, *, with_prompt: bool) -> None:
        prompt = np.unique(request.tokens[: request.prompt_length]) if with_prompt else np.empty(0, dtype=np.int32)
        self._size = len(prompt)
        self._tokens: IntArray = np.zeros(self._size + 64, dtype=np.int64)
        self._counts: FloatArray = np.zeros(self._size + 64, dtype=np.float32)
        self._tokens[: self._size] = prompt
        self._slots: dict[int, int] = {token: slot for slot, token in enumerate(prompt.tolist())}
        self._seen = request.prompt_length

    def update(self, request: Request) -> tuple[IntArray, FloatArray]:
        """Count the outputs that are new since the last call; distinct tokens [N] and their counts [N]."""
        for token in request.tokens[self._seen : request.num_tokens].tolist():
            slot = self._slots.get(token)
            if slot is None:
                slot = self._append(token)
            self._counts[slot] += 1
        self._seen = request.num_tokens
        return self._tokens[: self._size], self._counts[: self._size]

    def _append(self, token: int) -> int:
        if self._size == len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.zeros_like(self._tokens)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        slot = self._slots[token] = self._size
        self._tokens[slot] = token
        self._size += 1
        return slot


class LogitEdits:
    """One request's bans, biases and penalties."""

    def __init__(self, request: Request) -> None:
        params = request.params
        self.request = request
        self.bias_tokens: IntArray = np.fromiter(params.logit_bias.keys(), dtype=np.int64)
        self.bias_values: FloatArray = np.fromiter(params.logit_bias.values(), dtype=np.float32)
        self.stop_tokens: IntArray = np.array(sorted(request.stop_tokens), dtype=np.int64)
        self.counts: TokenCounts | None = None
        if params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty:
            self.counts = TokenCounts(request, with_prompt=params.repetition_penalty != 1.0)

    @property
    def ever(self) -> bool:
        """False when the logits of every token stay as they are."""
        return self.counts is not None or len(self.bias_tokens) > 0 or self.bans_stop(0)

    def at(self, index: int) -> bool:
        """False when the logits of the output token of this index stay as they are."""
        return self.counts is not None or len(self.bias_tokens) > 0 or self.bans_stop(index)

    def bans_stop(self, index: int) -> bool:
        """True while min_tokens is not reached: neither end-of-sequence nor a stop token may come."""
        return index < self.request.params.min_tokens and len(self.stop_tokens) > 0


def add_biases(logits: Tensor, edits: Sequence[LogitEdits]) -> None:
    """Add every request's logit_bias to its row of `logits` [R, V], in place."""
    rows = [row for row, edit in enumerate(edits) if len(edit.bias_tokens)]
    if rows:
        index = _flat_index(logits, rows, [edits[row].bias_tokens for row in rows])
        values = np.concatenate([edits[row].bias_values for row in rows])
        logits.index_put_(index, torch.from_numpy(values).to(logits.device), accumulate=True)


def ban_stop_tokens(logits: Tensor, edits: Sequence[LogitEdits], indexes: Sequence[int]) -> None:
    """Set to -inf, in place, the end-of-sequence and stop tokens of the rows whose output index is below min_tokens.

    A row that would have no token left keeps them: a grammar that allows nothing but the end comes first.
    """
    rows = [row for row, edit in enumerate(edits) if edit.bans_stop(indexes[row])]
    if rows:
        index = _flat_index(logits, rows, [edits[row].stop_tokens for row in rows])
        before = logits[index]
        logits.index_put_(index, torch.tensor(-torch.inf, device=logits.device))
        empty = logits.amax(dim=1).isneginf()[index[0]]
        logits.index_put_(index, torch.where(empty, before, -torch.inf))


def apply_penalties(logits: Tensor, edits: Sequence[LogitEdits]) -> None:
    """Penalise seen tokens in place, repetition first, then frequency and presence.

    Repetition (prompt and output; as in transformers): a positive logit is divided by the penalty, a negative one
    multiplied. Frequency and presence (output only; as OpenAI defines them): logit - count * frequency
    - [count > 0] * presence.
    """
    penalised = [(row, edit, edit.counts) for row, edit in enumerate(edits) if edit.counts is not None]
    if not penalised:
        return
    rows = [row for row, _, _ in penalised]
    tables = [table.update(edit.request) for _, edit, table in penalised]
    sizes = [len(tokens) for tokens, _ in tables]
    params = [edit.request.params for _, edit, _ in penalised]
    counts = np.concatenate([count for _, count in tables])
    repetition = np.repeat(np.array([each.repetition_penalty for each in params], dtype=np.float32), sizes)
    frequency = np.repeat(np.array([each.frequency_penalty for each in params], dtype=np.float32), sizes)
    presence = np.repeat(np.array([each.presence_penalty for each in params], dtype=np.float32), sizes)
    subtract = torch.from_numpy(counts * frequency + (counts > 0) * presence).to(logits.device)
    factor = torch.from_numpy(repetition).to(logits.device)
    index = _flat_index(logits, rows, [tokens for tokens, _ in tables])
    seen = logits[index]
    logits.index_put_(index, torch.where(seen > 0, seen / factor, seen * factor) - subtract)


def _flat_index(logits: Tensor, rows: list[int], tokens: list[IntArray]) -> tuple[Tensor, Tensor]:
    """Index tensors (row, token) [sum of len(tokens)]."""
    repeated = np.repeat(np.array(rows, dtype=np.int64), [len(each) for each in tokens])
    return (
        torch.from_numpy(repeated).to(logits.device),
        torch.from_numpy(np.concatenate(tokens)).to(logits.device),
    )
