"""From settings and a device model to an engine on a virtual clock: the counterpart of kvarn.serving.assemble."""

from __future__ import annotations

from kvarn.errors import CapacityError
from kvarn.hardware.accelerators import Accelerator
from kvarn.hardware.links import HostLink
from kvarn.hardware.models import ModelShape
from kvarn.hardware.roofline import Roofline
from kvarn.serving.agent_calls import AgentCalls
from kvarn.serving.clock import VirtualClock
from kvarn.serving.config import EngineConfig
from kvarn.serving.engine import Engine
from kvarn.serving.executors.simulated import SimulatedExecutor
from kvarn.serving.executors.simulated_copier import SimulatedCopier
from kvarn.serving.executors.simulated_segments import SimulatedSegments
from kvarn.serving.kvcache.cache import KVCache
from kvarn.serving.kvcache.copies import CopyRules
from kvarn.serving.kvcache.segments import SegmentStore
from kvarn.serving.kvcache.tiers import Tiers
from kvarn.serving.policies.registry import make_policy
from kvarn.serving.round_calls import RoundCalls
from kvarn.serving.rounds.settings import ReuseSettings


def simulated_engine(
    config: EngineConfig,
    accelerator: Accelerator,
    model: ModelShape,
    *,
    memory_fraction: float = 0.88,
    kv_share: float = 1.0,
    copy_rules: CopyRules = CopyRules(),
    reuse: ReuseSettings | None = None,
) -> Engine:
    """An engine whose clock is a `VirtualClock` and moves by modelled step times.

    The KV pool has `config.kv_memory_bytes`, or `kv_share` of what `memory_fraction` of the device leaves beside the
    weights; a host tier, where `config` asks for one, is behind the device's link. `copy_rules` say when blocks go to
    the host; `reuse` counts for more than `config.reuse`. Raises KvarnError for impossible settings, CapacityError when
    no block fits. Speculation is not simulated.
    """
    config.validate()
    reuse = reuse or config.reuse_settings()
    roofline = Roofline.of(accelerator, model, config.precision, config.kv_dtype)
    num_blocks = _count_blocks(config, roofline, memory_fraction, kv_share)
    clock = VirtualClock()
    cache = KVCache(num_blocks, config.block_size, share_prefixes=config.share_prefixes)
    block_bytes = int(model.kv_bytes_per_token(roofline.kv_bytes) * config.block_size)
    copier = SimulatedCopier(HostLink(accelerator), clock, block_bytes=block_bytes)
    slots = config.host_tier_bytes(num_blocks * block_bytes, accelerator.host_memory_bytes) // block_bytes
    tiers = Tiers(cache, slots, copier, block_bytes=block_bytes, rules=copy_rules) if slots else None
    return Engine(
        SimulatedExecutor(roofline, clock, num_blocks=num_blocks),
        make_policy(config),
        cache,
        clock,
        token_budget=config.token_budget,
        max_running=config.max_running,
        max_context=config.max_context or model.max_context,
        vocab_size=model.vocabulary,
        tiers=tiers,
        agents=AgentCalls(cache, tiers) if config.knows_agents else None,
        rounds=None if reuse is None else _rounds(config, reuse, roofline, cache, clock),
        round_budget=config.prefill_budget,
    )


def _rounds(
    config: EngineConfig, reuse: ReuseSettings, roofline: Roofline, cache: KVCache, clock: VirtualClock
) -> RoundCalls:
    block_bytes = roofline.model.kv_bytes_per_token(roofline.kv_bytes) * config.block_size
    num_blocks = int(config.segment_bytes(int(cache.pool.num_blocks * block_bytes)) // block_bytes)
    executor = SimulatedSegments(roofline, clock, num_blocks=num_blocks, block_size=config.block_size)
    cache.segments = SegmentStore(cache, num_blocks)
    return RoundCalls(cache, cache.segments, executor, reuse)


def _count_blocks(config: EngineConfig, roofline: Roofline, memory_fraction: float, share: float) -> int:
    if config.kv_memory_bytes:
        tokens = int(config.kv_memory_bytes // roofline.model.kv_bytes_per_token(roofline.kv_bytes))
    else:
        tokens = int(share * roofline.kv_tokens(memory_fraction))
    if tokens < config.block_size:
        weights = roofline.model.num_weights * roofline.weight_bytes / 1e9
        memory = roofline.accelerator.memory_bytes / 1e9
        raise CapacityError(
            f"no KV block fits: {roofline.model.name} has {weights:.1f} GB of weights, and {memory_fraction:.0%} of "
            f"{roofline.accelerator.name}'s {memory:.1f} GB may be used: raise --memory-fraction or --kv-memory, take "
            "a smaller --precision, or larger hardware"
        )
    return tokens // config.block_size
