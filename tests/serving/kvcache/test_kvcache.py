"""Pool and prefix index: states, references, and matches that hashes alone cannot make."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvarn.serving.kvcache import prefix
from kvarn.serving.kvcache.cache import KVCache
from kvarn.serving.kvcache.pool import BlockPool, BlockState
from kvarn.serving.kvcache.prefix import ROOT, PrefixIndex, chain_hashes
from kvarn.serving.request import Request
from kvarn.serving.sampling.params import SamplingParams

SIZE = 4


def _request(id: str, tokens: list[int], tenant: str = "") -> Request:
    return Request.create(id, tokens, SamplingParams(max_tokens=8), arrival=0.0, tenant=tenant)


class CacheMachine(RuleBasedStateMachine):
    """Admit, grow, commit and release at random; the checker must always agree."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = KVCache(20, SIZE)
        self.held: list[Request] = []
        self.count = 0

    @rule(length=st.integers(1, 30), family=st.integers(0, 2))
    def admit(self, length: int, family: int) -> None:
        self.count += 1
        request = _request(str(self.count), [family * 50 + i for i in range(length)])
        hit = self.cache.lookup(request)
        self.cache.admit(request)
        assert request.num_computed == hit.tokens < length
        self.held.append(request)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), share=st.floats(0.1, 1.0))
    def compute(self, data: st.DataObject, share: float) -> None:
        request = data.draw(st.sampled_from(self.held))
        target = max(request.num_computed, int(request.num_tokens * share))
        available = self.cache.pool.num_available
        needed = max(0, self.cache.blocks_for(target) - request.num_blocks)
        assert self.cache.grow(request, target) == (needed <= available)
        if needed <= available:
            request.num_computed = target
            self.cache.commit(request)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.held))
        self.held.remove(request)
        self.cache.release(request)

    @invariant()
    def consistent(self) -> None:
        self.cache.check(self.held)

    def teardown(self) -> None:
        for request in self.held:
            self.cache.release(request)
        assert self.cache.pool.num_active == 0


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_least_recently_released_block_is_evicted_first_and_leaves_before_roots():
    cache = KVCache(4, SIZE)
    old, new = _request("old", list(range(8))), _request("new", list(range(100, 108)))
    for request in (old, new):
        cache.admit(request)
        assert cache.grow(request, 8)
        request.num_computed = 8
        cache.commit(request)
    old_blocks = old.blocks
    cache.release(old)
    cache.release(new)
    (taken,) = cache.pool.allocate(1) or []
    assert taken == old_blocks[1], "the leaf of the chain released first"
    assert cache.pool.state(old_blocks[0]) is BlockState.CACHED


def test_allocation_is_all_or_nothing():
    pool = BlockPool(3, on_evict=lambda block: None)
    assert pool.allocate(4) is None
    assert pool.num_free == 3
    pool.check()


def test_hash_collision_is_not_a_hit(monkeypatch: pytest.MonkeyPatch):
    class Constant:
        def __init__(self, *args: object, **kwargs: object) -> None: ...

        def digest(self) -> bytes:
            return b"same"

    monkeypatch.setattr(prefix, "blake2b", Constant)
    cache = KVCache(8, SIZE)
    first = _request("first", [1, 2, 3, 4, 5])
    cache.admit(first)
    cache.grow(first, 5)
    first.num_computed = 5
    cache.commit(first)
    assert cache.lookup(_request("other", [9, 9, 9, 9, 9])).tokens == 0
    assert cache.lookup(_request("equal", [1, 2, 3, 4, 5])).tokens == 4
    assert cache.lookup(_request("tenant", [1, 2, 3, 4, 5], tenant="x")).tokens == 0


def test_entry_whose_parent_was_replaced_is_not_matched():
    index = PrefixIndex()
    tokens = np.arange(8, dtype=np.int32)
    hashes = chain_hashes(tokens, SIZE)
    parent = index.insert(hashes[0], ROOT, tokens[:4].tobytes(), block=0)
    assert parent is not None
    assert index.insert(hashes[1], parent.id, tokens[4:].tobytes(), block=1)
    index.remove(0)
    assert index.match(hashes, tokens) == []
    index.insert(hashes[0], ROOT, tokens[:4].tobytes(), block=2)
    assert [entry.block for entry in index.match(hashes, tokens)] == [2]


def test_hashes_extend_and_depend_on_salt():
    tokens = np.arange(13, dtype=np.int32)
    whole = chain_hashes(tokens, SIZE, "a")
    assert len(whole) == 3
    assert chain_hashes(tokens, SIZE, "a", whole[:1]) == whole
    assert set(whole).isdisjoint(chain_hashes(tokens, SIZE, "b"))
