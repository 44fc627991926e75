"""What a policy sees of an engine at the moment of a decision: read-only, and looked up where it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvarn.serving.policies.protocol import Snapshot

if TYPE_CHECKING:
    from kvarn.serving.engine import Engine


def take_snapshot(engine: Engine) -> Snapshot:
    """Of an engine between two steps; valid until the engine changes anything."""
    cache, requests, agents = engine.cache, engine.requests, engine.agents

    def reclaimable(id: str) -> int:
        request = requests.get(id)
        if request is not None:
            return cache.reclaimable(request)
        return 0 if agents is None else agents.reclaimable_blocks(id)

    return Snapshot(
        waiting=engine.waiting,
        running=engine.running,
        available_blocks=cache.pool.num_available,
        block_size=cache.block_size,
        token_budget=engine.token_budget,
        max_running=engine.max_running,
        num_blocks=cache.pool.num_blocks,
        prefix_hit=lambda id: cache.lookup(requests[id]),
        reclaimable_blocks=reclaimable,
        shares_prefix=lambda id, other, tokens: cache.shares_prefix(requests[id], requests[other], tokens),
        costs=engine.costs,
        loading=engine.loading,
        tiers=engine.tier_books,
        agents=agents,
    )
