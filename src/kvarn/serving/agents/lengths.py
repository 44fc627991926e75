"""How long agents' answers get, by role: so that blocks are kept for what is likely and not for all that is allowed."""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict, deque

_SAMPLES = 64
_ENOUGH = 4
_QUANTILE = 0.8
_ROLES = 4096


class OutputLengths:
    """Lengths of ended answers, the least recently used role forgotten first."""

    def __init__(self) -> None:
        self._recent: OrderedDict[tuple[str, str], deque[int]] = OrderedDict()
        self._sorted: dict[tuple[str, str], list[int]] = {}

    def learn(self, tenant: str, role: str, tokens: int) -> None:
        """An answer had so many tokens."""
        key = (tenant, role)
        recent = self._recent.setdefault(key, deque())
        ordered = self._sorted.setdefault(key, [])
        self._recent.move_to_end(key)
        if len(recent) == _SAMPLES:
            ordered.remove(recent.popleft())
        recent.append(tokens)
        insort(ordered, tokens)
        if len(self._recent) > _ROLES:
            oldest, _ = self._recent.popitem(last=False)
            del self._sorted[oldest]

    def expected(self, tenant: str, role: str, most: int) -> int:
        """Tokens that four answers in five do not exceed; `most` is what the request allows, and all that is known
        of a role that has hardly been heard."""
        ordered = self._sorted.get((tenant, role), ())
        if len(ordered) < _ENOUGH:
            return most
        return min(most, ordered[int(_QUANTILE * (len(ordered) - 1))])
