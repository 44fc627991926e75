"""Rounds as the engine has them: requests with shared segments wait here until what they share is encoded.

A round goes through four stages: its members gather (`rounds.barrier`), segments that nobody has encoded are encoded
together, those whose KV deviates most in their places are chosen (`rounds.selection`), and each member gets a layout
(`rounds.layout`) and becomes a waiting request like any other, with most of its prompt computed. Encoding rides in
front of steps, within their budget of prompt tokens, so a long round never stalls the readers of others.

From then on the policy has it: members are admitted, preempted and finished one by one. What a preempted member read of
segments stays, since it pins them until it ends; what it computed is computed again, with the same choice.

Source: TokenDance (arXiv 2604.03143), 4.2.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from kvarn.serving.conversations import Conversations
from kvarn.serving.kvcache.cache import KVCache
from kvarn.serving.kvcache.segments import SegmentStore
from kvarn.serving.request import Request
from kvarn.serving.round_choices import RoundChoices
from kvarn.serving.round_discovery import discover_untold
from kvarn.serving.round_group import RoundCounters, RoundGroup, common_prefix
from kvarn.serving.rounds.barrier import Barrier, Gathered, RoundKey
from kvarn.serving.rounds.layout import lay_out
from kvarn.serving.rounds.segment import StoredSegment
from kvarn.serving.rounds.settings import ReuseSettings
from kvarn.serving.rounds.spans import Span, spans_of
from kvarn.serving.rounds.work import EncodeJob, SegmentExecutor
from kvarn.serving.rounds_report import RoundFacts, RoundReport

_log = logging.getLogger(__name__)

_REMEMBERED, _REPORTED = 256, 100
"""Rounds that late members are looked up in, and rounds that are told of."""


@dataclass(slots=True)
class Progress:
    """What came of going on with rounds."""

    released: list[Request] = field(default_factory=list)
    """Who waits for the policy from now on."""
    failed: list[tuple[Request, str]] = field(default_factory=list)
    """Who cannot be served, and why; they still wait here."""
    worked: bool = False


class RoundCalls:
    """Of one engine; None there where nothing but prefixes is reused."""

    def __init__(
        self,
        cache: KVCache,
        store: SegmentStore,
        executor: SegmentExecutor,
        settings: ReuseSettings,
        kept: Conversations | None = None,
    ) -> None:
        """`kept`: where what requests leave is kept; None where it is not."""
        self.cache = cache
        self.kept = kept
        self.store = store
        self.executor = executor
        self.settings = settings
        self.counters = RoundCounters()
        self._barrier: Barrier[Request] = Barrier(settings.wait)
        self._groups: list[RoundGroup] = []
        self._choices = RoundChoices(cache, executor, self.counters)
        self._contexts: OrderedDict[RoundKey, dict[bytes, tuple[NDArray[np.int32], NDArray[np.int32]]]] = OrderedDict()
        """What each text of a round that was encoded with others was encoded behind, for members that come late."""
        self._reports: deque[RoundReport] = deque(maxlen=_REPORTED)

    # ---- the engine tells --------------------------------------------------------------------------------

    def add(self, request: Request, now: float) -> bool:
        """A request has come; whether it waits here. RequestError for a member that cannot belong to its round."""
        if request.round is not None:
            agent = request.round.agent or request.id
            self._barrier.join(request, request.tenant, request.round, agent, now)
            return True
        if any(part.kind == "shared" for part in request.segments) or (request.segments and self.kept is not None):
            self._groups.append(RoundGroup(Gathered(("", request.id), [request], now), [request]))
            return True
        return False

    def remove(self, request: Request) -> bool:
        """A request is gone; whether it waited here."""
        for group in self._groups:
            if request in group.members:
                group.members.remove(request)
                self._let_go(group, request)
                return True
        return self._barrier.leave(request)

    def ends(self, request: Request) -> None:
        """A request that has run is about to give its blocks back."""
        if self.kept is None:
            return
        try:
            self.kept.keep(request)
        except Exception:
            _log.exception("what a request leaves is not kept: whoever goes on with it computes it again")

    def ended(self, request: Request) -> None:
        """A request has ended: what it read may go."""
        if self.kept is not None:
            self.kept.let_go(request)
        if request.layout is not None:
            for each in request.layout.placed:
                self.store.unpin(each.segment)
            request.set_layout(None)

    def admitted(self, request: Request) -> bool:
        """A request has got its first blocks; False when there are none for the segments that it copies."""
        if self.kept is not None and not self.kept.write_back(request):
            return False
        if request.layout is None or not request.layout.needs_copying:
            return True
        if not self.cache.grow(request, request.prompt_length):
            return False
        self.executor.copy_in(request)
        return True

    def close(self) -> None:
        """The engine ends."""
        if self.kept is not None:
            self.kept.close()

    def check(self) -> None:
        """Raise AssertionError unless the books are right."""
        self.store.check()
        if self.kept is not None:
            self.kept.check()

    @property
    def num_held(self) -> int:
        """Requests that wait here."""
        return self._barrier.num_waiting + sum(len(group.members) for group in self._groups)

    def wake_at(self) -> float:
        return self._barrier.wake_at()

    def facts(self) -> RoundFacts:
        counters, store = self.counters, self.store
        return RoundFacts(
            collected_rounds=counters.collected_rounds,
            late_members=counters.late_members,
            waiting_members=self.num_held,
            segment_hits=store.hits,
            segment_misses=store.misses,
            encoded_tokens=counters.encoded_tokens,
            reused_tokens=counters.reused_tokens,
            refreshed_tokens=counters.refreshed_tokens,
            selection_passes=counters.selection_passes,
            segment_tokens_held=store.num_tokens,
            segment_bytes=store.used_blocks * self.executor.block_bytes,
            mirror_bytes=0 if self.kept is None else self.kept.mirrors.used_bytes,
            dense_bytes=0 if self.kept is None else self.kept.dense_bytes,
            resumed_requests=0 if self.kept is None else self.kept.resumed_requests,
            resumed_tokens=0 if self.kept is None else self.kept.resumed_tokens,
        )

    def recent(self, limit: int) -> list[RoundReport]:
        """The last `limit` rounds, the newest first."""
        return list(self._reports)[:limit]

    def advance(self, now: float, budget: int) -> Progress:
        """Go on with rounds, encoding at most `budget` tokens."""
        for gathered in self._barrier.due(now):
            self._groups.append(RoundGroup(gathered, list(gathered.members)))
            self.counters.late_members += gathered.late
            self.counters.collected_rounds += not gathered.late
        progress = Progress()
        while self._groups and budget > 0:
            group = self._groups[0]
            if group.is_blocked:
                break
            try:
                used = self._go_on(group, budget, now, progress)
            except Exception as error:
                _log.exception("a round failed; its %d requests are ended", len(group.members))
                progress.failed = [(request, f"its shared segments failed: {error}") for request in group.members]
                break
            if not used and group.members and not group.is_blocked:
                break  # there is no room for its segments
            budget -= used
            if not group.members:
                self._groups.pop(0)
        return progress

    def relieve(self, waiting: Sequence[Request]) -> bool:
        """Nothing runs and nobody can begin: those who come last do without segments. Whether that makes room."""
        for group in reversed(self._groups):
            holding = [request for request in group.members if group.segments_of(request)]
            for request in holding:
                self._let_go(group, request)
                group.segments[id(request)] = []
            if holding:
                return True
        for request in reversed(waiting):
            if request.layout is not None:
                self.ended(request)
                return True
        return False

    # ---- the stages of a round ---------------------------------------------------------------------------

    def _go_on(self, group: RoundGroup, budget: int, now: float, progress: Progress) -> int:
        """One stage of a round; the tokens that it took of the budget."""
        if not group.resolved:
            self._resolve(group)
        members = group.members[:1] if self.settings.mode == "serial" else list(group.members)
        missing = self._missing(group, members)
        if missing:
            used = self._encode(group, missing, budget)
            progress.worked |= used > 0
            return used
        self._release(group, members, now)
        progress.worked = True
        progress.released += members
        group.members = [request for request in group.members if request not in members]
        group.waits_for = members[0] if self.settings.mode == "serial" and members else None
        return 0

    def _resolve(self, group: RoundGroup) -> None:
        """Find or begin the segments of all members."""
        group.resolved = True
        common = common_prefix([request.known_tokens for request in group.members])
        spans: dict[int, list[Span]] = {}
        untold: dict[int, int] = {}
        behind = max(self.settings.sink_tokens, self.settings.joint_sink if self.settings.source == "joint" else 0)
        for request in group.members:
            hit = self.cache.lookup(request).tokens
            exact = max(hit, common if len(group.members) > 1 else 0)
            begin = max(self._resume(group, request, exact), behind)
            if request.round is not None and not request.segments:
                untold[id(request)] = max(begin, exact)
            exact += self.cache.block_size  # less than a block beyond a prefix is soon computed
            spans[id(request)] = [
                span
                for span in spans_of(request.segments)
                if span.end >= exact and span.start >= begin and span.length >= self.settings.shortest
            ]  # the others are computed exactly, like any other text
        if untold:
            known = self._contexts.get(group.gathered.key, {})
            salt = self.cache.salt(group.members[0])
            discover_untold(group, spans, untold, known=known, store=self.store, salt=salt, settings=self.settings)
        joint = self._is_joint(group, spans)
        if not joint and not self.settings.alone:
            spans = {member: [] for member in spans}
        group.sink = self.settings.sink_tokens
        if joint:  # no member's private beginning is in the others' KV, but for as little as without others
            group.sink = min(self.settings.joint_sink, max(common, group.sink))
        for request in group.members:
            group.segments[id(request)] = [
                (span, segment)
                for span in spans[id(request)]
                if (segment := self._take(group, request, request.tokens[span.start : span.end], joint)) is not None
            ]

    def _is_joint(self, group: RoundGroup, spans: dict[int, list[Span]]) -> bool:
        """Whether segments are encoded behind one another: all must see the same ones, lest KV tell more than texts.

        Who comes late gets those of the others where he sees the same as they do.
        """
        known = self._contexts.get(group.gathered.key)
        if self.settings.source != "joint" or not self.settings.whole_blocks or not (known or len(group.members) > 1):
            return False
        seen = [{request.tokens[start:end].tobytes() for start, end in spans[id(request)]} for request in group.members]
        if known:
            seen.append(set(known))
        return all(each == seen[0] for each in seen)

    def _take(
        self, group: RoundGroup, request: Request, tokens: NDArray[np.int32], joint: bool
    ) -> StoredSegment | None:
        """The segment of these tokens for a member of a group, pinned."""
        salt, content = self.cache.salt(request), tokens.tobytes()
        known = self._contexts.setdefault(group.gathered.key, {})
        sink, before = request.tokens[: group.sink], tokens[:0]
        context = known.get(content)
        if joint and context is not None and self.store.find(tokens, context[0], salt, context[1]) is not None:
            sink, before = context
        elif joint and group.chain:
            last = group.chain[-1]
            sink, before = sink[:0], np.concatenate([last.before, last.all_tokens])
        segment = self.store.take(tokens, sink, salt, before)
        if segment is not None and joint and content not in known:
            group.before[segment.key] = tuple(group.chain)
            group.chain.append(segment)
            known[content] = (segment.sink_tokens, segment.before)
        if len(self._contexts) > _REMEMBERED:
            self._contexts.popitem(last=False)
        return segment

    def _resume(self, group: RoundGroup, request: Request, exact: int) -> int:
        """Let a member go on with what is kept of its conversation, if that is more than `exact` tokens; its tokens."""
        found = None if self.kept is None else self.kept.find(request, exact)
        if self.kept is None or found is None:
            return 0
        resumption = self.kept.resume(request, found)
        if resumption is None:
            return 0
        group.resumed[id(request)] = resumption
        group.before.update(resumption.before)
        return len(found.tokens)

    def _missing(self, group: RoundGroup, members: Sequence[Request]) -> list[StoredSegment]:
        """Segments without what the members need of them."""
        used = {segment.key: segment for request in members for segment in group.segments_of(request)}
        incomplete = any(not segment.is_encoded for segment in used.values())
        placed = incomplete or not self.settings.is_dense
        missing = [each for each in used.values() if not each.is_encoded or (placed and not each.blocks)]
        return sorted(missing, key=lambda each: len(each.before))  # what others are encoded behind comes first

    def _encode(self, group: RoundGroup, missing: Sequence[StoredSegment], budget: int) -> int:
        """Bring segments to the device, computing at most `budget` tokens; what that took of the budget."""
        jobs: list[EncodeJob] = []
        loads: list[StoredSegment] = []
        used = 0
        for segment in missing:
            if used >= budget or not self.store.place(segment):
                break
            if segment.is_encoded:
                loads.append(segment)
                used += 1
                continue
            count = min(budget - used, segment.sink + segment.length - segment.encoded)
            jobs.append(EncodeJob(segment, count, group.before.get(segment.key, ())))
            used += count
            if self.settings.mode == "serial":
                break
        if loads:
            try:
                self.executor.load(loads)
            except Exception:
                for segment in loads:
                    self.store.displace(segment)
                raise
            self.counters.loaded_segments += len(loads)
        if jobs:
            self.executor.encode(jobs)
            for job in jobs:
                job.segment.encoded += job.count
                self.counters.encoded_tokens += job.count
        return used

    def _release(self, group: RoundGroup, members: Sequence[Request], now: float) -> None:
        """Choose what is computed anew, and give each member its layout."""
        sharing = [request for request in members if group.segments_of(request)]
        placed = self._choices.choose(group, sharing, self.settings)
        for request in sharing:
            resumption = group.resumed.get(id(request))
            parts = [*(resumption.placed if resumption is not None else ()), *placed[id(request)]]
            layout = lay_out(request.prompt_length, parts, self.cache.block_size, dense=self.settings.is_dense)
            if self.kept is not None:
                layout = replace(layout, resumed=self.kept.own_tokens(request))
            if layout.reused:  # else it is computed like any other, and exact
                for each in layout.placed:
                    self.store.pin(each.segment)
                request.set_layout(layout)
            self.counters.reused_tokens += layout.reused
            self.counters.refreshed_tokens += layout.refreshed
        self._report(group, members, now)
        for request in members:
            self._let_go(group, request)

    def _report(self, group: RoundGroup, members: Sequence[Request], now: float) -> None:
        """Note what became of members that are about to be released; those of serial rounds one by one."""
        hint = members[0].round if members else None
        if hint is None:
            return
        layouts = [request.layout for request in members if request.layout is not None]
        segments = {id(each.segment) for layout in layouts for each in layout.placed}
        self._reports.appendleft(
            RoundReport(
                id=hint.id,
                members=hint.size,
                arrived=len(group.gathered.members),
                waited_seconds=now - group.gathered.opened_at,
                mode=self.settings.mode,
                segments=len(segments),
                reused_tokens=sum(layout.reused for layout in layouts),
                refreshed_tokens=sum(layout.refreshed for layout in layouts),
            )
        )

    def _let_go(self, group: RoundGroup, request: Request) -> None:
        """The group's hold on a member's segments."""
        for segment in group.segments_of(request):
            self.store.unpin(segment)
        group.segments.pop(id(request), None)
        group.resumed.pop(id(request), None)
