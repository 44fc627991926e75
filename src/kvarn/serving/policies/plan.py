"""A plan of who is to be on the device, and its carrying out, step by step: for every policy that takes turns.

A plan says whom to bring and who makes room for them; blocks, tokens and the link to the host say how much of it a
step can do. Nobody is taken off the device before what is to come then fits, or at least will when copies have ended;
what comes back is loaded or recomputed, whichever is estimated to cost readers less (`policies.loading`).

Source: TokenFlow (arXiv 2510.02758), 4.4, for load or recompute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvarn.serving.policies.protocol import RequestView, Snapshot
from kvarn.serving.policies.step import Step

_IN_VAIN = 8
"""Requests that a step asks about without being able to bring them, at most."""


@dataclass(slots=True)
class Plan:
    """What to bring about. Carrying it out takes from it what is done."""

    bring: list[RequestView] = field(default_factory=list)
    """Waiting requests to get onto the device, the most urgent first."""
    victims: list[RequestView] = field(default_factory=list)
    """Running requests that make room for them, the last one first."""
    paused: frozenset[str] = frozenset()
    """Running requests that skip steps."""


@dataclass(frozen=True, slots=True)
class Means:
    """How a plan may be carried out.

    offload       use the host: copy before giving blocks up, load where that costs less than recomputing
    link_seconds  loads queue no longer than this: blocks being waited for serve nobody
    keepers       running requests, those that keep their blocks longest first
    """

    offload: bool
    link_seconds: float
    keepers: Callable[[], Sequence[RequestView]]


def carry_out(plan: Plan, snapshot: Snapshot, now: float, prompt_tokens: int, means: Means) -> Step:
    """One step of the plan, with at most so many tokens of prompts in it."""
    step = Step(snapshot, snapshot.running, givers=means.keepers, offload=means.offload, load=means.offload)
    under_way = sum([request.num_uncomputed for request in snapshot.running if request.num_uncomputed > 1])
    admitted = _bring(plan, step, prompt_tokens - under_way, means) if plan.bring else []
    prefilling = step.continue_decoding(plan.paused)
    step.computing = [request.id for request in (*prefilling, *snapshot.loading)]
    step.budget = min(step.budget, prompt_tokens)
    size = snapshot.block_size
    # The rest of what was loaded first: it is next to nothing. Then first tokens, then what is recomputed.
    prefilling.sort(key=lambda r: (r.num_uncomputed > 2 * size, r.reader.slack(now) > 0.0, r.priority, r.arrival))
    for request in prefilling:
        step.continue_running(request)
    for request in admitted:
        if not step.is_full and not step.is_coming(request):
            step.admit(request)
    return step


def _bring(plan: Plan, step: Step, tokens_left: int, means: Means) -> list[RequestView]:
    """Make room for what the plan wants and start loads; who is to be admitted with what is left of the tokens."""
    snapshot, tiers = step.snapshot, step.snapshot.tiers
    waiting = {request.id for request in snapshot.waiting}
    running = {request.id for request in snapshot.running}
    # What those already there will need comes before anybody is brought.
    step.promised += sum([_lacking(snapshot, request) for request in snapshot.running])
    link = 0.0 if tiers is None else tiers.read_seconds(0)
    block = 0.0 if tiers is None else tiers.read_seconds(1) - link
    admitted: list[RequestView] = []
    left: list[RequestView] = []
    held = in_vain = 0
    bring = [request for request in plan.bring if request.id in waiting]
    for i, request in enumerate(bring):
        # Who has been here before most likely comes through the link; asking costs a walk over all his blocks.
        if link > means.link_seconds if request.preemptions and means.offload else tokens_left <= 0:
            left.append(request)
            continue
        offer = step.offer(request)
        if not offer.loaded_tokens and tokens_left <= 0:
            left.append(request)
            in_vain += 1
            if in_vain == _IN_VAIN:
                left.extend(bring[i + 1 :])
                break
            continue
        need = offer.blocks + offer.idle_blocks
        if not _make_room(plan, step, held + need, len(admitted), running):
            left.extend(bring[i:])
            break
        if offer.loaded_tokens:
            step.take(offer)
            link += block * (offer.loaded_tokens // snapshot.block_size)
        else:
            admitted.append(request)
            held += need
            tokens_left -= request.num_tokens - offer.cached_tokens
    plan.bring = left + admitted
    step.promised -= sum([_lacking(snapshot, r) for r in snapshot.running if r.id not in step.evicted])
    return admitted


def _make_room(plan: Plan, step: Step, blocks: int, rows: int, running: set[str]) -> bool:
    """Take victims off the device until so many blocks, and places for so many more rows and one, are free."""
    snapshot, victims = step.snapshot, plan.victims
    while True:
        spare = step.available - step.promised
        placed = step.num_running + rows < snapshot.max_running
        if placed and blocks <= spare:
            return True
        if placed and blocks <= spare + step.coming:
            return False
        while victims and (victims[-1].id not in running or victims[-1].id in step.evicted):
            victims.pop()
        if not victims:
            return False
        victim = victims.pop()
        step.promised -= _lacking(snapshot, victim)
        step.evict(victim)


def _lacking(snapshot: Snapshot, request: RequestView) -> int:
    """Blocks that the known tokens of a running request still need."""
    return max(0, snapshot.blocks_for(request.num_slots) - request.num_blocks)
