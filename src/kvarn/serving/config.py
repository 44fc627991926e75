"""How an engine is set up: one frozen value, made from command-line flags and sent to the engine process."""

from __future__ import annotations

from typing import Literal, cast, get_args

import msgspec

from kvarn.errors import KvarnError
from kvarn.serving.policies.agentic.settings import AgenticSettings
from kvarn.serving.policies.streaming.settings import StreamingSettings
from kvarn.serving.rounds.hints import ReuseMode
from kvarn.serving.rounds.settings import DEFAULT_SHARE, ReuseSettings

PrecisionChoice = Literal["auto", "float32", "bfloat16", "int8", "int4"]
PolicyName = Literal[
    "fcfs", "streaming", "agentic", "fcfs-conservative", "fcfs-paced", "lifo", "round-robin", "least-slack", "qoe-swap",
    "qoe-recompute",
]  # fmt: skip
KVDType = Literal["auto", "bfloat16", "int8"]
Speculation = Literal["off", "ngram", "auto"]
Reuse = Literal["auto", ReuseMode]
OFFLOADING: frozenset[PolicyName] = frozenset({"streaming", "agentic", "round-robin", "least-slack", "qoe-swap"})
"""Policies that take requests off the device while others wait, and bring them back."""
AUTO = -1
"""A size that is chosen where the engine is built."""
_REUSE: tuple[str, ...] = ("auto", *get_args(ReuseMode))
_POOLS = 8
"""A host tier of automatic size holds so many times the KV pool, if there is memory for it."""
_SHARE_OF_FREE_MEMORY = 0.25


class EngineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of one engine. Zero means "choose for me" where it is not a meaningful value."""

    model: str = "smollm2"
    precision: PrecisionChoice = "auto"
    """Of the weights; see `kvarn.models.precision`."""
    kv_dtype: KVDType = "auto"
    """Of keys and values in the cache: "auto" is int8 with weights of 8 or 4 bits, else what the model computes in;
    "int8" halves bfloat16's memory."""
    device: str = "cpu"
    policy: PolicyName = "fcfs"
    policy_options: tuple[str, ...] = ()
    """Settings of the policies "streaming" and "agentic" that are not as usual, such as "tick=0.5"."""
    max_context: int = 0
    """Tokens of prompt + output a request may have; 0: what the model was made for."""
    max_running: int = 128
    """Requests in one batch."""
    token_budget: int = 512
    """Tokens that one step may compute; longer prompts are prefilled in chunks."""
    prefill_budget: int = 160
    """Prompt tokens in a step that also decodes: how long the readers of others wait for new prompts."""
    block_size: int = 16
    """Tokens in a KV block."""
    kv_memory_bytes: int = 0
    """Memory of the KV pool; 0: a quarter of what is free, at most what `max_running` full contexts need."""
    host_memory_bytes: int = AUTO
    """Memory for KV that the device has no room for; 0: none, AUTO: as much as a policy that offloads can use."""
    disk_cache: str = ""
    """Folder in which KV outlives the engine; empty: none."""
    disk_memory_bytes: int = 4 * 2**30
    """What the files there may take."""
    share_prefixes: bool = True
    reuse: Reuse = "auto"
    """Of shared segments that stand behind different texts: "auto" is what the model is certified for
    (`kvarn model certify-reuse`), and "exact", which reuses prefixes alone, for any other model."""
    reuse_share: float = 0.0
    """Of the tokens of shared segments, so many are computed anew where they stand; 0: as certified, or 0.15."""
    round_wait: float = 0.05
    """Seconds that a round waits for those of its requests that have not come."""
    segment_memory_bytes: int = AUTO
    """Host memory for shared segments; AUTO: a quarter of the KV pool's."""
    mirror_memory_bytes: int = AUTO
    """Host memory for what requests with shared segments leave when they end, for requests that go on there; 0: nothing
    is kept, AUTO: as much as for shared segments. What `disk_cache` keeps of it takes as much there."""
    cuda_graphs: bool = True
    """On a CUDA device, replay decode steps from graphs captured at start."""
    flashinfer: bool = True
    """On a CUDA device, attend with FlashInfer where it is installed, in steps that are not replayed."""
    speculation: Speculation = "auto"
    """Draft tokens where a text repeats itself: "off", "ngram" (always) or "auto" (where measured to pay)."""
    draft_tokens: int = 8
    """Tokens drafted for a request in one step at most."""
    threads: int = 0
    """Compute threads; 0: one for each processor this process may use."""

    @property
    def knows_agents(self) -> bool:
        """Whether the policy decides what becomes of KV while tools run."""
        return self.policy == "agentic"

    def host_tier_bytes(self, pool_bytes: int, free_bytes: int) -> int:
        """Of the tier behind a KV pool: what was asked for, or what a policy that offloads, or a disk, can use."""
        if self.host_memory_bytes != AUTO:
            return self.host_memory_bytes
        offloads = self.policy in OFFLOADING
        if self.policy == "agentic":
            offloads = AgenticSettings.parse(self.policy_options).offload
        if not offloads and not self.disk_cache:
            return 0
        return min(_POOLS * pool_bytes, int(free_bytes * _SHARE_OF_FREE_MEMORY))

    def segment_bytes(self, pool_bytes: int) -> int:
        """Memory for shared segments behind a KV pool of this size."""
        return pool_bytes // 4 if self.segment_memory_bytes == AUTO else self.segment_memory_bytes

    def mirror_bytes(self, pool_bytes: int) -> int:
        """Memory for what requests with shared segments leave, behind a KV pool of this size."""
        return self.segment_bytes(pool_bytes) if self.mirror_memory_bytes == AUTO else self.mirror_memory_bytes

    def reuse_settings(self) -> ReuseSettings | None:
        """None where nothing but prefixes is reused; "auto" must have been resolved to count for anything."""
        if self.reuse in ("auto", "exact"):
            return None
        mode = cast("ReuseMode", self.reuse)
        return ReuseSettings(mode=mode, share=self.reuse_share or DEFAULT_SHARE, wait=self.round_wait)

    def validate(self) -> None:
        """Raise KvarnError naming the first setting that cannot work."""
        for field, choices in (
            ("precision", get_args(PrecisionChoice)), ("policy", get_args(PolicyName)),
            ("speculation", get_args(Speculation)), ("kv_dtype", get_args(KVDType)), ("reuse", _REUSE),
        ):  # fmt: skip
            if getattr(self, field) not in choices:
                raise KvarnError(f"{field} is {getattr(self, field)!r}; choose one of {', '.join(choices)}")
        for field, low, high in (
            ("max_context", 0, 2**31), ("max_running", 1, 2**16), ("token_budget", 1, 2**20),
            ("prefill_budget", 1, 2**20), ("block_size", 1, 2**16),
            ("kv_memory_bytes", 0, 2**63 - 1), ("host_memory_bytes", AUTO, 2**63 - 1),
            ("disk_memory_bytes", 1, 2**63 - 1), ("segment_memory_bytes", AUTO, 2**63 - 1),
            ("mirror_memory_bytes", AUTO, 2**63 - 1),
            ("reuse_share", 0, 1), ("round_wait", 0, 3600),
            ("draft_tokens", 1, 64), ("threads", 0, 2**10),
        ):  # fmt: skip
            if not low <= getattr(self, field) <= high:
                expected = f"{low} to {high}" if high < 2**63 - 1 else f"{low} or more"
                raise KvarnError(f"{field} is {getattr(self, field)}; expected {expected}")
        if self.policy == "streaming":
            StreamingSettings.parse(self.policy_options)
        elif self.policy == "agentic":
            AgenticSettings.parse(self.policy_options)
        elif self.policy_options:
            raise KvarnError(
                f"policy_options is {self.policy_options[0]!r}; only the policies streaming and agentic have options"
            )
        if self.disk_cache and not self.share_prefixes:
            raise KvarnError("disk_cache keeps prefixes, which share_prefixes turns off; choose one")
        if self.disk_cache and self.host_memory_bytes == 0:
            raise KvarnError("disk_cache needs host memory on its way; give host_memory a size, or leave it to auto")
