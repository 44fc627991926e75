"""Shared texts of a round's members that say nothing of theirs: found in their prompts by content."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from kvarn.serving.kvcache.segments import SegmentStore
from kvarn.serving.round_group import RoundGroup
from kvarn.serving.rounds.discovery import discover, keep_common
from kvarn.serving.rounds.settings import ReuseSettings
from kvarn.serving.rounds.spans import Span


def discover_untold(
    group: RoundGroup,
    spans: dict[int, list[Span]],
    untold: dict[int, int],
    *,
    known: Mapping[bytes, object],
    store: SegmentStore,
    salt: str,
    settings: ReuseSettings,
) -> None:
    """Fill in `spans` of the members in `untold`, by id() in memory, each behind so many of its tokens.

    known   texts that the round is known to share, for members that come late
    """
    members = [request for request in group.members if id(request) in untold]
    told = [request.tokens[start:end] for request in group.members for start, end in spans[id(request)]]
    stored: Iterable[NDArray[np.int32]] = [np.frombuffer(text, dtype=np.int32) for text in known] or store.texts(salt)
    found = discover(
        [request.known_tokens for request in members], [*told, *stored],
        behind=[untold[id(request)] for request in members], shortest=settings.shortest,
    )  # fmt: skip
    spans.update(zip(untold, found, strict=True))
    times: Counter[bytes] = Counter()
    for request in group.members:
        times.update({request.tokens[start:end].tobytes() for start, end in spans[id(request)]})
    shared: Container[bytes] = {text for text, count in times.items() if count > 1} | set(known)
    for request in members:  # what one member alone has is worth it only where its KV is there
        sink = request.tokens[: settings.sink_tokens]
        texts = [(span, request.tokens[span.start : span.end]) for span in spans[id(request)]]
        spans[id(request)] = [
            span for span, tokens in texts if tokens.tobytes() in shared or store.find(tokens, sink, salt) is not None
        ]
    if len(members) == len(group.members) > 1 and settings.source == "joint" and settings.whole_blocks:
        prompts = [request.known_tokens for request in members]
        common = keep_common(prompts, list(spans.values()), always=not settings.alone)
        spans.update(zip(untold, common, strict=True))
