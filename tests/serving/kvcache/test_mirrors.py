"""Families of mirrors: whatever happens to them, what comes out has the bytes that went in, or nothing comes out."""

from __future__ import annotations

import logging
import resource
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvarn.serving.kvcache.mirror_family import (
    MemberCache,
    dense_of,
    family_of,
    predicted_ratio,
    ratio_of,
    touched_share,
)
from kvarn.serving.kvcache.mirrors import MirrorStore, MirrorView

LAYERS, BLOCK = 3, (3, 2, 1, 4, 8)
PLENTY = 10**9


def cache(seed: int, keys: list[tuple[str, int]], changed: float = 0.0, own: int = 0) -> MemberCache:
    """A block of any bits for each key, alike in all caches but for a share of layers; `own` blocks nobody else has."""
    rng = np.random.default_rng(seed)
    blocks = [
        np.random.default_rng(zlib.crc32(repr(key).encode())).integers(0, 2**16, BLOCK, dtype=np.uint16) for key in keys
    ]
    for block in blocks:
        for layer in range(LAYERS):
            if rng.random() < changed:
                block[layer, rng.integers(2), 0, rng.integers(4), rng.integers(8)] ^= 1 << int(rng.integers(16))
    order = rng.permutation(len(keys))
    private = [rng.integers(0, 2**16, BLOCK, dtype=np.uint16) for _ in range(own)]
    return MemberCache(
        (*((f"own {seed}", i) for i in range(own)), *(keys[i] for i in order)),
        np.stack([*private, *(blocks[i] for i in order)]),
        f"facts of {seed}".encode(),
    )


def keys(count: int) -> list[tuple[str, int]]:
    return [(f"segment {i % 2}", i // 2) for i in range(count)]


def round_of(size: int, *, blocks: int = 6, changed: float = 0.1, own: int = 1) -> dict[str, MemberCache]:
    return {f"agent {i}": cache(i, keys(blocks), changed, own) for i in range(size)}


def same(one: MemberCache | None, other: MemberCache) -> bool:
    return (
        one is not None
        and (one.keys, one.facts) == (other.keys, other.facts)
        and one.blocks.dtype == other.blocks.dtype
        and one.blocks.shape == other.blocks.shape
        and one.blocks.tobytes() == other.blocks.tobytes()
    )


def assert_holds(store: MirrorStore, family: str, members: dict[str, MemberCache]) -> None:
    store.check()
    for name, put in members.items():
        assert same(store.materialise(family, name), put), name


def by_view(view: MirrorView) -> np.ndarray:
    """What `restore_blocks` would put together, layer by layer."""
    layers = [
        np.stack([view.master[i, layer] if i >= 0 else view.patches[~i] for i in sources])
        for layer, sources in enumerate(view.sources)
    ]
    return np.stack(layers, axis=1)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6), st.integers(1, 6), st.sampled_from([0.0, 0.05, 0.5, 1.0]), st.integers(0, 2),
)  # fmt: skip
def test_what_is_stored_comes_back_byte_for_byte(size: int, blocks: int, changed: float, own: int) -> None:
    """Law E5: of any bits, in any order of blocks, with any share of them changed."""
    members = round_of(size, blocks=blocks, changed=changed, own=own)
    store = MirrorStore(PLENTY)
    report = store.store("round", members)
    assert report is not None and set(report.stored_bytes) == set(members)
    assert sum(report.stored_bytes.values()) == store.used_bytes
    assert_holds(store, "round", members)
    for name, put in members.items():
        view = store.get("round", name)
        assert view is not None and view.keys == put.keys
        assert by_view(view).tobytes() == put.blocks.tobytes()


def test_bytes_count_and_values_do_not() -> None:
    """NaNs with other payloads, zeros of another sign, denormals: equal or not as numbers, they are kept apart."""
    plain = np.zeros((1, *BLOCK), dtype=np.float32)
    minus, nans = -plain, plain.copy()
    nans.view(np.uint32)[:] = 0x7FC00001
    others = nans.copy()
    others.view(np.uint32)[0, 1, 0, 0, 0, 0] = 0xFFC12345
    tiny = plain.copy()
    tiny.view(np.uint32)[..., 0] = 1
    members = {str(i): MemberCache((("s", 0),), x) for i, x in enumerate((plain, minus, nans, others, tiny))}
    store = MirrorStore(PLENTY)
    store.store("round", members)
    assert_holds(store, "round", members)
    family = family_of({name: dense_of(put) for name, put in members.items() if name in "23"})
    assert [len(mirror.patches) for mirror in family.mirrors.values()] == [1]


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(5)), st.sampled_from([0.0, 0.1, 0.6]))
def test_the_order_of_members_changes_nothing(order: list[int], changed: float) -> None:
    """Law E12."""
    members = round_of(5, changed=changed)
    shuffled = {f"agent {i}": members[f"agent {i}"] for i in order}
    stores = [MirrorStore(PLENTY), MirrorStore(PLENTY)]
    reports = [store.store("round", put) for store, put in zip(stores, (members, shuffled), strict=True)]
    assert reports[0] == reports[1]


def test_the_master_is_the_member_the_others_differ_from_least() -> None:
    near = {name: cache(0, keys(6)) for name in "cde"}
    far = cache(1, keys(6), changed=1.0)
    report = MirrorStore(PLENTY).store("round", {"a": far, **near})
    assert report is not None and report.master == "c"
    assert report.ratios["d"] > 20 > 2 > report.ratios["a"]


def test_of_two_blocks_of_one_key_each_is_kept() -> None:
    twice = cache(3, [("s", 0), ("s", 1)])
    members = {"a": MemberCache((("s", 0), ("s", 0)), twice.blocks), "b": MemberCache((("s", 0),), twice.blocks[1:])}
    store = MirrorStore(PLENTY)
    store.store("round", members)
    assert_holds(store, "round", members)


def test_ratios_are_those_predicted() -> None:
    """X2: a mirror stores its private blocks, and what was refreshed of the others; indices and checksums besides."""
    shared, refreshed, private = 90, 5, 5
    rng = np.random.default_rng(0)
    common = rng.integers(0, 2**16, (shared, 4, 2, 2, 16, 64), dtype=np.uint16)
    members = {}
    for name in "ab":
        blocks = np.concatenate([common, rng.integers(0, 2**16, (private, *common.shape[1:]), dtype=np.uint16)])
        names = (*(("s", i) for i in range(shared)), *((name, i) for i in range(private)))
        members[name] = dense_of(MemberCache(names, blocks))
        common[:refreshed] ^= 1
    family = family_of(members)
    h, r = private / (shared + private), refreshed / shared
    assert ratio_of(family, "b") == pytest.approx(predicted_ratio(h, r), rel=0.01)
    assert predicted_ratio(0.05, 0.05) == pytest.approx(10.26, abs=0.01)
    assert [round(touched_share(r, 32), 3) for r in (0.005, 0.05, 0.15)] == [0.148, 0.806, 0.994]


def test_a_master_that_goes_leaves_its_place_to_the_nearest_mirror() -> None:
    members = round_of(4)
    store = MirrorStore(PLENTY)
    report = store.store("round", members)
    assert report is not None
    view = store.get("round", report.master)
    held = members.pop(report.master)
    store.drop("round", report.master)
    assert store.get("round", report.master) is None
    assert_holds(store, "round", members)
    assert view is not None and by_view(view).tobytes() == held.blocks.tobytes()
    for name in list(members):
        members.pop(name)
        store.drop("round", name)
        assert_holds(store, "round", members)
    assert store.used_bytes == 0 and not list(store.members())


def test_stragglers_join_and_who_comes_twice_is_replaced() -> None:
    members = round_of(3)
    store = MirrorStore(PLENTY)
    for name, put in members.items():
        assert store.add("round", name, put) is not None
    assert_holds(store, "round", members)
    for name in members:
        members[name] = cache(7, keys(4), changed=0.3)
        store.add("round", name, members[name])
        assert_holds(store, "round", members)


def test_what_does_not_fit_is_refused() -> None:
    store = MirrorStore(PLENTY)
    store.store("round", round_of(2))
    other = np.zeros((1, 2, *BLOCK[1:]), dtype=np.uint16)
    with pytest.raises(ValueError, match="in a family of"):
        store.add("round", "late", MemberCache((("s", 0),), other))
    with pytest.raises(ValueError, match="2 keys, blocks"):
        store.add("round", "late", MemberCache((("s", 0), ("s", 1)), other))
    with pytest.raises(ValueError, match="stored already"):
        store.store("round", round_of(2))
    store.pin("round", "agent 0")
    with pytest.raises(ValueError, match="pinned"):
        store.drop("round", "agent 0")
    store.unpin("round", "agent 0")
    with pytest.raises(ValueError, match="not pinned"):
        store.unpin("round", "agent 0")
    assert_holds(store, "round", round_of(2))


def test_finished_mirrors_go_first_then_their_masters_and_pinned_ones_never() -> None:
    store = MirrorStore(PLENTY)
    masters = {}
    for family in ("old", "older", "now"):
        report = store.store(family, round_of(3, changed=0.3))
        assert report is not None
        masters[family] = report.master
    store.finish("old")
    store.finish("older")
    mirror = next(name for name in round_of(3) if name != masters["old"])
    store.pin("old", mirror)
    store.get("old", masters["old"])
    gone = []
    while store.evict(1):
        store.check()
        gone.append({family for family, _ in store.members()})
    assert list(store.members()) == [("old", mirror)]
    assert all("now" in left for left in gone[:4])
    assert same(store.materialise("old", mirror), round_of(3, changed=0.3)[mirror])


def test_the_limit_holds_and_what_cannot_fit_is_not_kept() -> None:
    one = MirrorStore(PLENTY)
    one.store("round", round_of(3))
    store = MirrorStore(2 * one.used_bytes + 100)
    for i in range(5):
        assert store.store(f"round {i}", round_of(3)) is not None
        store.check()
    assert {family for family, _ in store.members()} >= {"round 4"}
    held = set(store.members())
    for member in held:
        store.pin(*member)
    assert store.store("more", round_of(3)) is None
    assert MirrorStore(100).store("round", round_of(3)) is None
    store.check()
    assert set(store.members()) == held


def damage(array: np.ndarray, at: int) -> None:
    array.flags.writeable = True
    flat = array.reshape(-1).view(np.uint8)
    flat[at % len(flat)] ^= 1


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**20), st.booleans())
def test_damaged_bytes_in_memory_are_a_miss_and_no_wrong_data(at: int, in_master: bool) -> None:
    """Law: who is made of a flipped bit is not there; others come back as they were, perhaps with a new master."""
    members = round_of(4, changed=0.2)
    store = MirrorStore(PLENTY)
    report = store.store("round", members)
    assert report is not None
    name = next(name for name in members if name != report.master)
    view = store.get("round", name)
    assert view is not None
    damage(view.master if in_master else view.patches, at)
    missed = 0
    for other in sorted(members, key=lambda other: other != report.master):
        got = store.materialise("round", other)
        assert got is None or same(got, members[other])
        missed += got is None
    assert missed == 1 if not in_master else missed >= 1
    store.check()


# ---- files -----------------------------------------------------------------------------------------------


def test_what_is_saved_comes_back_compressed(tmp_path: Path) -> None:
    members = round_of(4)
    store, folder = MirrorStore(PLENTY), tmp_path / "new" / "folder"
    store.store("round", members)
    store.store("another", round_of(1))
    assert store.save(folder, "kind") == 2
    taken = sum(path.stat().st_size for path in folder.iterdir())
    assert taken < store.used_bytes + 2000
    assert all(path.stat().st_mode & 0o077 == 0 for path in folder.iterdir())
    again = MirrorStore(PLENTY)
    assert again.load(folder, "other kind") == 0
    assert again.load(folder, "kind") == 5
    assert_holds(again, "round", members)
    assert again.used_bytes == store.used_bytes
    store.drop("another", "agent 0")
    assert store.save(folder, "kind") == 1
    assert MirrorStore(PLENTY).load(folder, "kind") == 4
    small = MirrorStore(100)
    assert small.load(folder, "kind") == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 3), st.booleans())
def test_a_damaged_file_costs_members_and_never_gives_wrong_ones(seed: int, flips: int, cut: bool) -> None:
    rng = np.random.default_rng(seed)
    members = round_of(4)
    store = MirrorStore(PLENTY)
    store.store("round", members)
    store.store("whole", members)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store.save(folder, "kind")
        path = next(path for path in folder.iterdir() if b"whole" not in path.read_bytes()[:100])
        raw = bytearray(path.read_bytes())
        for _ in range(flips):
            raw[rng.integers(len(raw))] ^= 1 << int(rng.integers(8))
        path.write_bytes(raw[: rng.integers(len(raw))] if cut else raw)
        again = MirrorStore(PLENTY)
        again.load(folder, "kind")
    again.check()
    assert_holds(again, "whole", members)
    assert len(list(again.members())) < 8
    for name, put in members.items():
        got = again.materialise("round", name)
        assert got is None or same(got, put)


def test_a_full_disk_is_said_and_leaves_what_was_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The system refuses to write more: by a limit on the size of files, as a full disk would."""
    members = round_of(2)
    store = MirrorStore(PLENTY)
    store.store("round", members)
    assert store.save(tmp_path, "kind") == 1
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    store.add("round", "late", cache(9, keys(6), changed=1.0))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with caplog.at_level(logging.WARNING):
            assert store.save(tmp_path, "kind") == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "0 of 1 families saved" in caplog.text
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert store.save(tmp_path, "kind") == 1


# ---- lives -----------------------------------------------------------------------------------------------

FAMILIES, MEMBERS = st.sampled_from(["x", "y", "z"]), st.sampled_from(["a", "b", "c", "d"])


class Lives(RuleBasedStateMachine):
    """Law E10: whatever is stored, dropped, evicted, rebased, saved and loaded, who is there is who was stored."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.put: dict[tuple[str, str], MemberCache] = {}
        self.saved: dict[tuple[str, str], MemberCache] = {}
        self.pinned: list[tuple[str, str]] = []

    @initialize(limit=st.sampled_from([2500, 8000, 20_000, PLENTY]))
    def begin(self, limit: int) -> None:
        self.store = MirrorStore(limit)

    def live(self) -> set[tuple[str, str]]:
        return set(self.store.members())

    @rule(family=FAMILIES, seed=st.integers(0, 50), size=st.integers(1, 4), changed=st.sampled_from([0.0, 0.2, 1.0]))
    def store_a_round(self, family: str, seed: int, size: int, changed: float) -> None:
        if any(name == family for name, _ in self.live()):
            return
        members = {name: cache(seed + i, keys(1 + seed % 5), changed, seed % 2) for i, name in enumerate("abcd"[:size])}
        if self.store.store(family, members) is not None:
            self.put |= {(family, name): put for name, put in members.items()}
            assert all((family, name) in self.live() for name in members)

    @rule(family=FAMILIES, member=MEMBERS, seed=st.integers(0, 50))
    def add(self, family: str, member: str, seed: int) -> None:
        if (family, member) in self.pinned:
            return
        put = cache(seed, keys(1 + seed % 5), 0.3, seed % 2)
        if self.store.add(family, member, put) is not None:
            self.put[family, member] = put

    @rule(family=FAMILIES, member=MEMBERS)
    def drop(self, family: str, member: str) -> None:
        if (family, member) not in self.pinned:
            self.store.drop(family, member)
            assert (family, member) not in self.live()

    @rule(num_bytes=st.integers(1, 6000))
    def evict(self, num_bytes: int) -> None:
        before = self.store.used_bytes
        assert self.store.evict(num_bytes) == before - self.store.used_bytes >= 0

    @rule(family=FAMILIES)
    def finish(self, family: str) -> None:
        self.store.finish(family)

    @precondition(lambda self: self.store.used_bytes)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        member = data.draw(st.sampled_from(sorted(self.live())))
        self.store.pin(*member)
        self.pinned.append(member)

    @precondition(lambda self: self.pinned)
    @rule()
    def unpin(self) -> None:
        self.store.unpin(*self.pinned.pop())

    @rule()
    def save(self) -> None:
        self.store.save(Path(self.folder.name), "kind")
        self.saved = {member: self.put[member] for member in self.live()}

    @rule(restart=st.booleans())
    def load(self, restart: bool) -> None:
        if restart:
            self.store = MirrorStore(self.store.limit_bytes)
            self.pinned.clear()
        families = {family for family, _ in self.live()}
        self.store.load(Path(self.folder.name), "kind")
        self.put |= {member: put for member, put in self.saved.items() if member[0] not in families}
        if restart:
            assert self.live() == set(self.saved)

    @invariant()
    def who_is_there_is_who_was_stored(self) -> None:
        self.store.check()
        assert set(self.pinned) <= self.live()
        for member in self.live():
            assert same(self.store.materialise(*member), self.put[member])

    def teardown(self) -> None:
        self.folder.cleanup()
        while self.pinned:
            self.unpin()
        self.store.evict(PLENTY)
        assert self.store.used_bytes == 0 and not self.live()


Lives.TestCase.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestLives = Lives.TestCase
