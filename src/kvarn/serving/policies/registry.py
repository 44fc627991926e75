"""Every scheduling policy by the name that settings call it."""

from __future__ import annotations

from collections.abc import Callable

from kvarn.serving.config import EngineConfig
from kvarn.serving.policies.fcfs import FirstComeFirstServed
from kvarn.serving.policies.protocol import Policy

_POLICIES: dict[str, Callable[[EngineConfig], Policy]] = {
    "fcfs": lambda config: FirstComeFirstServed(prefill_budget=config.prefill_budget)
}


def make_policy(config: EngineConfig) -> Policy:
    """A new policy as `config` asks for it; `config` must be valid."""
    return _POLICIES[config.policy](config)
