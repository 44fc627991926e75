"""First come, first served, conservatively: a request gets in when all it may ever need is reserved, and then stays.

Nobody is ever taken off the device. With pacing, a request whose reader has enough ahead of him skips steps, which
then are shorter for the others; its blocks stay its own.
"""

from __future__ import annotations

from kvarn.serving.policies.fcfs import by_arrival
from kvarn.serving.policies.protocol import Decision, RequestView, Snapshot
from kvarn.serving.policies.step import Step


class Reserving:
    """The policy's settings.

    prefill_budget   prompt tokens computed in a step that others' readers wait for; None: the whole token budget
    ahead            seconds of text a reader is kept ahead of his reading; None: as far as it goes
    """

    def __init__(self, prefill_budget: int | None = None, ahead: float | None = None) -> None:
        self.prefill_budget = prefill_budget
        self.ahead = ahead

    def decide(self, snapshot: Snapshot, now: float) -> Decision:
        step = Step(snapshot, sorted(snapshot.running, key=by_arrival))
        paused = self._paused(snapshot, now)
        prefilling = step.continue_decoding(paused)
        step.computing = [request.id for request in (*prefilling, *snapshot.loading)]
        if step.grants and self.prefill_budget is not None:
            step.budget = min(step.budget, self.prefill_budget)
        for request in prefilling:
            step.continue_running(request)
        reserved = sum([_all_blocks(snapshot, request) for request in (*snapshot.running, *snapshot.loading)])
        for request in snapshot.waiting:
            reserved += _all_blocks(snapshot, request)
            if step.is_full or reserved > snapshot.num_blocks or not step.admit(request):
                break
        wake_at = min(paused.values(), default=float("inf")) if not step.grants else float("inf")
        return step.decision(wake_at)

    def _paused(self, snapshot: Snapshot, now: float) -> dict[str, float]:
        """Who skips this step, and when each will go on."""
        if self.ahead is None:
            return {}
        enough = now + self.ahead
        return {
            request.id: dry - self.ahead for request in snapshot.running if (dry := request.reader.dry_at()) > enough
        }


def _all_blocks(snapshot: Snapshot, request: RequestView) -> int:
    return snapshot.blocks_for(request.prompt_length + request.max_outputs)
