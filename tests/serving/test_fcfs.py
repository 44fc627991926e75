"""First come, first served, on snapshots alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from kvarn.serving.costs import Costs
from kvarn.serving.policies.fcfs import FirstComeFirstServed
from kvarn.serving.policies.protocol import Decision, Snapshot

SIZE = 4


@dataclass(frozen=True)
class View:
    id: str
    num_tokens: int
    num_computed: int = 0
    num_blocks: int = 0
    arrival: float = 0.0
    priority: int = 0
    prompt_length: int = 1
    num_outputs: int = 0
    preemptions: int = 0
    slot_surplus: int = 0

    @property
    def num_slots(self) -> int:
        return self.num_tokens + self.slot_surplus

    @property
    def num_uncomputed(self) -> int:
        return self.num_tokens - self.num_computed


@dataclass(frozen=True)
class Hit:
    tokens: int = 0
    idle_blocks: int = 0

    @property
    def blocks(self) -> int:
        return self.tokens // SIZE


@dataclass(frozen=True)
class Host:
    """Has so many tokens of everybody, who would arrive after so many seconds."""

    tokens: int
    seconds: float
    coming_blocks: int = 0

    def loadable_tokens(self, id: str) -> int:
        return self.tokens

    def load_seconds(self, id: str, blocks: int) -> float:
        return self.seconds


def decide(
    waiting: list[View],
    running: list[View],
    *,
    available: int,
    budget: int = 16,
    hit: Hit = Hit(),
    policy: FirstComeFirstServed = FirstComeFirstServed(),
    shared: frozenset[tuple[str, str]] = frozenset(),
    loading: Sequence[View] = (),
    tiers: Host | None = None,
) -> Decision:
    held = {view.id: view.num_blocks for view in running}
    snapshot = Snapshot(
        waiting, running, available, SIZE, budget, 8, num_blocks=1000, prefix_hit=lambda id: hit,
        reclaimable_blocks=held.__getitem__, shares_prefix=lambda id, other, tokens: (id, other) in shared,
        costs=Costs(), loading=loading, tiers=tiers,
    )  # fmt: skip
    return policy.decide(snapshot, 0.0)


def decoding(id: str, tokens: int, arrival: float = 0.0) -> View:
    return View(id, tokens, tokens - 1, -(-(tokens - 1) // SIZE), arrival)


def grants(decision: Decision) -> dict[str, int]:
    return {grant.id: grant.tokens for grant in decision.grants}


def test_decode_rows_come_before_prefill_chunks_and_newcomers():
    chunked = View("chunked", 100, 8, 2, arrival=0.0)
    decision = decide([View("new", 3, arrival=9.0)], [chunked, decoding("reader", 6, 1.0)], available=100)
    assert grants(decision) == {"reader": 1, "chunked": 15}


def test_readers_wait_for_no_more_than_the_prefill_budget():
    chunked, new = View("chunked", 100, 8, 2), View("new", 3, arrival=9.0)
    policy = FirstComeFirstServed(prefill_budget=6)
    beside = decide([new], [chunked, decoding("reader", 6, 1.0)], available=100, policy=policy)
    assert grants(beside) == {"reader": 1, "chunked": 6}
    alone = decide([new], [chunked], available=100, policy=policy)
    assert grants(alone) == {"chunked": 16}


def test_nobody_overtakes_the_head_of_the_queue():
    decision = decide([View("big", 40), View("small", 4, arrival=1.0)], [], available=5)
    assert grants(decision) == {}


def test_newcomer_waits_while_admitted_prompts_still_need_their_blocks():
    chunked = View("chunked", 40, 8, 2)
    decision = decide([View("new", 8, arrival=1.0)], [chunked], available=9, budget=12)
    assert grants(decision) == {"chunked": 12}
    roomy = decide([View("new", 4, arrival=1.0)], [chunked], available=10, budget=36)
    assert grants(roomy) == {"chunked": 32, "new": 4}


def test_a_prompt_that_is_being_computed_for_another_is_not_computed_twice():
    same = frozenset({("twin", "first")})
    queue = [View("first", 8), View("twin", 8, arrival=1.0), View("other", 4, arrival=2.0)]
    assert grants(decide(queue, [], available=20, shared=same)) == {"first": 8, "other": 4}
    chunked = View("first", 30, 8, 2)
    assert grants(decide(queue[1:], [chunked], available=20, budget=40, shared=same)) == {"first": 22, "other": 4}
    assert grants(decide(queue[1:], [decoding("first", 9)], available=20, shared=same)) == {
        "first": 1, "twin": 8, "other": 4,
    }  # fmt: skip


def test_latest_arrival_is_preempted_for_an_earlier_one():
    running = [decoding("late", 5, arrival=5.0), decoding("early", 5, arrival=1.0)]
    decision = decide([], running, available=0)
    assert decision.preempt == ("late",)
    assert grants(decision) == {"early": 1}


def test_prefix_hit_needs_fewer_blocks_and_tokens():
    decision = decide([View("new", 12)], [], available=3, hit=Hit(8, idle_blocks=2))
    assert grants(decision) == {"new": 4}


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 59)), max_size=10),
    st.lists(st.integers(1, 60), max_size=10),
    st.integers(0, 40),
    st.integers(1, 64),
)
def test_books_balance(running, waiting, available, budget):
    """Law: grants fit the budget and, with what preemption returns, the blocks; nobody is granted and preempted."""
    views = [
        View(f"r{i}", tokens, min(computed, tokens - 1), -(-min(computed, tokens - 1) // SIZE), float(i))
        for i, (tokens, computed) in enumerate(running)
    ][:8]
    queue = [View(f"w{i}", tokens, arrival=100.0 + i) for i, tokens in enumerate(waiting)]
    decision = decide(queue, views, available=available, budget=budget)
    by_id = {view.id: view for view in views + queue}
    granted = grants(decision)
    needed = sum(
        max(0, -(-(by_id[id].num_computed + tokens) // SIZE) - by_id[id].num_blocks) for id, tokens in granted.items()
    )
    assert sum(granted.values()) <= budget
    assert needed <= available + sum(by_id[id].num_blocks for id in decision.preempt)
    assert not set(granted) & set(decision.preempt)
    assert all(1 <= tokens <= by_id[id].num_uncomputed for id, tokens in granted.items())


def test_what_the_host_has_is_loaded_if_that_is_sooner_than_computing_it():
    waiting = [View("a", 40)]
    assert decide(waiting, [], available=20, tiers=Host(36, 1e-3)) == Decision(load=("a",))
    assert decide(waiting, [], available=20, tiers=Host(36, 1.0)).grants == (("a", 16),)
    assert decide(waiting, [], available=20, tiers=Host(36, 1e-3), hit=Hit(36)).grants == (("a", 4),)
    assert decide(waiting, [], available=9, tiers=Host(36, 1e-3)) == Decision(), "as an admission, it waits for room"


def test_loading_requests_count_as_running_and_get_the_blocks_they_lack():
    waiting = [View("a", 8, arrival=1.0)]
    loading = [View(f"l{i}", 20, num_blocks=4) for i in range(7)]
    assert decide(waiting, [], available=16, loading=loading).grants == (("a", 8),)
    assert decide(waiting, [], available=15, loading=loading) == Decision()
    assert decide(waiting, [], available=99, loading=[*loading, loading[0]]) == Decision()
    assert decide(waiting, [], available=99, loading=loading[:1], shared=frozenset({("a", "l0")})) == Decision()
