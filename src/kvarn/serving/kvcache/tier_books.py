"""What of the tiers a policy may know: nothing but numbers, asked for by request id."""

from __future__ import annotations

from collections.abc import Mapping

from kvarn.serving.kvcache.copies import Direction
from kvarn.serving.kvcache.tiers import Tiers
from kvarn.serving.request import Request


class TierBooks:
    """See kvarn.serving.policies.protocol.TierView."""

    def __init__(self, tiers: Tiers, requests: Mapping[str, Request]) -> None:
        self._tiers = tiers
        self._requests = requests

    @property
    def host_blocks(self) -> int:
        return self._tiers.host.num_slots

    @property
    def free_host_blocks(self) -> int:
        return self._tiers.host.num_available

    @property
    def coming_blocks(self) -> int:
        pool = self._tiers.cache.pool
        return sum(pool.references(block) == 1 for block in self._tiers.held_blocks())

    def loadable_tokens(self, id: str) -> int:
        return self._tiers.loadable_tokens(self._requests[id])

    def unmirrored_blocks(self, id: str) -> int:
        return self._tiers.unmirrored(self._requests[id])

    def write_seconds(self, blocks: int) -> float:
        return self._tiers.queue_seconds(Direction.TO_HOST, blocks)

    def read_seconds(self, blocks: int) -> float:
        return self._tiers.queue_seconds(Direction.TO_DEVICE, blocks)

    def load_seconds(self, id: str, blocks: int) -> float:
        return self._tiers.load_seconds(self._requests[id], blocks)
