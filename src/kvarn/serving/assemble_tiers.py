"""From settings to the tiers behind the KV pool: sizes them and makes what copies to them."""

from __future__ import annotations

import torch

from kvarn.errors import CapacityError
from kvarn.models.loader import free_bytes
from kvarn.models.spec import KVMemory
from kvarn.serving.config import EngineConfig
from kvarn.serving.executors.device_copier import DeviceCopier
from kvarn.serving.executors.host_copier import HostCopier
from kvarn.serving.kvcache.cache import KVCache
from kvarn.serving.kvcache.copies import Copier
from kvarn.serving.kvcache.tiers import Tiers


def build_tiers(config: EngineConfig, cache: KVCache, kv: KVMemory) -> Tiers | None:
    """The tiers that `config` describes, None without any. CapacityError when the machine is too small."""
    block_bytes = kv.pages[0].nbytes
    slots = _host_slots(config, cache, block_bytes)
    if not slots:
        return None
    on_cpu = kv.pages.device.type == "cpu"
    copier: Copier = HostCopier(kv, slots) if on_cpu else DeviceCopier(kv, slots)
    return Tiers(cache, slots, copier, block_bytes=block_bytes)


def _host_slots(config: EngineConfig, cache: KVCache, block_bytes: int) -> int:
    """Blocks that the host tier holds: what was asked for, or what a policy that offloads can use."""
    free = free_bytes(torch.device("cpu"))
    wanted = config.host_tier_bytes(cache.pool.num_blocks * block_bytes, free)
    if wanted > free:
        raise CapacityError(
            f"--host-memory asks for {wanted / 2**20:.0f} MiB; {free / 2**20:.0f} MiB are free: lower it"
        )
    if 0 < wanted < block_bytes:
        raise CapacityError(
            f"{wanted / 2**20:.1f} MiB of --host-memory is less than one block ({block_bytes / 2**20:.1f} MiB for "
            f"{config.block_size} tokens): raise it, take a smaller --block-size, or 0 for none"
        )
    return wanted // block_bytes
