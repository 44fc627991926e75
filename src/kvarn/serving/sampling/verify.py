"""Samples the rows of a step, and behind each row its drafts for as long as they come true.

The token after a draft is sampled only if the draft is what was sampled before it: then the request is in the very
state that it would have been in one step later, so penalties, grammars, bans and seeds mean the same, and the text
is the one that it would have been without drafts.
"""

from __future__ import annotations

from torch import Tensor

from kvarn.serving.batch import SampledToken, ScheduledRequest
from kvarn.serving.sampling.sampler import Sampler


def sample_rows(sampler: Sampler, logits: Tensor, rows: list[ScheduledRequest]) -> list[list[SampledToken]]:
    """Tokens of each row, 1 to `drafts` + 1 of them; `logits` [sum of drafts + 1, V] are in the order of `rows`."""
    if not any(row.drafts for row in rows):
        return [[token] for token in sampler.sample(logits, [row.request for row in rows])]
    results: list[list[SampledToken]] = [[] for _ in rows]
    first = 0
    alive: list[tuple[int, ScheduledRequest, list[SampledToken]]] = []
    for row, tokens in zip(rows, results, strict=True):
        alive.append((first, row, tokens))
        first += row.drafts + 1
    while alive:
        indexes = [index + len(tokens) for index, _, tokens in alive]
        sampled = sampler.sample(logits[indexes], [row.request for _, row, _ in alive])
        going_on = []
        for (index, row, tokens), token in zip(alive, sampled, strict=True):
            tokens.append(token)
            request = row.request
            ended = token.grammar_done or token.error is not None
            if len(tokens) <= row.drafts and not ended and request.tokens[request.num_tokens] == token.token:
                request.num_tokens += 1  # for the sampler, which looks at the request; the engine appends it again
                going_on.append((index, row, tokens))
        alive = going_on
    for row, tokens in zip(rows, results, strict=True):
        row.request.num_tokens -= len(tokens) - 1
    return results
