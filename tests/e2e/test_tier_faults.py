"""Faults of the tiers under the real model, memory, threads and files: whatever happens, no text changes (fp32)."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvarn.serving.assemble import LoadedEngine, load_engine
from kvarn.serving.assemble_tiers import build_tiers
from kvarn.serving.batch import Batch, SampledToken
from kvarn.serving.clock import VirtualClock
from kvarn.serving.config import EngineConfig
from kvarn.serving.engine import Engine
from kvarn.serving.executors.torch_executor import TorchExecutor
from kvarn.serving.kvcache.cache import KVCache
from kvarn.serving.kvcache.copies import Copier, CopyJob, Direction
from kvarn.serving.policies.registry import make_policy
from kvarn.serving.request import Request
from kvarn.serving.sampling.params import SamplingParams

from .test_tiers import prompts

TOKENS = 24
STEP = 0.2
BLOCKS = 20
"""Of 8 tokens: room for two or three of the six prompts with their texts."""
MIB = 2**20


class Timed:
    """An executor whose steps take STEP seconds of a virtual clock."""

    def __init__(self, executor: TorchExecutor, clock: VirtualClock) -> None:
        self.executor, self.clock = executor, clock
        self.add, self.remove = executor.add, executor.remove

    def execute(self, batch: Batch) -> list[list[SampledToken]]:
        self.clock.advance(STEP)
        return self.executor.execute(batch)


class Held:
    """A copier whose copies end late: when they have been asked for so many times, and with what they say they took."""

    def __init__(self, copier: Copier, asks: int, block_seconds: float) -> None:
        self.copier, self.asks, self.block_seconds = copier, asks, block_seconds
        self.held: list[tuple[int, CopyJob]] = []
        self.asked = 0
        self.start, self.slot = copier.start, copier.slot

    def finished(self) -> list[CopyJob]:
        self.asked += 1
        for job in self.copier.finished():
            job.seconds = self.block_seconds * len(job.blocks)
            self.held.append((self.asked + self.asks, job))
        ended = [job for due, job in self.held if due <= self.asked]
        self.held = [(due, job) for due, job in self.held if due > self.asked]
        return ended

    def wait(self, seconds: float) -> None:
        if not self.held:
            self.copier.wait(seconds)

    def close(self) -> None:
        self.asks = 0
        self.held = [(0, job) for _, job in self.held]
        self.copier.close()


@pytest.fixture(scope="module")
def loaded() -> LoadedEngine:
    """Model, memory and executor for all the engines here, one after the other."""
    return load_engine(
        EngineConfig(precision="float32", max_context=512, block_size=8, kv_memory_bytes=64 * MIB, threads=1)
    )


@contextmanager
def engine_on(
    loaded: LoadedEngine, *, blocks: int = BLOCKS, asks: int = 0, block_seconds: float = 1e-4, **settings: object
) -> Iterator[Engine]:
    """An engine of its own books and tiers, on a clock that only steps move, which checks its books after each."""
    settings = {"host_memory_bytes": 512 * MIB, "block_size": 8, **settings}
    config = EngineConfig(**settings)  # type: ignore[arg-type]
    executor, spec, clock = loaded.engine.executor, loaded.spec, VirtualClock()
    assert isinstance(executor, TorchExecutor)
    cache = KVCache(blocks, config.block_size)
    tiers = build_tiers(config, cache, executor.kv, spec, loaded.folder)
    assert tiers is not None
    tiers.copier = Held(tiers.copier, asks, block_seconds)
    engine = Engine(
        Timed(executor, clock), make_policy(config), cache, clock, tiers=tiers, token_budget=config.token_budget,
        max_running=config.max_running, max_context=512, vocab_size=spec.vocab_size,
    )  # fmt: skip
    engine._check = True
    yield engine
    assert cache.pool.num_active == 0 and not engine.has_work
    engine.close()
    tiers.check([])
    assert tiers.host.num_available == tiers.host.num_slots


def serve_all(engine: Engine, leaves: Callable[[], str | None] = lambda: None) -> list[list[int]]:
    """The texts of all prompts, sent at once. After each step `leaves` says which client is gone, by the request."""
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    requests = [
        Request.create(str(i), prompt, params, arrival=engine.clock.now(), stream_rate=1.5)
        for i, prompt in enumerate(prompts(6, 64))
    ]
    for request in requests:
        engine.add(request)
    for _ in range(4000):
        if not engine.has_work:
            break
        engine.step()
        engine.clock.advance(STEP / 10)
        if (id := leaves()) is not None:
            engine.cancel(id)
    assert not engine.has_work, "something waits for ever"
    while engine.settle():
        engine.tiers.wait(0.1)
    return [request.tokens[request.prompt_length : request.num_tokens].tolist() for request in requests]


@pytest.fixture(scope="module")
def expected(loaded) -> list[list[int]]:
    """What each prompt becomes where there is room for all and nothing is moved."""
    with engine_on(loaded, blocks=120) as engine:
        texts = serve_all(engine)
        assert engine.counters.preemptions == 0
    return texts


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"policy": "streaming"}, id="streaming"),
        pytest.param({"policy": "round-robin", "asks": 3}, id="round-robin"),
        pytest.param({"policy": "qoe-swap", "disk_memory_bytes": 64 * MIB}, id="qoe-swap-disk"),
        pytest.param({"policy": "round-robin", "asks": 8, "block_seconds": 0.05}, id="copies-slower-than-compute"),
        pytest.param(
            {"policy": "round-robin", "host_memory_bytes": 4 * MIB, "disk_memory_bytes": 4 * MIB}, id="every-tier-full"
        ),
    ],
)
def test_texts_are_the_same_whatever_is_moved(loaded, expected, settings, tmp_path):
    """Law: preempted, copied out and in, read from disk or computed again, a text is what it would have been."""
    if "disk_memory_bytes" in settings:
        settings = {**settings, "disk_cache": str(tmp_path)}
    with engine_on(loaded, **settings) as engine:
        assert serve_all(engine) == expected
        assert engine.counters.preemptions > 0
        tiny = settings.get("host_memory_bytes") == 4 * MIB
        assert engine.tiers.counters.written_blocks > 0
        assert engine.counters.loads > 0 or tiny or "block_seconds" in settings
    if "disk_cache" in settings:
        with engine_on(loaded, **settings) as engine:  # after a restart
            assert serve_all(engine) == expected
            assert engine.tiers.disk.read_blocks > 0 and engine.tiers.disk.bad_blocks == 0


def test_clients_that_vanish_while_their_blocks_are_on_the_way_harm_nobody(loaded, expected):
    """One in the middle of an eviction, one in the middle of a load, each with the real thread copying."""
    rng = random.Random(1)
    gone: dict[str, str] = {}
    with engine_on(loaded, policy="round-robin", asks=3) as engine:

        def leaves() -> str | None:
            going_out = any(job.direction is Direction.TO_HOST for job in engine.tiers._flights)
            evicted = [request for request in engine.waiting if request.preemptions and going_out]
            if engine.loading and "loading" not in gone.values():
                id, doing = rng.choice(engine.loading).id, "loading"
            elif evicted and "evicting" not in gone.values():
                id, doing = max(evicted, key=lambda request: request.moved_at).id, "evicting"
            else:
                return None
            gone[id] = doing
            return id

        texts = serve_all(engine, leaves)
    assert sorted(gone.values()) == ["evicting", "loading"]
    for i, text in enumerate(texts):
        assert text == (expected[i][: len(text)] if str(i) in gone else expected[i])
        assert len(text) < TOKENS if str(i) in gone else True


def test_a_disk_cache_cut_short_and_scribbled_on_costs_computing_and_no_token(loaded, expected, tmp_path):
    with engine_on(loaded, policy="round-robin", disk_cache=str(tmp_path)) as engine:
        assert serve_all(engine) == expected
    (blocks,), (index,) = tmp_path.glob("*.blocks"), tmp_path.glob("*.index")
    os.truncate(blocks, blocks.stat().st_size // 2)
    _scribble(blocks, every=MIB)
    _scribble(index, every=6000)
    with engine_on(loaded, policy="round-robin", disk_cache=str(tmp_path)) as engine:
        assert serve_all(engine) == expected
        assert engine.tiers.disk.is_on and engine.tiers.disk.bad_blocks > 0
        read = engine.tiers.disk.read_blocks
    with engine_on(loaded, policy="round-robin", disk_cache=str(tmp_path)) as engine:
        assert serve_all(engine) == expected
        assert engine.tiers.disk.read_blocks > read, "what was bad is written anew"


def _scribble(path: Path, every: int) -> None:
    """Flip a byte in every so many, but not in what says whose file it is."""
    with path.open("r+b") as file:
        for place in range(5000, path.stat().st_size, every):
            file.seek(place)
            byte = file.read(1)
            file.seek(place)
            file.write(bytes([byte[0] ^ 0x55]))
