"""The engine: owns every request and every KV block, and turns them into tokens one step at a time.

`step` is the whole loop on one page: end the copies that are done, give up what is out of time, let the policy decide,
move blocks accordingly, compute, hand out tokens, copy what is new to the host. The policy sees a read-only snapshot,
the executor sees a batch; neither calls back. The engine knows no sockets and no wall clock, so the same object serves
and is simulated.
"""

from __future__ import annotations

import heapq
import logging
import os
from bisect import bisect_left, insort, insort_left
from dataclasses import dataclass
from time import perf_counter

from kvarn.errors import RequestError
from kvarn.serving.agent_calls import AgentCalls
from kvarn.serving.agents.events import AgentEvent, CallReport
from kvarn.serving.batch import Batch, SampledToken, ScheduledRequest, TokenLogprobs
from kvarn.serving.block_states import count_blocks
from kvarn.serving.clock import Clock
from kvarn.serving.costs import Costs
from kvarn.serving.counters import Counters
from kvarn.serving.drafting import write_drafts
from kvarn.serving.engine_check import check_engine
from kvarn.serving.executors.protocol import Executor
from kvarn.serving.fit import require_fit
from kvarn.serving.kvcache.cache import KVCache
from kvarn.serving.kvcache.tier_books import TierBooks
from kvarn.serving.kvcache.tiers import Tiers
from kvarn.serving.policies.protocol import Policy
from kvarn.serving.request import FinishReason, Request, RequestState
from kvarn.serving.round_calls import RoundCalls
from kvarn.serving.snapshots import take_snapshot
from kvarn.serving.speculation import Speculator

_log = logging.getLogger(__name__)

_LONGEST_REST = 0.1
"""Seconds to rest at most: what else may change, such as deadlines, is looked at in between."""
_COPY_WAIT = 0.01
"""Seconds to wait for a copy at most when there is nothing to compute: messages are handled in between."""


@dataclass(slots=True)
class Emission:
    """News of one request: at most one token, and why it ended if it did. A step may have several of a request."""

    request: Request
    token: int | None = None
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None


class Engine:
    """Continuous batching over one executor. Not thread-safe: one owner calls everything."""

    def __init__(
        self,
        executor: Executor,
        policy: Policy,
        cache: KVCache,
        clock: Clock,
        *,
        token_budget: int,
        max_running: int,
        max_context: int,
        vocab_size: int,
        speculator: Speculator | None = None,
        tiers: Tiers | None = None,
        agents: AgentCalls | None = None,
        rounds: RoundCalls | None = None,
        round_budget: int | None = None,
    ) -> None:
        """`round_budget`: tokens of shared segments encoded before a step that others run in; None: as token_budget."""
        self.executor = executor
        self.policy = policy
        self.cache = cache
        self.clock = clock
        self.token_budget = token_budget
        self.round_budget = token_budget if round_budget is None else round_budget
        self.max_running = max_running
        # A request that the pool could never hold would wait for ever.
        self.max_context = min(max_context, cache.pool.num_blocks * cache.block_size)
        self.vocab_size = vocab_size
        self.speculator = speculator
        self.tiers = tiers
        self.agents = agents
        self.rounds = rounds
        self.costs = Costs()
        self.counters = Counters()
        self.batch = Batch()
        """What the last step computed."""
        self.wake_at = float("inf")
        """When the policy wants to be asked again, after a step in which it had nothing computed."""
        self.waiting: list[Request] = []
        self.loading: list[Request] = []
        self.running: list[Request] = []
        self.requests: dict[str, Request] = {}
        """All that have not ended, by id."""
        self.tier_books = None if tiers is None else TierBooks(tiers, self.requests)
        self._deadlines: list[tuple[float, str]] = []
        self._ended: list[Emission] = []
        self._rests = False
        self._check = os.environ.get("KVARN_CHECK") == "1"

    @property
    def has_work(self) -> bool:
        return bool(self.requests or self._ended)

    def rest_seconds(self) -> float:
        """How long nothing need be done unless somebody comes: when all requests pause, until the policy wakes them."""
        if not self._rests:
            return 0.0
        wake_at = self.wake_at if self.rounds is None else min(self.wake_at, self.rounds.wake_at())
        return max(0.0, min(wake_at - self.clock.now(), _LONGEST_REST))

    def add(self, request: Request) -> None:
        """Take over a request. RequestError, and nothing kept, when it can never be served."""
        require_fit(request, self.max_context, self.vocab_size)
        if request.id in self.requests:
            raise RequestError(f"request id {request.id!r} is already running", field="id", status=409)
        self.executor.add(request)
        try:
            held = self.rounds is not None and self.rounds.add(request, self.clock.now())
        except RequestError:
            self.executor.remove(request)
            raise
        self.requests[request.id] = request
        if not held:
            insort(self.waiting, request, key=_rank)
        if request.deadline != float("inf"):
            heapq.heappush(self._deadlines, (request.deadline, request.id))
        if self.agents is not None:
            self.agents.added(request, self.clock.now())

    def agent_event(self, event: AgentEvent) -> CallReport:
        """News of a tool call. RequestError for what is unknown or makes no sense; "untracked" without agents."""
        if self.agents is None:
            return CallReport(event.request, "untracked")
        return self.agents.handle(event, self.clock.now())

    def block_states(self) -> dict[str, int]:
        """The device's blocks by what they are held for; see kvarn.serving.block_states."""
        return count_blocks(
            self.cache.pool, self.loading, self.tiers, None if self.agents is None else self.agents.held
        )

    def cancel(self, id: str) -> None:
        """End a request now; unknown or finished ids are ignored (its last token may have crossed the cancel)."""
        request = self.requests.get(id)
        if request is not None:
            self._finish(request, FinishReason.CANCELLED)

    def acknowledge(self, id: str, tokens: int, fastest: float) -> None:
        """The reader of a request has read so many of its tokens (see Reader.acknowledge); unknown ids are ignored."""
        request = self.requests.get(id)
        if request is not None:
            request.reader.acknowledge(tokens, self.clock.now(), fastest)

    def step(self) -> list[Emission]:
        """One step: a token for each running request that has its prompt computed, and more where drafts came true."""
        started = perf_counter()
        now = self.clock.now()
        self._end_copies(now)
        self._expire(now)
        collected = self._collect(now)
        batch = self.batch = self._schedule(now)
        while self.tiers is not None and self.tiers.copies_first:
            self.tiers.wait(_COPY_WAIT)
            self._end_copies(self.clock.now())
        batch.decodes = all(row.count == 1 and row.samples for row in batch.rows)
        if self.speculator is not None and batch.decodes:  # beside prompts a row is not nearly free
            budget = self.token_budget - len(batch.rows)
            self.counters.drafted_tokens += write_drafts(self.speculator, batch, self.cache, budget)
        sampled = self._compute(batch)
        self._advance(batch, sampled)
        if self.tiers is not None:
            if batch.rows:
                ended = self.clock.now()
                self.tiers.write_ahead(self.running, ended, ended - now)
            else:  # all that there is to do hangs on copies
                self.tiers.wait(_COPY_WAIT)
        emissions, self._ended = self._ended, []
        self._rests = not (batch.rows or emissions or collected)
        self.counters.steps += 1
        self.counters.step_seconds += perf_counter() - started
        if self._check:
            self.check()
        return emissions

    def settle(self) -> bool:
        """Without work: end the copies that are done; whether there are any left, so that it should be called again.

        Conversations whose agents wait for tools come back in time or are let go of: called often, it sees to that.
        """
        now = self.clock.now()
        self._end_copies(now)
        if self.agents is not None:
            self.agents.tend(now)
            if self.agents.is_away:
                self.agents.apply(self.policy.decide(take_snapshot(self), now).stalls, now)
                return True
        return self.tiers is not None and self.tiers.copying

    def close(self) -> None:
        """End what runs beside the engine. What it has not finished is lost; nothing may be asked of it any more."""
        if self.tiers is not None:
            self.tiers.close()
        if self.rounds is not None:
            self.rounds.close()

    def check(self) -> None:
        """Raise AssertionError unless queues, states and KV blocks agree."""
        check_engine(self)

    # ---- the parts of a step -----------------------------------------------------------------------------

    def _end_copies(self, now: float) -> None:
        """Requests whose blocks have arrived run; one whose copy failed waits again, to be recomputed."""
        if self.tiers is None:
            return
        for request, filled in self.tiers.collect():
            if self.agents is not None and self.agents.held.owns(request):
                self.agents.held.uploaded(request, filled, now)
                continue
            self.loading.remove(request)
            request.moved_at = now
            if filled:
                request.move_to(RequestState.RUNNING)
                self.running.append(request)
                self.counters.loads += 1
                self._copy_segments(request)
            else:
                self.cache.release(request)
                request.move_to(RequestState.WAITING)
                insort_left(self.waiting, request, key=_rank)

    def _expire(self, now: float) -> None:
        if self.agents is not None:
            self.agents.tend(now)
        while self._deadlines and self._deadlines[0][0] <= now:
            _, id = heapq.heappop(self._deadlines)
            if id in self.requests:
                self._finish(self.requests[id], FinishReason.DEADLINE)

    def _collect(self, now: float) -> bool:
        """Go on with rounds, and hand over who is ready; whether anything was done."""
        if self.rounds is None:
            return False
        progress = self.rounds.advance(now, self.round_budget if self.running else self.token_budget)
        for request, error in progress.failed:
            self._finish(request, FinishReason.ERROR, error=error)
        for request in progress.released:
            insort(self.waiting, request, key=_rank)
        copying = self.tiers is not None and self.tiers.copying
        idle = not (progress.worked or self.running or self.loading or self.batch.rows or copying)
        return progress.worked or (idle and self.rounds.relieve(self.waiting))

    def _schedule(self, now: float) -> Batch:
        """Ask the policy, then move requests and blocks as it decided."""
        if not self.requests:
            return Batch()
        decision = self.policy.decide(take_snapshot(self), now)
        self.wake_at = decision.wake_at
        if decision.stalls and self.agents is not None:
            self.agents.apply(decision.stalls, now)
        for id in decision.preempt:
            self._preempt(self.requests[id])
        if self.tiers is not None:
            if decision.offload:
                leaving = [self.requests[id] for id in decision.offload]
                self.tiers.offload(leaving, [each for each in self.running if each not in leaving], now)
                for request in leaving:
                    self._preempt(request)
            for id in decision.load:
                self._load(self.tiers, self.requests[id])
        batch, requests, waiting, size = Batch(), self.requests, RequestState.WAITING, self.cache.block_size
        for id, granted in decision.grants:
            request = requests[id]
            if request.state is waiting and not self._admit(request):
                continue
            computed = request.num_computed
            tokens = min(granted, request.num_tokens - computed)
            # Most rows have room in their last block: no call for them.
            room = request.num_blocks * size - request.slot_surplus
            if computed + tokens <= room or self.cache.grow(request, computed + tokens):
                batch.rows.append(ScheduledRequest(request, tokens))
            elif computed == 0:
                self._preempt(request)  # admitted on a promise that did not hold
        return batch

    def _compute(self, batch: Batch) -> list[list[SampledToken]]:
        """Run the batch. A forward pass that raises fails the requests in it, not the engine."""
        if not batch.rows:
            return []
        try:
            started = self.clock.now()
            sampled = self.executor.execute(batch)
        except Exception as error:
            _log.exception("the forward pass failed; its %d requests are ended", len(batch.rows))
            for row in batch.rows:
                self._finish(row.request, FinishReason.ERROR, error=f"the forward pass failed: {error}")
            batch.rows.clear()
            return []
        self.costs.note_batch(batch, self.clock.now() - started)
        if self.speculator is not None and batch.decodes:
            self.speculator.cost.note(batch.num_tokens, sum(map(len, sampled)), self.clock.now() - started)
        return sampled

    def _advance(self, batch: Batch, sampled: list[list[SampledToken]]) -> None:
        """Account for what was computed and hand out the sampled tokens."""
        results, now = iter(sampled), self.clock.now()
        for row in batch.rows:
            request, samples = row.request, row.samples
            prompt_left = request.prompt_length - request.num_computed
            if prompt_left > 0:
                self.counters.prompt_tokens += min(row.count, prompt_left)
            self._note_computed(request, row.count - row.drafts)
            if not samples:
                continue
            for i, token in enumerate(next(results)):
                if i:  # the draft before it was right, so its KV is
                    self.counters.accepted_tokens += 1
                    self._note_computed(request, 1)
                self._emit(request, token, now)
                if request.state is RequestState.FINISHED:
                    break

    def _note_computed(self, request: Request, tokens: int) -> None:
        request.num_computed += tokens
        if request.num_computed // self.cache.block_size > request.indexed_blocks:
            self.cache.commit(request)

    def _emit(self, request: Request, sampled: SampledToken, now: float) -> None:
        if sampled.error is not None:
            self._finish(request, FinishReason.ERROR, error=sampled.error)
            return
        reason = request.append(sampled.token)
        if sampled.grammar_done:
            reason = FinishReason.STOP  # the text is whole, also when this was the last token it could have
        self.counters.output_tokens += 1
        request.reader.receive(now)
        emission = Emission(request, sampled.token, sampled.logprobs)
        if reason is None:
            self._ended.append(emission)
        else:
            self._finish(request, reason, emission=emission)

    # ---- moves of one request ----------------------------------------------------------------------------

    def _admit(self, request: Request) -> bool:
        """Let a waiting request run; False when blocks that it needs at once are not there, and it waits on."""
        del self.waiting[self._waiting_index(request)]
        request.move_to(RequestState.RUNNING)
        request.moved_at = self.clock.now()
        self.running.append(request)
        self.cache.admit(request)
        if self.agents is not None:
            self.agents.taken_over(request, request.moved_at)
        return self._copy_segments(request)

    def _copy_segments(self, request: Request) -> bool:
        """Give a request that has begun to run its copies of segments; False, and it does not run, without."""
        try:
            if self.rounds is None or self.rounds.admitted(request):
                return True
            self._preempt(request)
        except Exception as error:
            _log.exception("copying shared segments failed; the request is ended")
            self._finish(request, FinishReason.ERROR, error=f"its shared segments failed: {error}")
        return False

    def _load(self, tiers: Tiers, request: Request) -> None:
        """Start bringing a waiting request back from the host; nothing changes where that cannot be done now."""
        if tiers.load(request):
            del self.waiting[self._waiting_index(request)]
            request.move_to(RequestState.LOADING)
            request.moved_at = self.clock.now()
            self.loading.append(request)
            if self.agents is not None:
                self.agents.taken_over(request, request.moved_at)

    def _preempt(self, request: Request) -> None:
        """Take a running request's blocks; its tokens stay, and their KV is loaded or recomputed later."""
        self.running.remove(request)
        self.cache.release(request)
        request.move_to(RequestState.WAITING)
        request.moved_at = self.clock.now()
        request.preemptions += 1
        self.counters.preemptions += 1
        # Before those who came at the same moment and have not begun.
        insort_left(self.waiting, request, key=_rank)

    def _finish(
        self, request: Request, reason: FinishReason, *, error: str | None = None, emission: Emission | None = None
    ) -> None:
        """The one way out: blocks back, state forgotten, the client told."""
        if self.agents is not None:
            goes_on = (
                request.may_call
                and request.layout is None
                and request.state is RequestState.RUNNING
                and reason is not FinishReason.ERROR
            )
            self.agents.ended(request, self.clock.now(), goes_on=goes_on)
        if request.state is RequestState.WAITING and self.rounds is not None and self.rounds.remove(request):
            pass
        elif request.state is RequestState.WAITING:
            del self.waiting[self._waiting_index(request)]
        elif request.state is RequestState.LOADING:
            self.loading.remove(request)
            self.cache.release(request)
        else:
            self.running.remove(request)
            if self.tiers is not None:
                self.tiers.write_last(request)
            if self.rounds is not None and reason is not FinishReason.ERROR:
                self.rounds.ends(request)
            self.cache.release(request)
        if self.tiers is not None:
            self.tiers.forget(request)
        if self.rounds is not None:
            self.rounds.ended(request)
        request.move_to(RequestState.FINISHED)
        request.finish_reason = reason
        del self.requests[request.id]
        self.executor.remove(request)
        if self.speculator is not None:
            self.speculator.forget(request)
        emission = emission or Emission(request)
        emission.finish_reason, emission.error = reason, error
        self._ended.append(emission)

    # ---- small parts -------------------------------------------------------------------------------------

    def _waiting_index(self, request: Request) -> int:
        index = bisect_left(self.waiting, _rank(request), key=_rank)
        while self.waiting[index] is not request:  # equal ranks stand side by side
            index += 1
        return index


def _rank(request: Request) -> tuple[int, float]:
    return (request.priority, request.arrival)
