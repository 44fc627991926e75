"""The prefix index: which full block of KV belongs to which chain of tokens.

A block's key is a hash chained over every token before it (and the tenant's salt), so one look-up answers for
the whole prefix. Hashes only find candidates; what is shared is decided by comparing tokens. Each entry keeps
its own tokens and the id of its parent entry, and a match walks from the root, so a block is returned only
if every token of every block before it is the same, whatever the hash function does.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

ROOT = 0
"""The parent entry of every first block."""


def chain_hashes(
    tokens: NDArray[np.int32], block_size: int, salt: str = "", known: Sequence[bytes] = ()
) -> list[bytes]:
    """Hashes (16 bytes each) of the full blocks of `tokens`; `known` are those already computed."""
    hashes = list(known)
    parent = hashes[-1] if hashes else blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    begin, width = len(hashes) * block_size, 4 * block_size
    data = np.ascontiguousarray(tokens[begin:], dtype=np.int32).tobytes()
    for start in range(0, len(data) - width + 1, width):
        parent = blake2b(parent + data[start : start + width], digest_size=16).digest()
        hashes.append(parent)
    return hashes


def leading(hashes: Sequence[bytes], holds: Callable[[bytes], bool]) -> int:
    """How many leading blocks of a chain a tier has, in a few look-ups: whoever comes later in a chain goes first.

    For statistics: a block that is being copied may outlive those before it.
    """
    return bisect_left(hashes, True, key=lambda key: not holds(key))


class PrefixEntry(NamedTuple):
    """One indexed block: the tokens it holds, after those of its parent."""

    id: int
    parent: int
    block: int
    hash: bytes
    tokens: bytes
    salt: str


class PrefixIndex:
    """Entries by hash and by block. Knows nothing of references: the cache that owns it does."""

    def __init__(self) -> None:
        self._by_hash: dict[bytes, PrefixEntry] = {}
        self._by_block: dict[int, PrefixEntry] = {}
        self._next_id = ROOT + 1

    def __contains__(self, block: int) -> bool:
        return block in self._by_block

    def holds(self, key: bytes) -> bool:
        """Whether the block of this hash is indexed; for statistics: tokens are not compared."""
        return key in self._by_hash

    def match(self, hashes: Sequence[bytes], tokens: NDArray[np.int32], salt: str = "") -> list[PrefixEntry]:
        """The longest chain of entries that holds exactly the leading blocks of `tokens` for this tenant."""
        found: list[PrefixEntry] = []
        parent = ROOT
        for i, key in enumerate(hashes):
            entry = self._by_hash.get(key)
            if entry is None or entry.parent != parent or entry.salt != salt:
                break
            width = len(entry.tokens) // 4
            if entry.tokens != tokens[i * width : (i + 1) * width].tobytes():
                break
            found.append(entry)
            parent = entry.id
        return found

    def insert(self, key: bytes, parent: int, tokens: bytes, block: int, salt: str = "") -> PrefixEntry | None:
        """Index `block`.

        Returns the entry that stands for these tokens from now on: the new one, or an older one with the same
        content (then `block` stays private to its request). None when the key is taken by other content (a hash
        collision, or an orphan whose parent was evicted and re-made): nothing is indexed.
        """
        existing = self._by_hash.get(key)
        if existing is not None:
            same = existing.parent == parent and existing.tokens == tokens and existing.salt == salt
            return existing if same else None
        entry = PrefixEntry(self._next_id, parent, block, key, tokens, salt)
        self._next_id += 1
        self._by_hash[key] = self._by_block[block] = entry
        return entry

    def remove(self, block: int) -> None:
        """Forget a block whose memory is about to be reused."""
        entry = self._by_block.pop(block)
        del self._by_hash[entry.hash]
