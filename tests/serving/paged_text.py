"""An executor without a model: it keeps token ids where a model would keep KV, and reads them back through blocks.

The next token is a hash of the whole context as read from the block table, so one misplaced, shared or
overwritten block changes the text; `continuation` says what the text must be. A row that sees a token twice, or
misses one, fails.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kvarn.serving.agent_calls import AgentCalls
from kvarn.serving.batch import Batch, SampledToken, ScheduledRequest
from kvarn.serving.clock import VirtualClock
from kvarn.serving.conversations import Conversations
from kvarn.serving.engine import Engine
from kvarn.serving.kvcache.cache import KVCache
from kvarn.serving.kvcache.copies import CopyJob, Direction
from kvarn.serving.kvcache.disk import DiskIndex, DiskJob, DiskTier, perform
from kvarn.serving.kvcache.disk_file import DiskFile
from kvarn.serving.kvcache.mirrors import MirrorStore
from kvarn.serving.kvcache.segments import Hash, SegmentStore
from kvarn.serving.kvcache.tiers import Tiers
from kvarn.serving.policies.fcfs import FirstComeFirstServed
from kvarn.serving.policies.protocol import Policy
from kvarn.serving.request import Request
from kvarn.serving.round_calls import RoundCalls
from kvarn.serving.rounds.settings import ReuseSettings
from kvarn.serving.sampling.params import SamplingParams
from kvarn.serving.speculation import Speculator

from .paged_segments import PagedTextSegments
from .text_memory import TextMemory

VOCAB = 1000
EOS = 999


def next_token(context: list[int]) -> int:
    return zlib.crc32(np.array(context, dtype=np.int32).tobytes()) % (VOCAB - 1)


def continuation(prompt: list[int], count: int, next_token: Callable[[list[int]], int] = next_token) -> list[int]:
    """What any correct engine generates from `prompt`."""
    context = list(prompt)
    for _ in range(count):
        context.append(next_token(context))
    return context[len(prompt) :]


class PagedTextExecutor:
    def __init__(self, num_blocks: int, block_size: int, step_seconds: Callable[[], None] = lambda: None) -> None:
        """`step_seconds` is called in every step, to let time pass."""
        self.step_seconds = step_seconds
        self.pages = TextMemory(num_blocks, block_size)
        self.memory = self.pages.tokens
        self.block_size = block_size
        self.alive: set[str] = set()
        self.computed_tokens = 0
        self.fail_next = False
        self.forward_seconds = 0.0
        self.next_token = next_token

    @property
    def num_blocks(self) -> int:
        return len(self.memory)

    def add(self, request: Request) -> None:
        self.alive.add(request.id)

    def remove(self, request: Request) -> None:
        self.alive.remove(request.id)

    def execute(self, batch: Batch) -> list[list[SampledToken]]:
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("boom")
        self.step_seconds()
        positions = [self._write(row) for row in batch.rows]
        self.computed_tokens += batch.num_tokens
        texts = [self._compute(row, each) for row, each in zip(batch.rows, positions, strict=True)]
        return [self._sample(row, text) for row, text in zip(batch.rows, texts, strict=True) if row.samples]

    def _write(self, row: ScheduledRequest) -> np.ndarray:
        """Positions of a row's tokens, which are in their slots now."""
        request, layout = row.request, row.request.layout
        start, end = request.num_computed, request.num_computed + row.count
        positions = np.arange(start, end) if layout is None else layout.positions(start, end)
        places = positions if layout is None else layout.own_slots(positions)
        self.pages.write(self.pages.slots(request.blocks, places), request.tokens[positions], positions)
        return positions

    def _compute(self, row: ScheduledRequest, rows: np.ndarray) -> list[int]:
        """The context of a row's last token, as its blocks and views have it: each token once, in its place."""
        request, layout, end = row.request, row.request.layout, row.request.num_computed + row.count
        slots, positions = self.pages.look(request, end if layout is None else layout.slots_in_use(end))
        seen = np.flatnonzero((positions >= 0) & (positions <= rows[-1]))
        seen = seen[np.argsort(positions[seen], kind="stable")]
        assert np.array_equal(positions[seen], np.arange(rows[-1] + 1)), f"{request.id} sees {positions[seen]}"
        self.pages.compute(slots[seen], rows)
        text: list[int] = self.memory.reshape(-1)[slots[seen]].tolist()
        return text

    def _sample(self, row: ScheduledRequest, text: list[int]) -> list[SampledToken]:
        """The token after each draft that came true, each from the context that the blocks hold."""
        known = row.request.num_tokens
        tokens = [self.next_token(text[:known])]
        for drafted in text[known:]:
            if drafted != tokens[-1]:
                break
            known += 1
            tokens.append(self.next_token(text[:known]))
        return [SampledToken(token) for token in tokens]


class TextCopier:
    """Copies between an executor's memory and slots of its own, when told to: `complete` ends the oldest job."""

    def __init__(self, executor: PagedTextExecutor, num_slots: int) -> None:
        self.executor = executor
        self.slots = np.full((num_slots, 2, executor.block_size), -2, dtype=np.int32)
        self.queue: list[CopyJob] = []
        self.ended: list[CopyJob] = []
        self.job_seconds = 0.5

    def start(self, job: CopyJob) -> None:
        self.queue.append(job)

    def finished(self) -> list[CopyJob]:
        ended, self.ended = self.ended, []
        return ended

    def wait(self, seconds: float) -> None:
        if self.queue:
            self.complete()

    def slot(self, index: int) -> memoryview:
        return self.slots[index].view(np.uint8).data

    def close(self) -> None:
        while self.queue:
            self.complete()

    def complete(self, direction: Direction | None = None, *, fail: bool = False) -> None:
        """End the oldest job (of one direction). One that fails leaves rubbish in half of what it was to fill."""
        for job in self.queue:
            if direction in (None, job.direction):
                break
        else:
            return
        self.queue.remove(job)
        triples = list(zip(job.blocks, job.slots, job.starts, strict=True))
        pages = self.executor.pages
        for block, slot, start in triples[: len(triples) // 2] if fail else triples:
            if job.direction is Direction.TO_HOST:
                self.slots[slot] = pages.tokens[block], pages.values[block].view(np.int32)
            else:
                pages.tokens[block], pages.values[block] = self.slots[slot, 0], self.slots[slot, 1].view(np.uint32)
                pages.positions[block] = np.arange(start, start + pages.block_size)
        job.seconds, job.error = self.job_seconds, "made to fail" if fail else None
        self.ended.append(job)


class StepwiseDisk:
    """Works on a real file, when told to: `complete` ends the oldest job, reads first.

    When `spoils()`, a record of the job is damaged before; when `fails()`, the system refuses.
    """

    def __init__(self, file: DiskFile) -> None:
        self.file = file
        self.queue: list[DiskJob] = []
        self.ended: list[DiskJob] = []
        self.closed = False
        self.spoils = self.fails = lambda: False

    def start(self, job: DiskJob) -> None:
        self.queue.append(job)

    def finished(self) -> list[DiskJob]:
        ended, self.ended = self.ended, []
        return ended

    def wait(self, seconds: float) -> None:
        self.complete()

    def complete(self) -> None:
        if not self.queue:
            return
        job = min(self.queue, key=lambda job: job.writes)
        self.queue.remove(job)
        if self.spoils():
            entry = job.entries[len(job.entries) // 2]
            os.pwrite(self.file._blocks, b"rubbish", entry.record * self.file._stride)
        if self.fails():
            job.error = "made to fail"
        else:
            perform(self.file, job)
        self.ended.append(job)

    def close(self) -> None:
        if not self.closed:
            self.file.close()
        self.closed = True


BLOCK_SIZE = 4
TOKENS_BYTES = BLOCK_SIZE * 4
BLOCK_BYTES = 2 * TOKENS_BYTES


def make_tiers(
    executor: PagedTextExecutor, cache: KVCache, host_slots: int, folder: Path | None, disk_records: int
) -> Tiers:
    """Tiers under a TextCopier, and with a `folder` under a StepwiseDisk."""
    copier, disk = TextCopier(executor, host_slots), None
    if folder is not None:
        limit = 4096 + disk_records * (4096 + 128)
        file = DiskFile(folder, "text", content_bytes=BLOCK_BYTES, tokens_bytes=TOKENS_BYTES, limit_bytes=limit)
        assert file.num_records == disk_records
        disk = DiskTier(DiskIndex(disk_records, file.scan()), StepwiseDisk(file), copier.slot, BLOCK_BYTES)
    return Tiers(cache, host_slots, copier, block_bytes=BLOCK_BYTES, disk=disk)


def make_engine(
    *,
    num_blocks: int = 64,
    block_size: int = BLOCK_SIZE,
    token_budget: int = 16,
    max_running: int = 8,
    share: bool = True,
    policy: Policy | None = None,
    host_slots: int = 0,
    step: float | None = None,
    folder: Path | None = None,
    disk_records: int = 0,
    agents: bool = False,
    speculator: Speculator | None = None,
    reuse: ReuseSettings | None = None,
    segment_blocks: int = 64,
    segment_hash: Hash | None = None,
    mirror_bytes: int = 0,
) -> Engine:
    """With `host_slots`, an engine with a second tier; with a `folder`, a third of `disk_records` there.

    `step`: seconds that steps take; `agents`: tool calls are heard of; `reuse`: of shared segments;
    `mirror_bytes`: for what requests with these leave.
    """
    clock = VirtualClock()
    seconds = step if step is not None else 0.25 if host_slots else 0.0
    executor = PagedTextExecutor(num_blocks, block_size, lambda: clock.advance(seconds))
    cache = KVCache(num_blocks, block_size, share_prefixes=share)
    tiers = make_tiers(executor, cache, host_slots, folder, disk_records) if host_slots else None
    rounds = None
    if reuse is not None:
        options = {} if segment_hash is None else {"hash": segment_hash}
        store = cache.segments = SegmentStore(cache, segment_blocks, **options)
        segments = PagedTextSegments(executor.pages, segment_blocks)
        keeps = mirror_bytes > 0 and not reuse.is_dense
        kept = Conversations(cache, store, segments, reuse, MirrorStore(mirror_bytes)) if keeps else None
        rounds = RoundCalls(cache, store, segments, reuse, kept)
    engine = Engine(
        executor,
        policy or FirstComeFirstServed(),
        cache,
        clock,
        token_budget=token_budget,
        max_running=max_running,
        max_context=10_000,
        vocab_size=VOCAB,
        tiers=tiers,
        agents=AgentCalls(cache, tiers) if agents else None,
        speculator=speculator,
        rounds=rounds,
    )
    engine._check = True
    return engine


def make_request(id: str, prompt: list[int], max_tokens: int, **settings: object) -> Request:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return Request.create(id, prompt, params, **{"arrival": 0.0, **settings})  # type: ignore[arg-type]


def run(engine: Engine, max_steps: int = 10_000) -> dict[str, list[int]]:
    """Step until there is no work; the tokens of each request."""
    texts: dict[str, list[int]] = {}
    for _ in range(max_steps):
        if not engine.has_work:
            return texts
        engine.clock.advance(1.0)  # type: ignore[attr-defined]
        for emission in engine.step():
            if emission.token is not None:
                texts.setdefault(emission.request.id, []).append(emission.token)
    raise AssertionError(
        f"not done after {max_steps} steps: {len(engine.waiting)} waiting, {len(engine.running)} running"
    )
