"""The KV cache as the engine uses it: gives requests blocks, finds shared prefixes, takes blocks back.

Joins the pool (who holds a block) with the prefix index (what a block holds). Every method leaves both
consistent; `check` says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvarn.serving.kvcache.pool import BlockPool
from kvarn.serving.kvcache.prefix import ROOT, PrefixEntry, PrefixIndex, chain_hashes, leading
from kvarn.serving.kvcache.segments import SegmentStore
from kvarn.serving.request import Request


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """What the cache already holds of a waiting request."""

    tokens: int
    """Those of shared segments, and those kept of a request that this one continues, included."""
    blocks: int
    """Of its own block table, with its leading tokens."""
    idle_blocks: int
    """Blocks of these that nobody references now: taking them lowers the number of available blocks."""


class KVCache:
    """Blocks of `block_size` tokens for all requests of one engine."""

    def __init__(self, num_blocks: int, block_size: int, *, share_prefixes: bool = True) -> None:
        self.block_size = block_size
        self.share_prefixes = share_prefixes
        self.index = PrefixIndex()
        self.pool = BlockPool(num_blocks, on_evict=self._evicted)
        self.segments: SegmentStore | None = None
        """Of an engine that reuses shared segments."""
        self.queried_tokens = 0
        self.hit_tokens = 0

    def keeps(self, block: int) -> bool:
        """Whether a block that nobody uses has content worth keeping."""
        return block in self.index or (self.segments is not None and block in self.segments)

    def _evicted(self, block: int) -> None:
        if block in self.index:
            self.index.remove(block)
        elif self.segments is not None:
            self.segments.evicted(block)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-tokens // self.block_size)

    def lookup(self, request: Request) -> PrefixHit:
        """How much of a waiting request is cached, without taking it."""
        entries = self._match(request)
        idle = sum(self.pool.references(entry.block) == 0 for entry in entries)
        return PrefixHit(self._cached_tokens(request, len(entries)), len(entries), idle)

    def prefix_blocks(self, request: Request, tokens: int) -> list[int]:
        """Device blocks with the KV of the first `tokens` tokens of a waiting request, as far as it is cached."""
        return [entry.block for entry in self._match(request)][: tokens // self.block_size]

    def device_blocks(self, request: Request) -> int:
        """Leading blocks of a request whose KV is on the device, held or cached, as far as its hashes are known."""
        if request.num_blocks:
            return self.blocks_for(request.exact_tokens)
        return leading(request.block_hashes, self.index.holds)

    def shares_prefix(self, request: Request, other: Request, tokens: int) -> bool:
        """Whether the blocks of the first `tokens` tokens of two requests will be the same. Looks at hashes alone."""
        last = self.blocks_for(tokens) - 1  # the hash of a block covers all before it
        known = min(len(request.block_hashes), len(other.block_hashes))
        return self.share_prefixes and last < known and request.block_hashes[last] == other.block_hashes[last]

    def admit(self, request: Request) -> None:
        """Give a request that holds nothing the blocks of its cached prefix."""
        entries = self._match(request)
        blocks = [entry.block for entry in entries]
        self.pool.acquire(blocks)
        request.add_blocks(blocks)
        request.num_computed = len(blocks) * self.block_size + (request.layout.reused if request.layout else 0)
        request.indexed_blocks = len(blocks)
        request.prefix_entry = entries[-1].id if entries else ROOT
        if request.preemptions == 0:
            request.cached_tokens = request.num_computed
            self.queried_tokens += request.prompt_length
            self.hit_tokens += len(blocks) * self.block_size

    def grow(self, request: Request, tokens: int) -> bool:
        """Make room for the first `tokens` tokens of a request; False, and nothing changed, if there is none."""
        slots = tokens + request.slot_surplus
        if slots <= request.num_blocks * self.block_size:
            return True
        missing = self.blocks_for(slots) - request.num_blocks
        blocks = self.pool.allocate(missing)
        if blocks is None:
            return False
        request.add_blocks(blocks)
        return True

    def commit(self, request: Request) -> None:
        """Index the blocks that the last forward pass filled."""
        full = request.exact_tokens // self.block_size
        if not self.share_prefixes or full <= request.indexed_blocks or request.prefix_entry < ROOT:
            return
        self._extend_hashes(request, full)
        first, width = request.indexed_blocks, 4 * self.block_size
        content = request.tokens[first * self.block_size : full * self.block_size].tobytes()
        for i in range(first, full):
            tokens = content[(i - first) * width : (i - first + 1) * width]
            entry = self.index.insert(
                request.block_hashes[i], request.prefix_entry, tokens, int(request.block_table[i]), request.tenant
            )
            if entry is None:
                request.prefix_entry = _UNSHARED
                return
            request.prefix_entry = entry.id
            request.indexed_blocks = i + 1

    def reclaimable(self, request: Request) -> int:
        """Blocks that become available if this request is preempted; what it reads of shared segments stays."""
        return sum(self.pool.references(block) == 1 for block in request.blocks)

    def release(self, request: Request) -> None:
        """Take back every block of a request; indexed ones stay cached."""
        self.pool.release(request.blocks, keep=self.keeps)
        request.num_blocks = request.num_computed = request.indexed_blocks = 0
        request.prefix_entry = ROOT

    def discard(self, request: Request) -> None:
        """Forget the content of blocks that only this request holds; they are free once it releases them."""
        for block in request.blocks:
            if self.pool.references(block) == 1 and block in self.index:
                self.index.remove(block)

    def salt(self, request: Request) -> str:
        """Whose content a request's blocks are: only equal ones of equal salt are the same."""
        return request.tenant if self.share_prefixes else f"{request.tenant}\0{request.id}"

    def hashes(self, request: Request, full_blocks: int) -> list[bytes]:
        """Chained hashes of (at least) the first `full_blocks` blocks of a request's tokens."""
        self._extend_hashes(request, full_blocks)
        return request.block_hashes

    def fill(self, request: Request, tokens: int) -> None:
        """So many tokens after those computed have got their keys and values from elsewhere."""
        request.num_computed += tokens
        if request.preemptions == 0:
            request.cached_tokens += tokens
            self.hit_tokens += tokens
        self.commit(request)

    def check(self, holders: Iterable[Request], also_held: Iterable[int] = ()) -> None:
        """Raise AssertionError unless pool, index and the block tables of all holders agree.

        `also_held`: blocks that copies reference.
        """
        self.pool.check()
        references = [0] * self.pool.num_blocks
        for block in (*also_held, *(self.segments.held_blocks() if self.segments is not None else ())):
            references[block] += 1
        for request in holders:
            slots = request.num_computed + request.slot_surplus
            assert self.blocks_for(slots) <= request.num_blocks, f"{request.id}: KV without a block"
            for block in request.blocks:
                references[block] += 1
        held = [self.pool.references(block) for block in range(self.pool.num_blocks)]
        assert references == held, "block tables and reference counts disagree"
        cached = sum(1 for block in range(self.pool.num_blocks) if held[block] == 0 and self.keeps(block))
        assert cached == self.pool.num_cached, "cached blocks and the index disagree"

    def _cached_tokens(self, request: Request, blocks: int) -> int:
        """Tokens with KV when so many blocks of the prefix are there."""
        layout, tokens = request.layout, blocks * self.block_size
        return tokens if layout is None else max(tokens, layout.resumed) + layout.reused

    def _match(self, request: Request) -> list[PrefixEntry]:
        if not self.share_prefixes:
            return []
        # The last token is always computed: its logits are what the request waits for.
        usable = min(request.num_tokens - 1, request.exact_limit) // self.block_size
        self._extend_hashes(request, usable)
        return self.index.match(request.block_hashes[:usable], request.tokens, request.tenant)

    def _extend_hashes(self, request: Request, full_blocks: int) -> None:
        if len(request.block_hashes) < full_blocks:
            tokens = request.tokens[: full_blocks * self.block_size]
            request.block_hashes = chain_hashes(tokens, self.block_size, self.salt(request), request.block_hashes)


_UNSHARED = ROOT - 1
"""prefix_entry of a request whose chain met a hash collision: its later blocks are not indexed."""
