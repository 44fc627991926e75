"""Who should be on the device for the next tick: one look at everybody, from snapshot to plan.

First the working set grows: newcomers are let in while memory, the device's speed and the buffers of those who would
make room for them allow. Then everybody let in competes for the device's blocks by what being there gains; a greedy
choice by gain, improved by one pass of swaps between neighbours in that order.

Source: TokenFlow (arXiv 2510.02758), 4.2 and 4.3.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvarn.serving.policies.plan import Plan
from kvarn.serving.policies.protocol import RequestView, Snapshot
from kvarn.serving.policies.streaming.crowd import Crowd
from kvarn.serving.policies.streaming.estimates import Estimates
from kvarn.serving.policies.streaming.gains import Column, gains
from kvarn.serving.policies.streaming.settings import StreamingSettings

Mask = NDArray[np.bool_]

_STARVING, _PINNED = 1e3, 1e9
"""Gain of who has been without tokens for too long, and of what is not up for choice."""


class Candidates:
    """What is to be known of each of the crowd before choosing; columns of shape (n,)."""

    def __init__(
        self, snapshot: Snapshot, crowd: Crowd, now: float, estimates: Estimates, settings: StreamingSettings
    ) -> None:
        self.requests, self.num_residents = crowd.requests, crowd.num_residents
        self.slack, self.rates = crowd.slack, crowd.rates
        count, costs = self.num_residents, snapshot.costs
        self.step_seconds = costs.decode_seconds(max(1, count), int(crowd.tokens[:count].sum()))
        growth = 1 + int(settings.tick / self.step_seconds)
        size = snapshot.block_size
        self.blocks = np.minimum(np.ceil((crowd.tokens + growth) / size), max(1, snapshot.num_blocks))
        """What each needs until the next look."""
        self.length = estimates.lengths(crowd)
        self.last_blocks = np.ceil((crowd.prompts + self.length) / size)
        """What each will need in the end."""
        self.unread = crowd.slack * crowd.rates / self.length
        """Share of its expected text that each reader has before him."""
        self.back_seconds = crowd.tokens * costs.prefill_seconds(1)
        """What bringing each back would take."""
        self.gone_seconds = 0.0
        """What giving its blocks up would take, for one with little that is not on the host."""
        loaded = np.zeros(len(self.requests), dtype=np.bool_)
        if snapshot.tiers is not None and settings.offload:
            queue = snapshot.tiers.read_seconds(0)
            block = snapshot.tiers.read_seconds(1) - queue
            loading = queue + np.ceil(crowd.tokens / size) * block
            loaded = loading < max(1, count) * self.back_seconds
            self.back_seconds = np.where(loaded, loading, self.back_seconds)
            self.gone_seconds = snapshot.tiers.write_seconds(1)
        self.switch_seconds = self.gone_seconds + float(self.back_seconds.mean()) if self.requests else 0.0
        self.critical = settings.tick + self.switch_seconds + 2 * self.step_seconds
        """Seconds of slack below which nobody is taken off the device."""
        self.charge = np.where(loaded, self.gone_seconds + self.back_seconds, count * self.back_seconds)
        """Seconds of decoding that readers together lose when one comes back: all wait for what is computed again, and
        what is loaded takes blocks that serve nobody meanwhile."""
        self.stay = 0.0
        """Seconds that everybody stays where he was moved to."""
        if settings.hysteresis:
            steps, switches = settings.residence_steps, settings.residence_switches
            self.stay = max(steps * self.step_seconds, switches * self.switch_seconds)
        # Who has been without tokens for long comes first, the longest of them before the others.
        thirst = now - crowd.dry - settings.patience * settings.tick
        self.starving = np.isfinite(crowd.dry) & (thirst > 0)
        self.starving[:count] = False
        self.gain = self._gain(crowd, estimates, settings)
        self.gain[self.starving] += _STARVING * (1.0 + thirst[self.starving])
        self.settling, self.pinned = self._pinned(now, settings)

    def _gain(self, crowd: Crowd, estimates: Estimates, settings: StreamingSettings) -> Column:
        overhead = self.back_seconds.copy()
        overhead[: self.num_residents] = 0.0
        slack = np.maximum(0.0, crowd.slack - overhead)
        scale = settings.horizon * (settings.tick + self.switch_seconds)
        gain = gains(slack, slack * crowd.rates, self.length, overhead, estimates.delay, scale, settings)
        if settings.hysteresis:
            gain[self.num_residents :] -= self.charge[self.num_residents :]
        return gain

    def _pinned(self, now: float, settings: StreamingSettings) -> tuple[Mask, Mask]:
        """Residents being prefilled or just moved, and with them those that are short of tokens or have moved often."""
        count = self.num_residents
        residents = self.requests[:count]
        settling, pinned = np.zeros((2, len(self.requests)), dtype=np.bool_)
        since = now - self.stay
        settling[:count] = [request.moved_at > since or request.num_uncomputed > 1 for request in residents]
        pinned[:count] = [request.preemptions >= settings.max_preemptions for request in residents]
        pinned[:count] |= settling[:count] | (self.slack[:count] < self.critical)
        return settling, pinned


def balance(
    snapshot: Snapshot,
    table: Candidates,
    newcomers: Sequence[RequestView],
    now: float,
    estimates: Estimates,
    settings: StreamingSettings,
    paused: frozenset[str],
) -> Plan:
    """The plan for the next tick. `paused`: who skips steps so far."""
    held = sum([request.num_blocks for request in snapshot.running]) + snapshot.available_blocks
    if snapshot.tiers is not None:
        held += snapshot.tiers.coming_blocks
    loading = sum([snapshot.blocks_for(request.num_slots) - request.num_blocks for request in snapshot.loading])
    # Blocks that requests share count for each of them, here as in what each needs.
    room = held - loading
    places = snapshot.max_running - len(snapshot.loading)
    _unpin_for_the_starving(table, room, places)
    admitted, wanted = _newcomers(snapshot, newcomers, table, room, places, estimates, settings)
    chosen = _choose(table, room - wanted, places - len(admitted), settings)
    count = table.num_residents
    # Nobody who is short of tokens, or has just come, gives way before somebody who is neither.
    staying = table.settling[:count] | (table.slack[:count] < table.critical)
    victims = [i for i in np.lexsort((-table.gain[:count], ~staying)).tolist() if not chosen[i]]
    back = [i for i in np.argsort(-table.gain, kind="stable").tolist() if i >= count and chosen[i]]
    starving = [table.requests[i] for i in back if table.starving[i]]
    others = [table.requests[i] for i in back if not table.starving[i]]
    return Plan(
        bring=[*starving, *_merged(admitted, others, table, now)],
        victims=[table.requests[i] for i in victims],
        paused=_paused(table, paused, bool(newcomers), settings),
    )


def _newcomers(
    snapshot: Snapshot,
    newcomers: Sequence[RequestView],
    table: Candidates,
    room: float,
    places: int,
    estimates: Estimates,
    settings: StreamingSettings,
) -> tuple[list[RequestView], float]:
    """Step 1: whom to let in, in the order of arrival, and the blocks they need."""
    limit = _working_set(snapshot, table, estimates, settings)
    count = table.num_residents
    detour = table.gone_seconds + table.back_seconds[:count] + settings.tick
    safe = (table.slack[:count] >= settings.safety * detour) & ~table.pinned[:count]
    safe_blocks, safe_places = float(table.blocks[:count][safe].sum()), int(safe.sum())
    due = (table.slack < table.critical) & (np.arange(len(table.requests)) >= count)
    room += safe_blocks - float(table.blocks[:count].sum()) - float(table.blocks[due].sum())
    places += safe_places - count - int(due.sum())
    prefill = snapshot.costs.prefill_seconds(1)
    backlog = sum([request.num_uncomputed for request in snapshot.running if request.num_uncomputed > 1]) * prefill
    serving = len(table.requests) + len(snapshot.loading)
    # What everybody will hold in the end: whoever fits beside that needs nobody's buffer, and nobody's permission.
    held = float(table.last_blocks.sum())
    held += sum([snapshot.blocks_for(request.prompt_length + request.max_outputs) for request in snapshot.loading])
    admitted: list[RequestView] = []
    wanted, demand = 0.0, 0.0
    for request in newcomers:
        need = snapshot.blocks_for(request.num_slots) + settings.headroom_blocks
        demand += request.reader.rate
        held += snapshot.blocks_for(request.prompt_length + int(estimates.length_of(request)))
        alone = serving == 0 and not admitted
        fits = wanted + need <= room and len(admitted) < places
        allowed = serving + len(admitted) < limit and estimates.allows(demand)
        if not alone and not (fits and (allowed or held <= snapshot.num_blocks)):
            break
        admitted.append(request)
        wanted += need
        backlog += request.num_tokens * prefill
        if backlog > 2 * settings.tick:
            break
    return admitted, wanted


def _working_set(snapshot: Snapshot, table: Candidates, estimates: Estimates, settings: StreamingSettings) -> float:
    """How many requests to serve at once (Eq. 4 and 5); no bound where suspended ones need no memory."""
    if snapshot.tiers is None or not table.requests:
        return float("inf")
    static = (snapshot.num_blocks + snapshot.tiers.host_blocks) / float(table.last_blocks.mean())
    if table.num_residents >= snapshot.max_running:
        return static
    return static - settings.contraction * (static - min(static, table.num_residents))


def _unpin_for_the_starving(table: Candidates, room: float, places: int) -> None:
    """Where everybody is short of tokens, those on the device take turns with those who have waited longest."""
    if not table.starving.any():
        return
    need = float(table.blocks[table.pinned | table.starving].sum()) - room
    rows = int((table.pinned | table.starving).sum()) - places
    for i in np.argsort(-table.slack[: table.num_residents], kind="stable").tolist():
        if need <= 0 and rows <= 0:
            return
        if table.pinned[i] and not table.settling[i]:
            table.pinned[i] = False
            need -= float(table.blocks[i])
            rows -= 1


def _choose(table: Candidates, room: float, places: int, settings: StreamingSettings) -> list[bool]:
    """Step 2: who of the candidates is to be on the device."""
    gain = table.gain.copy()
    if settings.hysteresis:
        gain[: table.num_residents] *= np.where(gain[: table.num_residents] > 0, settings.retention, 1.0)
    gain[table.pinned] += _PINNED
    # By gain, not by gain per block: else requests would change places for their sizes alone, twice as often.
    order = np.argsort(-gain, kind="stable").tolist()
    blocks, gained = table.blocks.tolist(), gain.tolist()
    chosen = [False] * len(order)
    for i in order:
        if blocks[i] <= room and places > 0:
            chosen[i] = True
            room -= blocks[i]
            places -= 1
    if settings.local_search:
        _swap_neighbours(order, chosen, blocks, gained, room, places)
    return chosen


def _swap_neighbours(
    order: list[int], chosen: list[bool], blocks: list[float], gained: list[float], room: float, places: int
) -> None:
    """One pass: one inside makes room for the two behind him in the order, where together they gain more and fit."""
    for inside, first, second in zip(order, order[1:], order[2:], strict=False):
        if places < 1:
            return
        if chosen[inside] and not chosen[first] and not chosen[second]:
            more = blocks[first] + blocks[second] - blocks[inside]
            if more <= room and gained[first] + gained[second] > gained[inside]:
                chosen[inside], chosen[first], chosen[second] = False, True, True
                room -= more
                places -= 1


def _merged(admitted: list[RequestView], back: list[RequestView], table: Candidates, now: float) -> list[RequestView]:
    """First tokens first, but for readers who would run dry before the next look."""
    due = [request for request in back if request.reader.slack(now) < table.critical]
    later = [request for request in back if request.reader.slack(now) >= table.critical]
    return [*due, *admitted, *later]


def _paused(table: Candidates, paused: frozenset[str], newcomers: bool, settings: StreamingSettings) -> frozenset[str]:
    """Who skips steps; see `StreamingSettings.pause`."""
    count = table.num_residents
    short = table.slack[:count] < table.critical
    if settings.pause == "needed":
        short &= table.rates[:count] * table.step_seconds > 1.0
    called_for = short.any() or (newcomers and settings.pause == "eager") or settings.pause == "always"
    if not called_for or settings.pause == "off":
        return frozenset()
    unread = table.unread[:count].tolist()
    return frozenset(
        request.id
        for request, share in zip(table.requests, unread, strict=False)
        if share > (settings.pause_below if request.id in paused else settings.pause_above)
    )
