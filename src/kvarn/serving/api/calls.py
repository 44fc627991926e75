"""The tool calls that this server's answers have made: which engine request each of their ids belongs to.

A client that sends nothing but what OpenAI's API asks for still says enough: its next request carries the results
beside the ids of the calls. Ids of other tenants are unknown; each tenant's oldest are forgotten.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

MOST_IDS = 16_384
"""Ids remembered for a tenant."""


class CallBook:
    """Call id -> engine request, and answers that have no single engine request."""

    def __init__(self, most_ids: int = MOST_IDS) -> None:
        self._most_ids = most_ids
        self._requests: dict[str, OrderedDict[str, str]] = {}
        self._plural: dict[str, OrderedDict[str, str]] = {}

    def note_calls(self, tenant: str, call_ids: Iterable[str], request: str) -> None:
        """An engine request has ended with these calls."""
        self._keep(self._requests.setdefault(tenant, OrderedDict()), dict.fromkeys(call_ids, request))

    def note_plural(self, tenant: str, answer: str) -> None:
        """An answer has several engine requests, so that none of them can be meant by its id."""
        self._keep(self._plural.setdefault(tenant, OrderedDict()), {answer: ""})

    def request_of(self, tenant: str, call_ids: Iterable[str]) -> str:
        """The engine request that made the first of the calls that is known; empty: none is."""
        known = self._requests.get(tenant, OrderedDict())
        return next((known[id] for id in call_ids if id in known), "")

    def is_plural(self, tenant: str, answer: str) -> bool:
        return answer in self._plural.get(tenant, ())

    def _keep(self, book: OrderedDict[str, str], entries: dict[str, str]) -> None:
        book.update(entries)
        while len(book) > self._most_ids:
            book.popitem(last=False)
