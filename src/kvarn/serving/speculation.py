"""Speculation without a draft model: guess the next tokens where the text repeats itself, and check them for free.

A decode step reads every weight to make one token of each request; a few more rows cost it little. When the last
tokens of a request stood somewhere in its text before, what followed there is drafted, computed as extra rows, and
kept as far as it is what the request samples anyway. So drafts change when tokens come, never which.
Everything here decides from facts it is given: no clock, no tensors, no model.

Source: prompt lookup decoding (A. Saxena, 2023); verification as in arXiv:2211.17192, with draws that depend on (seed,
index) alone, so acceptance is equality; the chain of earlier places is that of LZ77 compressors.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvarn.serving.request import Request

MATCH_TOKENS = 3
"""Tokens that must have stood together before for what followed them to be drafted."""
_LONGEST_MATCH = 16
"""Longer matches are not told apart."""
_PLACES = 8
"""Earlier places looked at, latest first."""
_FADE = 0.9
"""Weight of an outcome after the next one."""
_CLASSES = ((5, 0.35), (9, 0.6), (_LONGEST_MATCH + 1, 0.85))
"""(matches shorter than this, chance that their next token comes true before anything is known of the request)."""
_MARGIN = 1.3
"""A row must be worth this many times its cost: both are estimates from few steps."""
_PRIOR_WEIGHT = 3.0
"""Outcomes that such a first guess counts for."""


class Lookup:
    """Finds what may come next in one request's text.

    Follows one earlier place in the text for as long as the two go on alike. Each token costs the same however long the
    text is. Tokens that come without having been drafted teach as much as those that were: chances are known at
    no cost.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self._text: list[int] = []
        self._latest: dict[tuple[int, ...], int] = {}
        """Where each run of MATCH_TOKENS tokens ended last."""
        self._before: list[int] = []
        """For each position, where the run that ends there ended before; -1: nowhere."""
        self._next = -1
        """Position of the token that should come next; -1 without a match."""
        self._match = 0
        self._hits = [chance * _PRIOR_WEIGHT for _, chance in _CLASSES]
        self._tries = [_PRIOR_WEIGHT for _ in _CLASSES]

    def draft(self, limit: int, least_chance: float) -> list[int]:
        """Up to `limit` tokens to come, as long as all up to each one are likelier than `least_chance` to come true."""
        self._read()
        if self._next < 0:
            return []
        chance, count = 1.0, 0
        while count < limit:
            chance *= self._chance(self._match + count)
            if chance <= least_chance:
                break
            count += 1
        # A place so near that it runs into the present repeats itself from there.
        period = len(self._text) - self._next
        return [self._text[self._next + i % period] for i in range(count)]

    def _read(self) -> None:
        """Take in the tokens that are new since the last call."""
        request, text = self._request, self._text
        known = len(text)
        text += request.tokens[known : request.num_tokens].tolist()
        for position in range(known, len(text)):
            if self._next >= 0:
                self._compare(text[self._next] == text[position])
            run = tuple(text[max(0, position - MATCH_TOKENS + 1) : position + 1])  # at the beginning, shorter ones
            self._before.append(self._latest.get(run, -1))
            self._latest[run] = position
        if self._next < 0 and self._before:
            self._find()

    def _compare(self, came_true: bool) -> None:
        kind = _class(self._match)
        self._hits[kind] = self._hits[kind] * _FADE + came_true
        self._tries[kind] = self._tries[kind] * _FADE + 1.0
        if came_true:
            self._next += 1
            self._match = min(self._match + 1, _LONGEST_MATCH)
        else:
            self._next = -1

    def _find(self) -> None:
        """Follow the earlier place that has the longest text in common with the present; the latest of equals."""
        text, longest = self._text, 0
        last = len(text) - 1
        place = self._before[last] if last >= MATCH_TOKENS - 1 else -1
        for _ in range(_PLACES):
            if place < 0:
                break
            length = MATCH_TOKENS
            while length < _LONGEST_MATCH and length <= place and text[place - length] == text[last - length]:
                length += 1
            if length > longest:
                longest, self._next, self._match = length, place + 1, length
            place = self._before[place]

    def _chance(self, match: int) -> float:
        kind = _class(match)
        return self._hits[kind] / self._tries[kind]


def _class(match: int) -> int:
    return next((kind for kind, (below, _) in enumerate(_CLASSES) if match < below), len(_CLASSES) - 1)


@dataclass(slots=True)
class StepCost:
    """What one more row costs a step, from the steps so far: seconds = fixed + per_row * rows, old steps fading.

    A row that is right with chance c brings c tokens; the time it takes would have brought per_row * tokens per second
    without it. So a row pays while c is above that product: about 0.1 with one request, 0.7 with thirty.
    """

    fade: float = 0.98
    prior_rows: float = 8.0
    """Rows that cost as much as a step's fixed part, until steps of different sizes have been seen."""
    prior_weight: float = 20.0
    """What that counts for: as much as steps whose squared distances from the mean number of rows add up to this."""
    _weight: float = 0.0
    _rows: float = 0.0
    _seconds: float = 0.0
    _tokens: float = 0.0
    _rows_rows: float = 0.0
    _rows_seconds: float = 0.0

    def note(self, rows: int, tokens: int, seconds: float) -> None:
        """A step of `rows` decode rows made `tokens` tokens in `seconds`."""
        if self._weight:
            seconds = min(seconds, 2.0 * self._seconds / self._weight)  # a pause of the machine says nothing of rows
        for name, value in (
            ("_weight", 1.0), ("_rows", rows), ("_seconds", seconds), ("_tokens", tokens), ("_rows_rows", rows * rows),
            ("_rows_seconds", rows * seconds),
        ):  # fmt: skip
            setattr(self, name, getattr(self, name) * self.fade + value)

    @property
    def least_chance(self) -> float:
        """The chance above which one more row pays."""
        if not self._seconds:
            return 1.0
        rows, seconds = self._rows / self._weight, self._seconds / self._weight
        spread = self._rows_rows - self._rows * rows
        together = self._rows_seconds - self._rows * seconds
        prior = seconds / (self.prior_rows + rows)
        per_row = (together + self.prior_weight * prior) / (spread + self.prior_weight)
        return max(0.0, per_row) * self._tokens / self._seconds


class Speculator:
    """Drafts for all requests of an engine, up to `draft_tokens` each.

    With `only_where_it_pays` what a step costs and how often a request's drafts came true decide; without, every
    repetition is drafted.
    """

    def __init__(self, draft_tokens: int = 8, *, only_where_it_pays: bool = True) -> None:
        self.draft_tokens = draft_tokens
        self.only_where_it_pays = only_where_it_pays
        self.cost = StepCost()
        self._lookups: dict[str, Lookup] = {}

    def drafts(self, requests: list[Request], budget: int) -> list[list[int]]:
        """Tokens to draft for each request that decodes, `budget` at most in all; most are empty."""
        least_chance = _MARGIN * self.cost.least_chance if self.only_where_it_pays else 0.0
        drafts = []
        for request in requests:
            # The token sampled after the last draft must still be one that was asked for.
            room = request.params.max_tokens - request.num_outputs - 1
            draft = self._lookup(request).draft(min(self.draft_tokens, room, budget), least_chance)
            budget -= len(draft)
            drafts.append(draft)
        return drafts

    def forget(self, request: Request) -> None:
        self._lookups.pop(request.id, None)

    def _lookup(self, request: Request) -> Lookup:
        lookup = self._lookups.get(request.id)
        if lookup is None:
            lookup = self._lookups[request.id] = Lookup(request)
        return lookup
