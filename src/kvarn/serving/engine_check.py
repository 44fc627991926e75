"""What must hold of an engine between two steps; tests ask after every step, production under KVARN_CHECK=1."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvarn.serving.request import RequestState

if TYPE_CHECKING:
    from kvarn.serving.engine import Engine


def check_engine(engine: Engine) -> None:
    """Raise AssertionError unless queues, states and KV blocks agree."""
    holders = engine.running + engine.loading
    stand_ins, reserved = ([], []) if engine.agents is None else engine.agents.held.holders()
    if engine.tiers is None:
        engine.cache.check(holders + stand_ins, reserved)
    else:
        engine.tiers.check(holders + stand_ins, reserved)
    assert all(r.state is RequestState.WAITING and r.num_blocks == 0 for r in engine.waiting)
    assert all(r.state is RequestState.LOADING for r in engine.loading)
    assert all(r.state is RequestState.RUNNING for r in engine.running)
    held = 0
    if engine.rounds is not None:
        held = engine.rounds.num_held
        engine.rounds.check()
    assert len(engine.waiting) + len(holders) + held == len(engine.requests)
