"""First come, first served, with continuous batching and chunked prefill: the baseline every policy must beat.

Every step first continues what runs: decode rows before prefill chunks, so a long prompt never stalls the
readers of others; a prefill budget bounds how much longer a step gets for them. What is left of the budget
admits waiting requests in order of priority, then arrival, while the blocks for the whole of their known
tokens are there; one whose prompt is mostly being computed for another lets that one finish first. When a running
request finds no block, the one that came last gives up its blocks and is recomputed later.

Where the host has KV of a waiting request and bringing it back takes less time than computing it, it is brought back,
under the same rules as an admission.
"""

from __future__ import annotations

from operator import attrgetter

from kvarn.serving.policies.loading import worth_loading
from kvarn.serving.policies.protocol import Decision, Grant, RequestView, Snapshot


class FirstComeFirstServed:
    """The policy's settings.

    headroom_blocks   blocks per running request that are left free at admission for tokens yet to come
    prefill_budget    prompt tokens computed in a step that others' readers wait for; None: the whole token budget
    """

    def __init__(self, headroom_blocks: int = 1, prefill_budget: int | None = None) -> None:
        self.headroom_blocks = headroom_blocks
        self.prefill_budget = prefill_budget

    def decide(self, snapshot: Snapshot, now: float) -> Decision:
        step = _Step(snapshot)
        prefilling = step.continue_decoding()
        step.computing = [request.id for request in (*prefilling, *snapshot.loading)]
        if step.grants and self.prefill_budget is not None:
            step.budget = min(step.budget, self.prefill_budget)
        for request in prefilling:
            step.continue_running(request)
        if not step.preempted:
            for request in snapshot.waiting:
                if step.is_full:
                    break
                if not step.is_coming(request) and not step.admit(request, self.headroom_blocks):
                    break
        return Decision(tuple(step.preempted), tuple(step.grants), load=tuple(step.loads))


class _Step:
    """The books of one decision: budget and blocks left, who is granted, who is preempted."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.budget = snapshot.token_budget
        self.available = snapshot.available_blocks
        self.promised = sum(
            snapshot.blocks_for(request.num_tokens) - request.num_blocks for request in snapshot.loading
        )
        """Blocks that admitted prompts still need for chunks to come."""
        self.grants: list[Grant] = []
        self.loads: list[str] = []
        self.preempted: dict[str, None] = {}
        self.served: set[str] = set()
        self.computing: list[str] = []
        """Requests whose prompts are being computed or loaded."""
        self.running = sorted(snapshot.running, key=attrgetter("priority", "arrival"))
        self.num_running = len(self.running) + len(snapshot.loading)

    def continue_decoding(self) -> list[RequestView]:
        """Grant every decode row; the running requests that still prefill are returned."""
        decoding, prefilling, needed = [], [], 0
        size = self.snapshot.block_size
        for request in self.running:
            total = request.num_tokens
            if total - request.num_computed == 1:
                decoding.append(request)
                needed += total > request.num_blocks * size
            else:
                prefilling.append(request)
        if len(decoding) <= self.budget and needed <= self.available:
            # Everybody fits, as in nearly every step: the books need no line for each of them.
            self.grants = [Grant(request.id, 1) for request in decoding]
            self.served.update(request.id for request in decoding)
            self.budget -= len(decoding)
            self.available -= needed
        else:
            for request in decoding:
                self.continue_running(request)
        return prefilling

    def continue_running(self, request: RequestView) -> None:
        """Grant the next tokens of a running request, preempting later ones if blocks are short."""
        tokens = min(request.num_uncomputed, self.budget)
        if tokens == 0 or request.id in self.preempted:
            return
        needed = max(0, self.snapshot.blocks_for(request.num_computed + tokens) - request.num_blocks)
        while needed > self.available:
            victim = self._last_unserved()
            self.preempted[victim.id] = None
            self.num_running -= 1
            self.available += self.snapshot.reclaimable_blocks(victim.id)
            if victim is request:
                return
        self._grant(request.id, tokens, needed)
        self.promised += self.snapshot.blocks_for(request.num_tokens) - self.snapshot.blocks_for(
            request.num_computed + tokens
        )

    @property
    def is_full(self) -> bool:
        return self.num_running >= self.snapshot.max_running or self.budget == 0

    def is_coming(self, request: RequestView) -> bool:
        """Whether half or more of what a waiting request lacks is being computed for another one."""
        if not self.computing:
            return False
        hit = self.snapshot.prefix_hit(request.id).tokens
        half = request.num_tokens - (request.num_tokens - hit) // 2
        return any(self.snapshot.shares_prefix(request.id, other, half) for other in self.computing)

    def admit(self, request: RequestView, headroom_blocks: int) -> bool:
        """Grant the first tokens of a waiting request, or load them; False when it, and all behind it, must wait."""
        hit = self.snapshot.prefix_hit(request.id)
        whole = self.snapshot.blocks_for(request.num_tokens) - hit.tokens // self.snapshot.block_size
        spare = self.available - self.promised - hit.idle_blocks
        # With nothing running there is nobody to leave headroom for: the head of the queue always gets in.
        if whole + headroom_blocks * self.num_running > spare:
            return False
        loads = worth_loading(self.snapshot, request, hit.tokens)
        tokens = loads or min(request.num_tokens - hit.tokens, self.budget)
        first = self.snapshot.blocks_for(hit.tokens + tokens) - hit.tokens // self.snapshot.block_size
        self.promised += whole - first
        if loads:
            self.loads.append(request.id)
            self.available -= first + hit.idle_blocks
        else:
            self._grant(request.id, tokens, first + hit.idle_blocks)
        self.computing.append(request.id)
        self.num_running += 1
        return True

    def _grant(self, id: str, tokens: int, blocks: int) -> None:
        self.grants.append(Grant(id, tokens))
        self.served.add(id)
        self.budget -= tokens
        self.available -= blocks

    def _last_unserved(self) -> RequestView:
        for request in reversed(self.running):
            if request.id not in self.served and request.id not in self.preempted:
                return request
        raise AssertionError("the request that needs blocks is itself unserved")
