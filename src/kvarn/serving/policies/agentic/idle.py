"""Stalled conversations as the policy sees them: what the rule wants of each, who gives way, who comes back."""

from __future__ import annotations

from collections.abc import Sequence

from kvarn.serving.agents.lifecycle import ON_DEVICE, CallState
from kvarn.serving.agents.moves import StallMove
from kvarn.serving.agents.offload import (
    Discard,
    Finished,
    FixedTTL,
    Hardened,
    Load,
    MinimumWaste,
    PaysToKeep,
    Prospect,
    Published,
    Resident,
    Rule,
    StepsToExecution,
)
from kvarn.serving.agents.upload import Return, next_step
from kvarn.serving.policies.agentic.ranks import Ranks
from kvarn.serving.policies.agentic.settings import AgenticSettings
from kvarn.serving.policies.protocol import AgentView, RequestView, Snapshot, StallView
from kvarn.serving.policies.step import Step

_OFF_DEVICE = (CallState.OFFLOADED, CallState.RESERVING)
_EARLY = 0.2
"""A conversation is back by the time at which its tool has answered with this probability."""


def rule_of(settings: AgenticSettings) -> Rule:
    """The rule that settings name."""
    rules: dict[str, Rule] = {
        "hardened": Hardened(), "published": Published(), "resident": Resident(), "finished": Finished(),
        "discard": Discard(), "ttl": FixedTTL(settings.ttl), "pays-to-keep": PaysToKeep(), "min-waste": MinimumWaste(),
        "steps": StepsToExecution(),
    }  # fmt: skip
    return rules[settings.stall]


class Idle:
    """Looks at all stalls a few times a second, and at new ones at once."""

    def __init__(self, settings: AgenticSettings) -> None:
        self.rule = rule_of(settings)
        self._settings = settings
        self._prospects: dict[str, Prospect] = {}
        self._missing: dict[str, int] = {}
        """Blocks that conversations off the device lack there."""
        self._near: list[StallView] = []
        """Those that may have to come back before the next look."""
        self._looked_at = self._asked_at = float("-inf")

    def tend(self, step: Step, agents: AgentView, ranks: Ranks, now: float) -> None:
        """What the rule wants of conversations on the device; some come back. Adds to the step's moves."""
        stalls = agents.stalls
        if not stalls:
            self._prospects.clear()
            self._missing.clear()
            return
        fresh = now >= self._looked_at + self._settings.tick
        if fresh:
            self._looked_at = now
            self._prospects.clear()
            self._missing.clear()
        looked: Load | None = None
        for stall in stalls:
            if stall.call.state is CallState.RESERVING and stall.call.successor:
                step.let_go(stall, "retreat")  # its request takes what it needs itself
            if stall.call.state not in ON_DEVICE or (stall.id in self._prospects and not fresh):
                continue
            prospect = self._prospects[stall.id] = self._prospect(stall, step.snapshot, agents)
            looked = looked or self._load(step.snapshot, ranks, now)
            fate = self.rule.fate(prospect, looked, now)
            if fate != "keep":
                step.let_go(stall, fate)

    def givers(
        self, step: Step, agents: AgentView, now: float, head: RequestView | None = None, ranks: Ranks | None = None
    ) -> list[StallView]:
        """Conversations that may be taken off the device, the first to go in front; for `head`, who wants their blocks,
        also those that wait behind it for blocks of their own."""
        found: list[tuple[tuple[float, ...], StallView]] = []
        if head is not None and not self.rule.makes_way and agents.call_of(head.id) is None:
            return []  # it has not begun
        over = self._tenants_beyond_their_share(step.snapshot, agents.stalls)
        for stall in agents.stalls:
            prospect = self._prospects.get(stall.id)
            if prospect is None or stall.call.state not in ON_DEVICE or stall.id in step.moved:
                continue
            place = self.rule.gives(prospect, now)
            if place is None and head is not None and ranks is not None and stall.call.successor:
                place = _BEHIND if ranks(head) < ranks.of_id(stall.call.successor) else None
            if head is not None and ranks is not None and self._goes_before(stall, head, ranks, agents, over, now):
                continue  # it was brought back to go before
            if stall.call.tenant in over:
                found.append(((float("-inf"),), stall))
            elif place is not None:
                found.append((place, stall))
        found.sort(key=lambda pair: pair[0])
        return [stall for _, stall in found]

    def _goes_before(
        self, stall: StallView, head: RequestView, ranks: Ranks, agents: AgentView, over: set[str], now: float
    ) -> bool:
        call = stall.call
        if call.state is not CallState.READY or call.tenant in over:
            return False
        return ranks.of_call(call, agents, now) < ranks(head)

    def everybody(self, step: Step, agents: AgentView) -> list[StallView]:
        """All that hold blocks, for when nothing else can run; the last to have begun in front."""
        held = [stall for stall in agents.stalls if stall.held_blocks and stall.id not in step.moved]
        return sorted(held, key=lambda stall: -stall.call.started)

    def bring_back(
        self, step: Step, agents: AgentView, ranks: Ranks, head: RequestView | None, growth: int, now: float
    ) -> None:
        """Uploads that are due, and blocks for those that soon will be.

        `growth` blocks are left to those that run. `head`, who waits for blocks, goes before those that rank behind it
        or that would be back in no time: nobody waits for what is of no use yet.
        """
        snapshot = step.snapshot
        if self._settings.upload != "predictive" or snapshot.tiers is None or not self._settings.offload:
            return
        if self._asked_at < self._looked_at:
            self._asked_at = self._looked_at
            away = [stall for stall in agents.stalls if stall.call.state in _OFF_DEVICE]
            self._near = [stall for stall in away if stall.call.early(now, _EARLY) <= _FAR]
        away = [stall for stall in self._near if stall.call.state in _OFF_DEVICE and not stall.call.successor]
        if not away:
            return
        quantile = _EARLY if head is None else _LIKELY
        near = sorted((stall.call.early(now, quantile), i) for i, stall in enumerate(away))
        back = (CallState.READY, CallState.UPLOADING, CallState.RESERVING)
        held = sum(stall.held_blocks for stall in agents.stalls if stall.call.state in back)
        allowance = int(self._settings.allowance * snapshot.num_blocks) - held
        context = sum([request.num_tokens for request in snapshot.running])
        step_seconds = snapshot.costs.decode_seconds(max(1, len(snapshot.running)), context)
        for early, i in near:
            stall, free = away[i], step.available - step.promised - growth
            blocks = self._missing.get(stall.id, -1)
            if blocks < 0:
                blocks = self._missing[stall.id] = agents.loadable_blocks(stall.id)
            seconds = snapshot.tiers.read_seconds(blocks)
            if head is not None and (seconds < _IN_NO_TIME or ranks(head) < ranks.of_call(stall.call, agents, now)):
                continue
            ahead = Return(blocks, stall.reserved_blocks, early, seconds)
            todo = next_step(
                ahead, step_seconds=step_seconds, lead=self._settings.lead, free=free, allowance=allowance,
                gradual=self._settings.gradual,
            )  # fmt: skip
            taken = todo.reserve
            if todo.upload and blocks:
                taken = max(0, blocks - stall.reserved_blocks)
                step.moves.append(StallMove(stall.id, "upload"))
            elif todo.reserve:
                step.moves.append(StallMove(stall.id, "reserve", todo.reserve))
            step.available -= taken
            allowance -= taken

    # ---- small parts -------------------------------------------------------------------------------------

    def _prospect(self, stall: StallView, snapshot: Snapshot, agents: AgentView) -> Prospect:
        blocks = snapshot.reclaimable_blocks(stall.id)
        tokens = blocks * snapshot.block_size
        again, tiers = snapshot.costs.prefill_seconds(tokens), snapshot.tiers
        if tiers is None or not self._settings.offload:
            return Prospect(stall.call, blocks, tokens, 0.0, 0.0, again, has_host=False)
        dirty = agents.unmirrored_blocks(stall.id)
        out, back = tiers.write_seconds(dirty) if dirty else 0.0, tiers.read_seconds(blocks)
        return Prospect(stall.call, blocks, tokens, out, back, again, has_host=dirty <= tiers.free_host_blocks)

    def _load(self, snapshot: Snapshot, ranks: Ranks, now: float) -> Load:
        context = sum([request.num_tokens for request in snapshot.running])
        seconds = snapshot.costs.decode_seconds(max(1, len(snapshot.running)), context)
        waiting = sorted(snapshot.waiting, key=ranks)[:_ASKED]
        waits = [now - request.arrival for request in snapshot.waiting]
        return Load(
            waiting=[(snapshot.blocks_for(each.num_slots), each.num_tokens + each.max_outputs) for each in waiting],
            tokens_per_second=max(1, len(snapshot.running)) / seconds,
            batch_tokens=context,
            queue_seconds=sum(waits) / len(waits) if waits else 0.0,
        )

    def _tenants_beyond_their_share(self, snapshot: Snapshot, stalls: Sequence[StallView]) -> set[str]:
        held: dict[str, int] = {}
        for stall in stalls:
            held[stall.call.tenant] = held.get(stall.call.tenant, 0) + stall.held_blocks
        most = self._settings.tenant_share * snapshot.num_blocks
        return {tenant for tenant, blocks in held.items() if blocks > most}


_ASKED = 64
"""Waiting requests that a rule is told of."""
_LIKELY = 0.5
"""The same while somebody waits for blocks: then those that come back early are soon given up again."""
_IN_NO_TIME = 0.25
"""Seconds of copying."""
_BEHIND = (-1.0,)
"""Place of a conversation whose request waits: as if its tool had a second to go."""
_FAR = 5.0
"""Seconds: returns that are further off can wait for the next look at all."""
