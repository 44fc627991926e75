"""The books of host memory: whose slot may be given away, and when."""

from __future__ import annotations

from kvarn.serving.kvcache.host import HostIndex


def test_a_dropped_slot_is_free_only_when_the_last_copy_of_it_has_ended():
    """Two loads read the same slot and one of them fails: the other one still reads there."""
    index = HostIndex(1)
    entry = index.reserve(b"key", b"", b"tokens", "")
    index.written(entry)
    index.pin(entry)
    index.pin(entry)

    index.drop(entry)
    index.check()
    assert index.find(b"key", b"", b"tokens", "") is None
    assert index.num_available == 0
    assert index.reserve(b"other", b"", b"tokens", "") is None

    index.unpin(entry)
    index.check()
    assert index.reserve(b"other", b"", b"tokens", "").slot == entry.slot


def test_every_copy_of_a_slot_may_fail():
    index = HostIndex(2)
    entry = index.reserve(b"key", b"", b"tokens", "")
    index.pin(entry)
    index.drop(entry)
    again = index.reserve(b"key", b"", b"tokens", "")
    assert again.slot != entry.slot
    index.drop(entry)
    index.written(again)
    index.check()
    assert index.find(b"key", b"", b"tokens", "") is again
    assert index.num_available == 2
