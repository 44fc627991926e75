"""Every scheduling policy by the name that settings call it."""

from __future__ import annotations

from collections.abc import Callable

from kvarn.serving.config import EngineConfig, PolicyName
from kvarn.serving.policies.agentic.policy import Agentic
from kvarn.serving.policies.agentic.settings import AgenticSettings
from kvarn.serving.policies.fcfs import FirstComeFirstServed
from kvarn.serving.policies.protocol import Policy
from kvarn.serving.policies.ranked import QoEGreedy, Ranked, RoundRobin, least_slack
from kvarn.serving.policies.reserving import Reserving
from kvarn.serving.policies.streaming.policy import Streaming
from kvarn.serving.policies.streaming.settings import StreamingSettings

_AHEAD = 2.0
"""Seconds of text that pacing keeps a reader ahead."""

POLICIES: dict[PolicyName, Callable[[int], Policy]] = {
    "fcfs": lambda prompts: FirstComeFirstServed(prefill_budget=prompts),
    "streaming": lambda prompts: Streaming(StreamingSettings(prefill_budget=prompts)),
    "agentic": lambda prompts: Agentic(AgenticSettings(prefill_budget=prompts)),
    "fcfs-conservative": lambda prompts: Reserving(prompts),
    "fcfs-paced": lambda prompts: Reserving(prompts, ahead=_AHEAD),
    "lifo": lambda prompts: FirstComeFirstServed(0, prompts, last_admitted=True),
    "round-robin": lambda prompts: Ranked(RoundRobin(), prefill_budget=prompts),
    "least-slack": lambda prompts: Ranked(least_slack, prefill_budget=prompts),
    "qoe-swap": lambda prompts: Ranked(QoEGreedy(), prefill_budget=prompts),
    "qoe-recompute": lambda prompts: Ranked(QoEGreedy(), prefill_budget=prompts, offload=False),
}
"""By name; made from the prompt tokens that a step may compute beside decoding."""


def make_policy(config: EngineConfig) -> Policy:
    """A new policy as `config` asks for it; `config` must be valid."""
    if config.policy == "streaming":
        return Streaming(StreamingSettings.parse(config.policy_options, prefill_budget=config.prefill_budget))
    if config.policy == "agentic":
        return Agentic(AgenticSettings.parse(config.policy_options, prefill_budget=config.prefill_budget))
    return POLICIES[config.policy](config.prefill_budget)
