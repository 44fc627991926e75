"""What of a round's segments is computed anew: asks the executor where they deviate, and remembers what was chosen."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvarn.serving.kvcache.cache import KVCache
from kvarn.serving.request import Request
from kvarn.serving.round_group import RoundCounters, RoundGroup
from kvarn.serving.rounds.barrier import RoundKey
from kvarn.serving.rounds.layout import Placed
from kvarn.serving.rounds.selection import block_means, choose_blocks, choose_tokens, first_blocks
from kvarn.serving.rounds.settings import ReuseSettings
from kvarn.serving.rounds.work import Probe, SegmentExecutor

_REMEMBERED = 256
"""Rounds whose choice of blocks is kept for members that come late."""
Choice = dict[bytes, frozenset[int]]
"""Blocks to compute anew, by the segment's key."""


class RoundChoices:
    """Of one engine."""

    def __init__(self, cache: KVCache, executor: SegmentExecutor, counters: RoundCounters) -> None:
        self.cache = cache
        self.executor = executor
        self.counters = counters
        self._known: OrderedDict[RoundKey, Choice] = OrderedDict()

    def choose(self, group: RoundGroup, members: Sequence[Request], settings: ReuseSettings) -> dict[int, list[Placed]]:
        """Where each member's segments stand and what of them is computed anew, by its id() in memory."""
        if not settings.whole_blocks:
            return self._choose_tokens(group, members, settings)
        choice = self._choose_blocks(group, members, settings)
        return {
            id(request): [
                Placed(segment, span.start, choice[segment.key]) for span, segment in group.segments[id(request)]
            ]
            for request in members
        }

    def _choose_blocks(self, group: RoundGroup, members: Sequence[Request], settings: ReuseSettings) -> Choice:
        """One choice for all."""
        size = self.cache.block_size
        known: Choice = dict(self._known.get(group.gathered.key, {}))
        segments = {
            segment.key: segment
            for request in members
            for _, segment in group.segments[id(request)]
            if segment.key not in known
        }
        if settings.mode == "lego":
            for key, segment in segments.items():
                known[key] = first_blocks(segment.num_blocks(size), settings.lego_blocks)
        elif segments:
            probed = self._probe_all(group, _covering(group, members, set(segments), settings.probes))
            pool = np.max if settings.sharpness == "max" else np.mean
            means = [
                block_means(pool(np.stack(probed[key]), axis=0), segment.sink, size)
                for key, segment in segments.items()
            ]
            known.update(zip(segments, choose_blocks(means, settings.share), strict=True))
        self._known[group.gathered.key] = known
        self._known.move_to_end(group.gathered.key)
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return known

    def _choose_tokens(
        self, group: RoundGroup, members: Sequence[Request], settings: ReuseSettings
    ) -> dict[int, list[Placed]]:
        """For each member by itself."""
        placed: dict[int, list[Placed]] = {}
        deviations = self._probe(group, members)
        for request, found in zip(members, deviations, strict=True):
            tokens = choose_tokens(found, settings.share)
            placed[id(request)] = [
                Placed(segment, span.start, tokens=chosen)
                for (span, segment), chosen in zip(group.segments[id(request)], tokens, strict=True)
            ]
        return placed

    def _probe_all(self, group: RoundGroup, probes: Sequence[Request]) -> dict[bytes, list[NDArray[np.float32]]]:
        found: dict[bytes, list[NDArray[np.float32]]] = {}
        for request, deviations in zip(probes, self._probe(group, probes), strict=True):
            for (_, segment), deviation in zip(group.segments[id(request)], deviations, strict=True):
                found.setdefault(segment.key, []).append(deviation)
        return found

    def _probe(self, group: RoundGroup, members: Sequence[Request]) -> list[list[NDArray[np.float32]]]:
        if not members:
            return []
        probes = []
        for request in members:
            placed = tuple(Placed(segment, span.start) for span, segment in group.segments[id(request)])
            prefix = self.cache.prefix_blocks(request, placed[0].start)
            probes.append(Probe(request, tuple(prefix), placed))
        self.counters.selection_passes += 1
        return self.executor.deviations(probes)


def _covering(group: RoundGroup, members: Sequence[Request], keys: set[bytes], least: int) -> list[Request]:
    """The first members, so many that each segment is seen by one of them, and `least` at least."""
    chosen: list[Request] = []
    unseen = set(keys)
    for request in members:
        sees = {segment.key for _, segment in group.segments[id(request)]}
        if sees & unseen or (len(chosen) < least and sees & keys):
            chosen.append(request)
            unseen -= sees
    return chosen
