"""Lets rows of a batch that decodes carry guesses at what comes next, where budget and blocks are left."""

from __future__ import annotations

from kvarn.serving.batch import Batch
from kvarn.serving.kvcache.cache import KVCache
from kvarn.serving.speculation import Speculator


def write_drafts(speculator: Speculator, batch: Batch, cache: KVCache, budget: int) -> int:
    """Put at most `budget` guesses behind the tokens of the batch's requests; how many."""
    drafted = 0
    drafts = speculator.drafts([row.request for row in batch.rows], budget)
    for row, draft in zip(batch.rows, drafts, strict=True):
        request = row.request
        if draft and cache.pool.num_available <= len(batch.rows):
            del draft[request.num_blocks * cache.block_size - request.num_slots :]  # takes no scarce block
        if draft and cache.grow(request, request.num_tokens + len(draft)):
            request.write_drafts(draft)
            row.count, row.drafts = row.count + len(draft), len(draft)
            drafted += len(draft)
    return drafted
