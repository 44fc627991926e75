"""The device's KV blocks by what they are held for: what "used" hides.

active      by requests that run
stalled     by conversations alone whose agents wait for tools
reserved    free ones, for conversations that are to come back
loading     by requests and conversations on their way back from the host
pending     by copies to the host alone: free when these end
cached      by nobody, with content that may be found again
free        by nobody

The sum is the whole pool. A block that several share counts once, as active where a request is among them.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvarn.serving.kvcache.pool import BlockPool
from kvarn.serving.kvcache.tiers import Tiers
from kvarn.serving.request import Request
from kvarn.serving.stalls import Stalls


def count_blocks(
    pool: BlockPool, loading: Sequence[Request], tiers: Tiers | None, stalls: Stalls | None
) -> dict[str, int]:
    """State -> blocks."""
    states = {"stalled": 0, "reserved": 0} if stalls is None else stalls.states()
    arriving = [*loading, *(stalls.loading() if stalls is not None else ())]
    states["loading"] = len({block for request in arriving for block in request.blocks})
    copied = () if tiers is None else tiers.held_blocks()
    states["pending"] = sum([pool.references(block) == 1 for block in copied])
    states["active"] = max(0, pool.num_active - sum(states.values()))
    return states | {"cached": pool.num_cached, "free": pool.num_free}
