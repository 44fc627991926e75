"""Links: first come, first served, and nothing is moved faster than the link."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvarn.hardware.accelerators import load_accelerator
from kvarn.hardware.links import HostLink, Link

SENDS = st.lists(st.tuples(st.floats(0, 5), st.integers(0, 10_000)), min_size=1, max_size=30)


def test_transfers_queue() -> None:
    link = Link(100.0)
    assert [link.send(200, 1.0), link.send(100, 1.0), link.send(50, 10.0)] == [3.0, 4.0, 10.5]
    assert link.moved_bytes == 350


def test_latency_comes_before_every_transfer() -> None:
    link = Link(100.0, latency_seconds=0.5)
    assert [link.send(100, 0.0), link.send(100, 0.0)] == [1.5, 3.0]


def test_queued_bytes_fall_as_they_arrive() -> None:
    link = Link(100.0)
    link.send(200, 0.0)
    link.send(100, 0.0)
    assert [link.queued_bytes(now) for now in (0.0, 1.0, 2.5, 3.0, 9.0)] == [300, 200, 50, 0, 0]


@given(SENDS, st.floats(1.0, 1000.0), st.floats(0.0, 1.0))
def test_arrivals_are_in_order_and_never_too_early(
    sends: list[tuple[float, int]], speed: float, latency: float
) -> None:
    """Law: transfers end in the order they were queued, each no sooner than its bytes take, and never idle first."""
    link, now, last = Link(speed, latency), 0.0, 0.0
    for gap, num_bytes in sends:
        now += gap
        end = link.send(num_bytes, now)
        assert end == pytest.approx(max(now, last) + latency + num_bytes / speed)
        assert link.queued_bytes(end) == 0
        last = end
    assert link.moved_bytes == sum(num_bytes for _, num_bytes in sends)


def test_both_ways_run_at_once_on_a_duplex_link_only() -> None:
    device = load_accelerator("h100")
    both, one = HostLink(device), HostLink(replace(device, duplex=False))
    for link in (both, one):
        link.to_host.send(int(device.device_to_host), 0.0)
    assert both.to_device.send(int(device.host_to_device), 0.0) == pytest.approx(1.0)
    assert one.to_device.send(int(device.host_to_device), 0.0) == pytest.approx(2.0)


@pytest.mark.parametrize("make", [lambda: Link(0.0), lambda: Link(1.0, -1.0), lambda: Link(1.0).send(-1, 0.0)])
def test_impossible_links_are_refused(make: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        make()  # type: ignore[operator]
