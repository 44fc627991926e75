"""The third tier behind an engine that notices any wrong block: restarts, damage, a failing disk, clients that go."""

from __future__ import annotations

import os
import random
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn.serving.engine import Engine
from kvarn.serving.executors.disk_thread import DiskThread
from kvarn.serving.kvcache.disk import DiskEntry, DiskIndex, DiskJob, DiskTier, perform
from kvarn.serving.kvcache.disk_file import DiskFile, Header, salt_digest
from kvarn.serving.kvcache.host import HostIndex
from kvarn.serving.kvcache.tiers import KVPlaces

from .paged_text import continuation, make_engine, make_request, run

SALT = salt_digest("")


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def prompt(length: int, family: int) -> list[int]:
    return [(family * 101 + i * 7) % 900 for i in range(length)]


# ---- the books -------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 12), st.integers(0))
def test_books_hold_whatever_is_written_used_and_dropped(records, seed):
    """Law: every record is free or has one block, pinned ones stay, and only what nothing follows is evicted."""
    rng = random.Random(seed)
    index = DiskIndex(records)
    pinned: list[DiskEntry] = []
    for _ in range(200):
        number = rng.randrange(20)
        parent = key((number - 1) // 2) if number else b""  # a tree
        entry = index.find(key(number), parent, b"", SALT)
        if entry is None:
            before = {each for each in map(key, range(20)) if each in index}
            entry = index.reserve(key(number), parent, b"", SALT)
            if entry is not None:
                gone = {each for each in before if each not in index}
                assert not any(key((n - 1) // 2) in gone for n in range(1, 20) if key(n) in index and key(n) in before)
                pinned.append(entry)
        elif entry.clean:
            index.use(entry)
            index.pin(entry)
            pinned.append(entry)
        index.check()
        while pinned and rng.random() < 0.6:
            entry = pinned.pop(rng.randrange(len(pinned)))
            if not entry.clean and rng.random() < 0.2:
                index.drop(entry)
            elif not entry.clean:
                index.written(entry, entry.header)
            else:
                index.unpin(entry)
            index.check()
        assert all(entry.header.hash in index for entry in pinned)


def keep(folder, text, outputs):
    """A life in which one request is served, and what it computed is kept on the disk."""
    engine = engine_on(folder)
    engine.add(make_request("a", text, outputs))
    run(engine)
    engine.close()


def test_a_restart_keeps_the_order_of_use_and_the_newer_of_two_copies():
    def stored(record: int, number: int, sequence: int, parent: bytes = b"") -> tuple[int, Header]:
        return record, Header(key(number), parent, b"", SALT, sequence)

    index = DiskIndex(5, [stored(0, 1, 5), stored(1, 2, 3), stored(2, 1, 9), stored(3, 3, 4, key(2)), stored(4, 4, 7)])
    index.check()
    entry = index.find(key(1), b"", b"", SALT)
    assert entry is not None and entry.record == 2 and index.num_entries == 4
    for number in (10, 11, 12):
        assert index.reserve(key(number), b"", b"", SALT) is not None
        index.check()
    assert [number for number in (1, 2, 3, 4) if key(number) in index] == [1, 4], "3 was the oldest leaf, then 2"
    assert index.reserve(key(5), key(1), b"", SALT) is not None
    assert key(1) in index, "what a block follows does not make room for it"


# ---- behind an engine ------------------------------------------------------------------------------------


def finish_copies(engine: Engine) -> None:
    while engine.settle():
        engine.tiers.copier.close()
        engine.tiers.disk.io.complete()


def engine_on(folder: Path, **settings: int) -> Engine:
    engine = make_engine(
        **{"num_blocks": 24, "host_slots": 32, "token_budget": 64, "disk_records": 64, **settings},  # type: ignore[arg-type]
        folder=folder,
    )
    engine.tiers.copier.job_seconds = 1e-6
    return engine


def test_after_a_restart_prompts_are_read_and_not_computed(tmp_path):
    first = engine_on(tmp_path, host_slots=64)
    for i in range(3):
        first.add(make_request(f"r{i}", prompt(41, i), 8))
    run(first)
    finish_copies(first)
    first.close()
    second = engine_on(tmp_path)
    assert second.tiers.disk.index.num_entries == first.tiers.disk.index.num_entries == 3 * (48 // 4)
    for i in range(3):
        request = make_request(f"r{i}", prompt(41, i), 8)
        second.add(request)
        assert run(second)[f"r{i}"] == continuation(prompt(41, i), 8)
        assert request.cached_tokens == 40
    assert second.executor.computed_tokens == 3 * (1 + 7)
    assert second.counters.prompt_tokens == 3 and second.counters.loads == 3
    second.close()


def test_where_a_request_lies_is_told_for_each_tier(tmp_path):
    first = engine_on(tmp_path)
    request = make_request("a", prompt(41, 0), 8)
    first.add(request)
    assert first.tiers.places(request) == KVPlaces(device=0, host=0, disk=0)
    while request.num_outputs < 3:
        first.step()
    finish_copies(first)
    assert first.tiers.places(request) == KVPlaces(device=11, host=10, disk=10), "one block is partly filled"
    first.close()
    second = engine_on(tmp_path)
    again = make_request("a", prompt(41, 0), 8)
    second.add(again)
    assert second.tiers.places(again) == KVPlaces(device=0, host=0, disk=10)
    run(second)
    finish_copies(second)
    assert second.tiers.places(again) == KVPlaces(device=12, host=12, disk=12), "nobody has it, all can find it"
    second.close()


def test_closing_writes_what_the_host_has(tmp_path):
    keep(tmp_path, prompt(40, 0), 8)
    again = engine_on(tmp_path)
    assert again.tiers.disk.index.num_entries == 47 // 4
    again.close()


def test_tenants_do_not_share_what_is_on_disk(tmp_path):
    engine = engine_on(tmp_path)
    engine.add(make_request("a", prompt(41, 0), 8, tenant="one"))
    run(engine)
    engine.close()
    for tenant, loads in (("two", 0), ("", 0), ("one", 1)):
        again = engine_on(tmp_path)
        again.add(make_request("a", prompt(41, 0), 8, tenant=tenant))
        assert run(again)["a"] == continuation(prompt(41, 0), 8)
        assert again.counters.loads == loads
        again.tiers.disk.is_on = False  # what this one computed is not to be written
        again.close()


@settings(max_examples=80, deadline=None)
@given(
    st.integers(2, 20),
    st.integers(4, 60),
    st.sampled_from([0.0, 0.2]),
    st.sampled_from([0.0, 0.1]),
    st.booleans(),
    st.integers(0),
)
def test_restarts_on_a_damaged_disk_change_no_text(slots, records, spoiling, failing, cancelling, seed):
    """Law: whatever a disk lost, spoils or refuses, in however many lives, texts are right and the engine goes on."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        for _ in range(3):
            engine = engine_on(Path(name), num_blocks=16, host_slots=slots, disk_records=records)
            disk = engine.tiers.disk.io
            disk.spoils, disk.fails = lambda: rng.random() < spoiling, lambda: rng.random() < failing
            for turn in range(6):
                text = prompt(rng.randint(5, 48), rng.randrange(2))
                engine.add(make_request(f"r{turn}", text, 8))
                tokens: list[int] = []
                leave_after = rng.randint(0, 12) if cancelling else -1
                for step in range(300):
                    if not engine.has_work:
                        break
                    if step == leave_after:
                        engine.cancel(f"r{turn}")
                    engine.clock.advance(1.0)
                    tokens += [emission.token for emission in engine.step() if emission.token is not None]
                    while rng.random() < 0.7:
                        engine.tiers.copier.complete()
                        disk.complete()
                assert not engine.has_work
                assert tokens == continuation(text, 8)[: len(tokens)]
                assert cancelling or len(tokens) == 8
                if rng.random() < 0.7:
                    finish_copies(engine)
            engine.tiers.check([])
            disk.close()  # as when it is killed: nothing more is written


def test_with_too_small_a_host_as_much_is_read_as_fits(tmp_path):
    keep(tmp_path, prompt(61, 0), 2)
    second = engine_on(tmp_path, host_slots=4)
    second.add(make_request("a", prompt(61, 0), 2))
    assert run(second)["a"] == continuation(prompt(61, 0), 2)
    assert second.tiers.disk.read_blocks == 4 and second.counters.loads == 1
    assert second.executor.computed_tokens == 61 - 16 + 1
    second.close()


def test_a_spoiled_block_ends_what_is_read_and_the_rest_is_computed(tmp_path):
    keep(tmp_path, prompt(41, 0), 2)
    second = engine_on(tmp_path)
    file = second.tiers.disk.io.file
    record, _ = sorted(file.scan(), key=lambda pair: pair[1].sequence)[2]
    os.pwrite(file._blocks, b"rubbish", record * file._stride)
    second.add(make_request("a", prompt(41, 0), 2))
    assert run(second)["a"] == continuation(prompt(41, 0), 2)
    assert second.tiers.disk.bad_blocks == 1 and second.executor.computed_tokens == 41 - 8 + 1
    finish_copies(second)
    assert second.tiers.disk.index.num_entries == 10, "it is written anew"
    second.close()


@pytest.mark.parametrize("spoiled", [False, True])
def test_who_needs_what_is_being_read_waits_for_the_same_read(tmp_path, spoiled):
    prompts = {"a": prompt(41, 0), "b": prompt(41, 0)[:16] + prompt(25, 1)}
    first = engine_on(tmp_path)
    for id, tokens in prompts.items():
        first.add(make_request(id, tokens, 2))
    run(first)
    first.close()
    second = engine_on(tmp_path)
    disk = second.tiers.disk.io
    disk.wait = lambda seconds: None
    for id, tokens in prompts.items():
        second.add(make_request(id, tokens, 2))
        second.step()
    assert [request.id for request in second.loading] == ["a", "b"] and second.executor.computed_tokens == 0
    if spoiled:
        damaged = disk.queue[0].entries[2]
        os.pwrite(disk.file._blocks, b"rubbish", damaged.record * disk.file._stride)
    del disk.wait
    assert run(second) == {id: continuation(tokens, 2) for id, tokens in prompts.items()}
    assert second.tiers.disk.bad_blocks == spoiled
    if not spoiled:
        assert second.tiers.disk.read_blocks == 16, "the beginning was read once"
        assert second.executor.computed_tokens == 2 * (1 + 1)
    finish_copies(second)
    second.tiers.check([])
    second.close()


def test_a_client_that_goes_while_its_blocks_are_read_leaves_nothing_behind(tmp_path):
    keep(tmp_path, prompt(41, 0), 2)
    second = engine_on(tmp_path)
    second.tiers.disk.io.wait = lambda seconds: None
    second.add(make_request("a", prompt(41, 0), 2))
    second.step()
    assert second.loading and second.tiers.host.num_available == 22
    second.cancel("a")
    second.step()
    assert second.cache.pool.num_active == 0
    finish_copies(second)
    second.tiers.check([])
    assert second.tiers.host.num_available == 32 and second.tiers.host.num_entries == 10, "the host keeps what came"
    second.close()


# ---- a real thread on a real file ------------------------------------------------------------------------


class Bench:
    """A disk tier over a DiskThread, with host slots of its own."""

    SLOTS, BYTES = 32, 4096

    def __init__(self, folder: Path, records: int = 64) -> None:
        limit = 4096 + records * (self.BYTES + 256)
        file = DiskFile(folder, "bench", content_bytes=self.BYTES, tokens_bytes=64, limit_bytes=limit)
        self.memory = [memoryview(bytearray(self.BYTES)) for _ in range(self.SLOTS)]
        self.host = HostIndex(self.SLOTS)
        self.io = DiskThread(file)
        self.tier = DiskTier(DiskIndex(file.num_records, file.scan()), self.io, self.memory.__getitem__, self.BYTES)

    def write(self, numbers: range) -> None:
        """Blocks of a chain come to the host, and are offered to the disk."""
        for number in numbers:
            entry = self.host.reserve(key(number), key(number - 1) if number else b"", bytes(64), "")
            assert entry is not None
            self.memory[entry.slot][:] = bytes([number]) * self.BYTES
            self.host.written(entry)
            self.tier.offer(entry)
        self.collect_all()

    def collect_all(self) -> list[DiskJob]:
        reads = self.tier.collect(self.host)
        while self.tier.writing:
            self.io.wait(10)
            reads += self.tier.collect(self.host)
        return reads

    def find(self, number: int) -> DiskEntry | None:
        return self.tier.find(key(number), key(number - 1) if number else b"", bytes(64), "")

    def read(self, numbers: range) -> DiskJob:
        entries = [entry for entry in map(self.find, numbers) if entry is not None]
        job = self.tier.start_read(entries, list(range(len(entries))))
        while not (ended := self.tier.collect(self.host)):
            self.io.wait(10)
        assert ended == [job]
        return job


def test_blocks_come_back_in_another_life(tmp_path):
    bench = Bench(tmp_path)
    bench.write(range(20))
    bench.io.close()
    again = Bench(tmp_path)
    assert len(again.read(range(20)).headers) == 20
    assert all(bytes(again.memory[i]) == bytes([i]) * Bench.BYTES for i in range(20))
    assert again.tier.block_seconds > 0 and again.tier.read_blocks == 20
    again.io.close()


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system refuses files above this size, as it does when a disk is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_switches_the_tier_off_once_and_keeps_what_it_has(tmp_path, caplog):
    bench = Bench(tmp_path)
    with largest_file(10 * Bench.BYTES):
        bench.write(range(20))
    assert not bench.tier.is_on and bench.find(0) is None
    assert [record.message for record in caplog.records] == [caplog.records[0].message]
    assert "switched off" in caplog.text
    bench.write(range(20, 25))
    assert bench.host.num_available == Bench.SLOTS, "nothing is pinned for ever"
    bench.host.check()
    bench.tier.index.check()
    bench.io.close()
    again = Bench(tmp_path)
    assert again.tier.index.num_entries == 10 and len(again.read(range(10)).headers) == 10
    again.io.close()


def test_a_disk_that_cannot_be_read_any_more_switches_the_tier_off(tmp_path):
    bench = Bench(tmp_path)
    bench.write(range(4))
    bench.io._file.close()  # every call to the system fails from here on
    job = bench.read(range(4))
    assert job.error is not None and job.headers == [] and not bench.tier.is_on
    bench.tier.index.check()


def test_perform_erases_what_is_not_what_its_header_says(tmp_path):
    file = DiskFile(tmp_path, "x", content_bytes=64, tokens_bytes=64, limit_bytes=100_000)
    header = file.write(3, Header(key(1), b"", bytes(64), SALT, 1), bytes(64))
    other = Header(key(1), b"", bytes(64), SALT, 1, bytes(16))
    job = DiskJob(False, [DiskEntry(3, other)], [memoryview(bytearray(64))])
    perform(file, job)
    assert job.headers == [] and job.error is None and list(file.scan()) == []
    job = DiskJob(True, [DiskEntry(3, header)], [memoryview(bytes(64))])
    perform(file, job)
    assert job.headers == [header] and list(file.scan()) == [(3, header)]
    file.close()


@pytest.mark.parametrize("folder", ["/proc/kvarn", "/dev/null/kvarn"])
def test_a_folder_that_cannot_be_written_is_an_error_of_the_system(folder):
    with pytest.raises(OSError, match="kvarn"):
        DiskFile(Path(folder), "x", content_bytes=64, tokens_bytes=64, limit_bytes=100_000)
