"""Requests made in one line."""

from __future__ import annotations

import itertools
from typing import Any

from kvarn.serving.request import Request
from kvarn.serving.sampling.params import SamplingParams

EOS = 2

_ids = itertools.count()


def make_request(prompt: list[int] | None = None, **params: Any) -> Request:
    params.setdefault("max_tokens", 1000)
    return Request.create(
        f"r{next(_ids)}", prompt or [1], SamplingParams(**params), arrival=0.0, eos_tokens=frozenset({EOS})
    )
