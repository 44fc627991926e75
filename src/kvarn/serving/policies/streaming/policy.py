"""Serves readers just in time: who has much to read makes room for who has nothing.

While nobody has to wait, this is first come, first served. Under stress it looks at everybody once a tick, or when
somebody has come or gone, and makes a plan (`balance`); the steps in between carry it out as blocks,
tokens and the link to the host allow (`kvarn.serving.policies.plan`), while well-supplied requests skip steps if others
are short. Prompts are computed no faster than the readers of those who decode have time for.

Source: TokenFlow (arXiv 2510.02758), section 4; where it is silent or wrong, see `settings` and `gains`.
"""

from __future__ import annotations

from kvarn.serving.policies.fcfs import FirstComeFirstServed
from kvarn.serving.policies.plan import Means, Plan, carry_out
from kvarn.serving.policies.protocol import Decision, RequestView, Snapshot
from kvarn.serving.policies.streaming.balance import Candidates, balance
from kvarn.serving.policies.streaming.crowd import Crowd
from kvarn.serving.policies.streaming.estimates import Estimates
from kvarn.serving.policies.streaming.settings import StreamingSettings

_CAUTION = 0.8
"""Share of a reader's time that a step with prompts is planned to take: how long it takes is an estimate."""
_LOOKS_PER_TICK = 8
"""Looks that events may cause in a tick, at most."""


class Streaming:
    """One engine's policy; it remembers estimates and its plan, and given the same calls decides the same."""

    def __init__(self, settings: StreamingSettings = StreamingSettings()) -> None:
        self.settings = settings
        self.estimates = Estimates(settings)
        self._calm = FirstComeFirstServed(settings.headroom_blocks, settings.prefill_budget)
        self._plan = Plan()
        self._stressed = False
        self.looked_at = float("-inf")
        """When the plan was made."""
        self._tick_at = float("-inf")
        self._number = 0
        self._critical = self._stay = 0.0

    def decide(self, snapshot: Snapshot, now: float) -> Decision:
        if not self._stressed and self.settings.pause != "always":
            step = self._calm.plan(snapshot)
            if step.admitted == len(snapshot.waiting) and not step.evicted and self._is_schedulable(snapshot, now):
                return step.decision()
            self._stressed = True
            self._tick_at = float("-inf")
        if self._must_look(snapshot, now):
            self._look(snapshot, now)
        means = Means(
            self.settings.offload,
            self.settings.load_ahead * self.settings.tick,
            keepers=lambda: sorted(snapshot.running, key=lambda request: self._claim(request, now)),
        )
        step = carry_out(self._plan, snapshot, now, self._prompt_tokens(snapshot, now), means)
        self._stressed = bool(snapshot.waiting or snapshot.loading or self.estimates.overloaded)
        return step.decision(wake_at=float("inf") if step.grants else self._tick_at)

    # ---- looking -----------------------------------------------------------------------------------------

    def _is_schedulable(self, snapshot: Snapshot, now: float) -> bool:
        """Whether the device is fast enough for everybody who is there, as far as is known."""
        if now >= self._tick_at:
            self._tick_at = now + self.settings.tick
            self.estimates.note(snapshot, Crowd(snapshot, (), now), 0.0)
        coming = sum([request.reader.rate for request in snapshot.waiting])
        return self.estimates.allows(coming) if coming else not self.estimates.overloaded

    def _must_look(self, snapshot: Snapshot, now: float) -> bool:
        if now >= self._tick_at:
            return True
        early = self.looked_at + self.settings.tick / _LOOKS_PER_TICK
        return now >= early and _number(snapshot) != self._number

    def _look(self, snapshot: Snapshot, now: float) -> None:
        suspended = [request for request in snapshot.waiting if request.preemptions]
        newcomers = [request for request in snapshot.waiting if not request.preemptions]
        wait = now - newcomers[0].arrival if newcomers else 0.0
        crowd = Crowd(snapshot, suspended, now)
        self.estimates.note(snapshot, crowd, wait)
        table = Candidates(snapshot, crowd, now, self.estimates, self.settings)
        self._plan = balance(snapshot, table, newcomers, now, self.estimates, self.settings, self._plan.paused)
        self._critical, self._stay = table.critical, table.stay
        self.looked_at, self._tick_at = now, now + self.settings.tick
        self._number = _number(snapshot)

    def _prompt_tokens(self, snapshot: Snapshot, now: float) -> int:
        """Prompt tokens that this step may compute: no more than the readers of those who decode have time for."""
        if not self._plan.bring and all(request.num_uncomputed <= 1 for request in snapshot.running):
            return snapshot.token_budget
        decoding = [
            request
            for request in snapshot.running
            if request.num_uncomputed <= 1 and request.id not in self._plan.paused
        ]
        budget = snapshot.token_budget - len(decoding)
        if not decoding:
            return budget
        if self.settings.prefill_budget is not None:
            budget = min(budget, self.settings.prefill_budget)
        slack = min([request.reader.slack(now) for request in decoding])
        period = min([1.0 / request.reader.rate for request in decoding])
        context = sum([request.num_tokens for request in decoding])
        spare = _CAUTION * max(slack, period) - snapshot.costs.decode_seconds(len(decoding), context)
        tokens = int(spare / max(snapshot.costs.prefill_seconds(1), 1e-9))
        return min(budget, max(tokens, int(self.settings.prefill_floor * budget), 1))

    def _claim(self, request: RequestView, now: float) -> tuple[bool, float]:
        """Who keeps his blocks when some have to go: low values longest."""
        slack = request.reader.slack(now)
        settled = request.num_uncomputed <= 1 and request.moved_at <= now - self._stay
        return (settled and slack >= self._critical, slack)


def _number(snapshot: Snapshot) -> int:
    """Of requests; it changes when somebody comes or goes."""
    return len(snapshot.waiting) + len(snapshot.loading) + len(snapshot.running)
