"""What members of rounds leave when they end, and requests that go on where they stopped.

The KV of a request with shared segments is never indexed as a prefix: it is that of its whole layout, and of no other.
So it is kept as one, a *conversation*: its tokens, where which segments stand in it, which of their blocks it computed
anew, and the blocks of its own. A request of the same tenant whose prompt begins
with all of a conversation's tokens gets the same layout for them, with the same segments, and the kept blocks back:
its own slots are packed in the order of positions, so the old ones are the same in the longer layout.

Kept blocks are in a store of mirrors, a family a round. Segments in it are as the segment memory has them, once a
family as far as they are its master's: they bring back segments that were given up, or were of an engine before.

Source: TokenDance (arXiv 2604.03143), 4.3, for what is kept, as a master and mirrors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvarn.serving.kvcache.cache import KVCache
from kvarn.serving.kvcache.mirror_family import BlockKey, MemberCache
from kvarn.serving.kvcache.mirrors import MirrorStore
from kvarn.serving.kvcache.segments import SegmentStore
from kvarn.serving.request import Request
from kvarn.serving.rounds.layout import Placed
from kvarn.serving.rounds.segment import StoredSegment
from kvarn.serving.rounds.settings import ReuseSettings
from kvarn.serving.rounds.work import SegmentExecutor


class _Place(msgspec.Struct, frozen=True, array_like=True):
    """Where a segment stands."""

    start: int
    length: int
    refreshed: tuple[int, ...]
    sink: bytes
    before: bytes
    """int32: what it was encoded behind, see StoredSegment; not always a text of this prompt."""

    @classmethod
    def of(cls, placed: Placed) -> _Place:
        segment = placed.segment
        refreshed = tuple(sorted(placed.refreshed))
        return cls(placed.start, segment.length, refreshed, segment.sink_tokens.tobytes(), segment.before.tobytes())


class Facts(msgspec.Struct, frozen=True, array_like=True):
    """Of a conversation, as they are kept beside its blocks."""

    salt: str
    alike: str
    """Settings that its KV hangs on."""
    tokens: bytes
    """int32: those with KV"""
    own: int
    """Of these, those in its own blocks."""
    places: tuple[_Place, ...]
    dense_bytes: int
    """What its blocks and all that it read in place would take."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A member of the store of mirrors."""

    family: str
    member: str
    facts: Facts
    tokens: NDArray[np.int32]

    @property
    def key(self) -> tuple[str, str]:
        return self.family, self.member


@dataclass(frozen=True, slots=True)
class Resumption:
    """A conversation that a request goes on with, and its segments, pinned."""

    conversation: Conversation
    placed: tuple[Placed, ...]
    before: dict[bytes, tuple[StoredSegment, ...]]
    """By key, the segments that those which have to be encoded again are encoded behind."""


class Conversations:
    """Of one engine, in a store of mirrors of their own. Those that requests go on with are pinned in it."""

    def __init__(
        self,
        cache: KVCache,
        segments: SegmentStore,
        executor: SegmentExecutor,
        settings: ReuseSettings,
        mirrors: MirrorStore,
        *,
        folder: Path | None = None,
        kind: str = "",
    ) -> None:
        """`folder`: where they outlive the engine, with those of the same `kind` of KV."""
        self.cache = cache
        self.segments = segments
        self.executor = executor
        self.settings = settings
        self.mirrors = mirrors
        self.resumed_requests = 0
        self.resumed_tokens = 0
        self._disk = None if folder is None else (folder, kind)
        self._alike = repr((settings.mode, settings.share, settings.source, settings.sink_tokens, settings.lego_blocks))
        self._by_content: dict[tuple[str, bytes], Conversation] = {}
        self._lengths: dict[str, Counter[int]] = {}
        """Of each salt's conversations."""
        self._resumed: dict[str, Conversation] = {}
        """Of requests that go on with one, by id."""
        if self._disk is not None:
            self._load(*self._disk)

    # ---- a request begins --------------------------------------------------------------------------------

    def find(self, request: Request, least: int) -> Conversation | None:
        """The longest conversation of more than `least` tokens that a prompt begins with, and goes on behind."""
        salt, prompt = self.cache.salt(request), request.tokens[: request.prompt_length - 1]
        digests = _digests(prompt, [length for length in self._lengths.get(salt, ()) if least < length <= len(prompt)])
        for length, digest in reversed(digests):
            found = self._by_content.get((salt, digest))
            if found is None or found.facts.alike != self._alike or not np.array_equal(found.tokens, prompt[:length]):
                continue
            if found.key in self.mirrors:
                return found
            self._forget(found)
        return None

    def resume(self, request: Request, conversation: Conversation) -> Resumption | None:
        """Pin a conversation and its segments for a request; None, and nothing pinned, when one has no room."""
        facts = conversation.facts
        placed: list[Placed] = []
        for place in facts.places:
            tokens = request.tokens[place.start : place.start + place.length]
            sink, before = (np.frombuffer(each, dtype=np.int32) for each in (place.sink, place.before))
            segment = self.segments.take(tokens, sink, facts.salt, before)
            if segment is None:
                break
            placed.append(Placed(segment, place.start, frozenset(place.refreshed)))
            if not segment.encoded and not segment.blocks:
                self._bring_back(conversation.family, segment)
        segments = [each.segment for each in placed]
        chains = {each.key: chain for each in segments if (chain := _chain(each, segments)) is not None}
        if len(placed) < len(facts.places) or not all(each.is_encoded or each.key in chains for each in segments):
            for segment in segments:
                self.segments.unpin(segment)
            return None
        self.mirrors.pin(*conversation.key)
        self._resumed[request.id] = conversation
        return Resumption(conversation, tuple(placed), chains)

    def own_tokens(self, request: Request) -> int:
        """Leading tokens in its own blocks that a request need not compute."""
        conversation = self._resumed.get(request.id)
        return 0 if conversation is None else conversation.facts.own

    def write_back(self, request: Request) -> bool:
        """Give an admitted request what is kept for it, beyond what it has; False when there is no block for it."""
        conversation, layout, size = self._resumed.get(request.id), request.layout, self.cache.block_size
        if conversation is None or layout is None or not layout.resumed:
            return True
        present = request.num_computed - layout.reused
        first = present // size
        if present >= layout.resumed:
            return True
        blocks = self.mirrors.blocks(*conversation.key, self._own_keys(first, layout.resumed))
        if blocks is None:
            request.set_layout(replace(layout, resumed=0))
            return True
        if not self.cache.grow(request, layout.reused + layout.resumed):
            return False
        self.executor.write(request, first, blocks)
        gained = layout.resumed - present
        if not request.preemptions:
            self.resumed_requests += 1
            self.resumed_tokens += gained
        self.cache.fill(request, gained)
        return True

    # ---- a request ends ----------------------------------------------------------------------------------

    def keep(self, request: Request) -> None:
        """Keep what a request has computed that is about to give its blocks back."""
        layout = request.layout
        if layout is None or request.num_computed < request.prompt_length:
            return
        before = self._resumed.get(request.id)
        self.let_go(request)
        own = request.num_computed - layout.reused
        blocks = self.executor.read(request.blocks[: self.cache.blocks_for(own)])
        salt, tokens = self.cache.salt(request), request.tokens[: request.num_computed].copy()
        family, member = self._name(request, salt)
        inherited, keys, segments = self._segments(family, [each.segment for each in layout.placed])
        viewed = sum(len(view.numbers) for view in layout.views)
        facts = Facts(
            salt, self._alike, tokens.tobytes(), own,
            tuple(_Place.of(each) for each in layout.placed),
            blocks.nbytes + viewed * blocks[0].nbytes,
        )  # fmt: skip
        kept = MemberCache(
            (*keys, *self._own_keys(0, own)),
            np.concatenate([*segments, blocks]),
            msgspec.msgpack.encode(facts),
            inherited,
        )
        self.mirrors.drop(family, member)
        if self.mirrors.add(family, member, kept) is not None:
            self._remember(Conversation(family, member, facts, tokens))
            if before is not None and before.family != family:
                self.mirrors.finish(before.family)
        for lost in [each for each in self._by_content.values() if each.key not in self.mirrors]:
            self._forget(lost)

    def let_go(self, request: Request) -> None:
        """A request needs the conversation no more that it goes on with."""
        conversation = self._resumed.pop(request.id, None)
        if conversation is not None:
            self.mirrors.unpin(*conversation.key)

    # ---- the engine asks ---------------------------------------------------------------------------------

    @property
    def dense_bytes(self) -> int:
        """What all that is kept would take if nothing were shared."""
        return sum(each.facts.dense_bytes for each in self._by_content.values() if each.key in self.mirrors)

    def close(self) -> None:
        if self._disk is not None:
            self.mirrors.save(*self._disk)

    def check(self) -> None:
        """Raise AssertionError unless the books are right."""
        self.mirrors.check()
        lengths = {salt: Counter[int]() for salt in self._lengths}
        for (salt, _), each in self._by_content.items():
            lengths[salt][len(each.tokens)] += 1
        assert lengths == self._lengths
        assert all(each.key in self.mirrors for each in self._resumed.values())

    # ---- small parts -------------------------------------------------------------------------------------

    def _load(self, folder: Path, kind: str) -> None:
        self.mirrors.load(folder, kind)
        for family, member in self.mirrors.members():
            view = self.mirrors.get(family, member, verify=False)
            assert view is not None
            facts = msgspec.msgpack.decode(view.facts, type=Facts)
            self._remember(Conversation(family, member, facts, np.frombuffer(facts.tokens, dtype=np.int32)))

    def _own_keys(self, first: int, own: int) -> list[BlockKey]:
        return [("", number) for number in range(first, self.cache.blocks_for(own))]

    def _name(self, request: Request, salt: str) -> tuple[str, str]:
        """Family and member."""
        if request.round is None:
            return repr((salt, None, request.id)), request.id
        family, agent = repr((salt, request.round.id)), request.round.agent or request.id
        used = any(each.key == (family, agent) for each in self._resumed.values())
        return family, request.id if used else agent

    def _segments(
        self, family: str, segments: Sequence[StoredSegment]
    ) -> tuple[tuple[BlockKey, ...], list[BlockKey], list[NDArray[np.uint8]]]:
        """Blocks that the family's master has, keys of those that nobody in it has, and these."""
        members = [set(self.mirrors.keys(family, member)) for member in self.mirrors.members_of(family)]
        inherited: list[BlockKey] = []
        keys: list[BlockKey] = []
        contents: list[NDArray[np.uint8]] = []
        for segment in dict.fromkeys(segments):
            names = _names(segment)
            if members and members[0].issuperset(names):
                inherited += names
            elif not any(each.issuperset(names) for each in members):
                content = self.executor.read_segment(segment)
                if content is not None:
                    keys += names
                    contents.append(content)
        return tuple(inherited), keys, contents

    def _bring_back(self, family: str, segment: StoredSegment) -> None:
        """Fill a segment that nobody has begun from what is kept of it, if it is."""
        for member in self.mirrors.members_of(family):
            content = self.mirrors.blocks(family, member, _names(segment))
            if content is not None:
                self.executor.write_segment(segment, content)
                segment.encoded = segment.sink + segment.length
                return

    def _remember(self, conversation: Conversation) -> None:
        salt = conversation.facts.salt
        key = salt, _digest(conversation.tokens)
        older = self._by_content.get(key)
        if older is not None:
            self._forget(older)
        self._by_content[key] = conversation
        self._lengths.setdefault(salt, Counter())[len(conversation.tokens)] += 1

    def _forget(self, conversation: Conversation) -> None:
        salt, length = conversation.facts.salt, len(conversation.tokens)
        del self._by_content[salt, _digest(conversation.tokens)]
        self._lengths[salt] -= Counter([length])
        if not self._lengths[salt]:
            del self._lengths[salt]


def _chain(segment: StoredSegment, segments: Sequence[StoredSegment]) -> tuple[StoredSegment, ...] | None:
    """Those of the segments that one was encoded behind, in order; None when they are not all there."""
    if not len(segment.before):
        return ()
    for other in segments:
        if np.array_equal(np.concatenate([other.before, other.all_tokens]), segment.before):
            chain = _chain(other, segments)
            return None if chain is None else (*chain, other)
    return None


def _names(segment: StoredSegment) -> list[BlockKey]:
    return [(segment.key.hex(), number) for number in range(len(segment.canonical))]


def _digest(tokens: NDArray[np.int32]) -> bytes:
    return blake2b(tokens.tobytes(), digest_size=16).digest()


def _digests(tokens: NDArray[np.int32], lengths: Sequence[int]) -> list[tuple[int, bytes]]:
    """Of so many leading tokens each, shorter ones first, in one pass."""
    found, so_far, begin = [], blake2b(digest_size=16), 0
    for length in sorted(lengths):
        so_far.update(tokens[begin:length].tobytes())
        found.append((length, so_far.copy().digest()))
        begin = length
    return found
