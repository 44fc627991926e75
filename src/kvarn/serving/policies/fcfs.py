"""First come, first served, with continuous batching and chunked prefill: the baseline every policy must beat.

Every step first continues what runs: decode rows before prefill chunks, so a long prompt never stalls the
readers of others; a prefill budget bounds how much longer a step gets for them. What is left of the budget
admits waiting requests in order of priority, then arrival, while the blocks for the whole of their known
tokens are there; one whose prompt is mostly being computed for another lets that one finish first. When a running
request finds no block, the one that came last gives up its blocks and is recomputed later.

Where the host has KV of a waiting request and bringing it back costs less than computing it, it is brought back, under
the same rules as an admission.
"""

from __future__ import annotations

from operator import attrgetter

from kvarn.serving.policies.protocol import Decision, Snapshot
from kvarn.serving.policies.step import Step

by_arrival = attrgetter("priority", "arrival")


class FirstComeFirstServed:
    """The policy's settings.

    headroom_blocks   blocks per running request that are left free at admission for tokens yet to come
    prefill_budget    prompt tokens computed in a step that others' readers wait for; None: the whole token budget
    last_admitted     whether who was admitted last gives way, instead of who came last (as vLLM V1 does, which also
                      leaves no headroom)
    """

    def __init__(
        self, headroom_blocks: int = 1, prefill_budget: int | None = None, *, last_admitted: bool = False
    ) -> None:
        self.headroom_blocks = headroom_blocks
        self.prefill_budget = prefill_budget
        self.last_admitted = last_admitted

    def decide(self, snapshot: Snapshot, now: float) -> Decision:
        return self.plan(snapshot).decision()

    def plan(self, snapshot: Snapshot) -> Step:
        """The books of the decision."""
        running = snapshot.running if self.last_admitted else sorted(snapshot.running, key=by_arrival)
        step = Step(snapshot, running)
        prefilling = step.continue_decoding()
        step.computing = [request.id for request in (*prefilling, *snapshot.loading)]
        if step.grants and self.prefill_budget is not None:
            step.budget = min(step.budget, self.prefill_budget)
        for request in prefilling:
            step.continue_running(request)
        if not step.evicted:
            step.admit_in_order(snapshot.waiting, self.headroom_blocks)
        return step
