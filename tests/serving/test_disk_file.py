"""The files of the disk tier: whatever happens to them, what is read is what was written, or nothing."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn.errors import KvarnError
from kvarn.serving.kvcache.disk_file import DiskFile, Header, salt_digest

CONTENT, TOKENS = 5000, 64
PAIR = (".index", ".blocks")


def open_file(folder: Path, *, kind: str = "kind", limit: int = 100_000) -> DiskFile:
    return DiskFile(folder, kind, content_bytes=CONTENT, tokens_bytes=TOKENS, limit_bytes=limit)


def header(number: int, *, sequence: int = 1, salt: str = "") -> Header:
    key = number.to_bytes(16, "little")
    return Header(
        key, b"" if number == 0 else (number - 1).to_bytes(16, "little"), key * 4, salt_digest(salt), sequence
    )


def content(number: int) -> bytes:
    """What the block of this number must hold, wherever it is found."""
    return random.Random(number).randbytes(CONTENT)


def paths(folder: Path) -> list[Path]:
    return [next(folder.glob(f"*{suffix}")) for suffix in PAIR]


def verify(folder: Path) -> set[int]:
    """Open what is there and read all of it; the blocks that were found. AssertionError for any wrong one."""
    file = open_file(folder)
    found = set()
    for record, stored in file.scan():
        number = int.from_bytes(stored.hash, "little")
        assert stored.tokens == header(number).tokens and stored.parent == header(number).parent
        buffer = bytearray(CONTENT)
        if file.read(record, stored, memoryview(buffer)):
            assert buffer == content(number)
            found.add(number)
    file.close()
    return found


def write(folder: Path, blocks: dict[int, int]) -> None:
    """record -> block"""
    file = open_file(folder)
    for record, number in blocks.items():
        file.write(record, header(number), content(number))
    file.close()


def test_what_was_written_is_there_after_reopening(tmp_path):
    write(tmp_path / "new" / "folder", {0: 7, 3: 8, 10: 0})
    file = open_file(tmp_path / "new" / "folder")
    assert file.num_records == 10 + 1
    stored = dict(file.scan())
    assert {record: (h.hash, h.parent, h.salt) for record, h in stored.items()} == {
        record: (header(n).hash, header(n).parent, salt_digest("")) for record, n in ((0, 7), (3, 8), (10, 0))
    }
    buffer = memoryview(bytearray(CONTENT))
    assert file.read(3, stored[3], buffer) and bytes(buffer) == content(8)
    file.erase(3)
    assert set(dict(file.scan())) == {0, 10}
    file.close()
    assert all(path.stat().st_mode & 0o077 == 0 for path in paths(tmp_path / "new" / "folder"))
    assert verify(tmp_path / "new" / "folder") == {7, 0}


def test_a_header_is_valid_in_its_place_only(tmp_path):
    write(tmp_path, {0: 7, 1: 8})
    index, _ = paths(tmp_path)
    raw = bytearray(index.read_bytes())
    size = (len(raw) - 4096) // 2
    raw[4096 : 4096 + size] = raw[4096 + size :]
    index.write_bytes(raw)
    assert verify(tmp_path) == {8}


def test_one_process_at_a_time(tmp_path):
    file = open_file(tmp_path)
    with pytest.raises(BlockingIOError, match="another server"):
        open_file(tmp_path)
    other = open_file(tmp_path, kind="another kind")
    other.close()
    file.close()
    open_file(tmp_path).close()


def test_kinds_are_apart_and_a_smaller_limit_gives_the_rest_up(tmp_path):
    write(tmp_path, {0: 7, 10: 8})
    other = open_file(tmp_path, kind="other")
    assert list(other.scan()) == []
    other.close()
    small = open_file(tmp_path, limit=50_000)
    assert [record for record, _ in small.scan()] == [0]
    small.close()
    assert verify(tmp_path) == {7}
    with pytest.raises(KvarnError, match="--disk-memory"):
        open_file(tmp_path, limit=5000)


def test_the_longest_unused_files_of_other_kinds_go_when_the_folder_is_over_its_limit(tmp_path):
    made: dict[str, Path] = {}
    for age, kind in enumerate(("in use", "old", "new")):
        file = open_file(tmp_path, kind=kind)
        for record in range(8):
            file.write(record, header(record), content(record))
        made[kind] = next(path for path in tmp_path.glob("*.index") if path not in made.values())
        os.utime(made[kind], (age, age))
        if kind == "in use":
            held = file
        else:
            file.close()
    mine = open_file(tmp_path, kind="mine", limit=170_000)
    assert [kind for kind, path in made.items() if path.exists()] == ["in use", "new"]
    assert len(list(tmp_path.glob("*.blocks"))) == 3
    mine.close()
    held.close()


@settings(max_examples=60, deadline=None)
@given(st.integers(0), st.integers(1, 4))
def test_no_flipped_bit_is_ever_served(seed, flips):
    """Law: bits flipped anywhere in either file cost blocks, never a wrong one."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, {record: record for record in range(4)})
        hit = set()
        for _ in range(flips):
            path = rng.choice(paths(folder))
            raw = bytearray(path.read_bytes())
            place = rng.randrange(len(raw))
            raw[place] ^= 1 << rng.randrange(8)
            hit.add((path.suffix, place))
            path.write_bytes(raw)
        found = verify(folder)
        if len(hit) == 1 and not any(suffix == ".index" and place < 4096 for suffix, place in hit):
            assert len(found) >= 3


@settings(max_examples=80, deadline=None)
@given(st.integers(0), st.booleans())
def test_no_torn_write_is_ever_served(seed, fresh):
    """Law: of several writes to both files, any part of each may reach the disk, in any order of pages."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, {} if fresh else {record: record for record in range(6)})
        before = [path.read_bytes() for path in paths(folder)]
        write(folder, {rng.randrange(6): 100 + rng.randrange(6) for _ in range(3)})
        after = [path.read_bytes() for path in paths(folder)]
        for path, old, new in zip(paths(folder), before, after, strict=True):
            old = old.ljust(len(new), b"\0")
            cut = rng.choice([512, 4096, 1])
            if cut == 1:  # a write that stopped in the middle
                at = rng.randrange(len(new) + 1)
                mixed = new[:at] + old[at:]
            else:
                mixed = b"".join(rng.choice([old, new])[i : i + cut] for i in range(0, len(new), cut))
            path.write_bytes(mixed[: rng.randrange(len(mixed) + 1)] if rng.random() < 0.3 else mixed)
        verify(folder)


WRITER = """
import sys
from pathlib import Path
from tests.serving.test_disk_file import content, header, open_file
file = open_file(Path(sys.argv[1]))
print("open", flush=True)
number = int(sys.argv[2])
while True:
    number += 1
    file.write(number % file.num_records, header(number % 500, sequence=number), content(number % 500))
    if number % 3 == 0:
        file.erase((number * 7) % file.num_records)
    if number % 50 == 0:
        print(number, flush=True)
"""


def test_killed_at_any_moment_no_wrong_block_is_left(tmp_path):
    rng = random.Random(11)
    survived = 0
    for life in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(life * 1000)],
            stdout=subprocess.PIPE, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        assert process.stdout is not None
        for _ in range(rng.randint(1, 8)):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        survived += len(verify(tmp_path))
    assert survived > 10
