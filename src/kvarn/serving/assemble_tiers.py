"""From settings to the tiers behind the KV pool: sizes them and makes what copies to them."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from kvarn import __version__
from kvarn.errors import CapacityError
from kvarn.models.loader import free_bytes
from kvarn.models.spec import KVMemory, ModelSpec
from kvarn.serving.config import EngineConfig
from kvarn.serving.executors.device_copier import DeviceCopier
from kvarn.serving.executors.disk_thread import DiskThread
from kvarn.serving.executors.host_copier import HostCopier
from kvarn.serving.kvcache.cache import KVCache
from kvarn.serving.kvcache.disk import DiskIndex, DiskTier
from kvarn.serving.kvcache.disk_file import DiskFile
from kvarn.serving.kvcache.tiers import Tiers

_log = logging.getLogger(__name__)


def build_tiers(
    config: EngineConfig, cache: KVCache, kv: KVMemory, spec: ModelSpec, model_folder: Path
) -> Tiers | None:
    """The tiers that `config` describes, None without any. CapacityError when the machine is too small.

    A disk that cannot be used is left out, with a warning.
    """
    block_bytes = kv.pages[0].nbytes
    slots = _host_slots(config, cache, block_bytes)
    if not slots:
        return None
    on_cpu = kv.pages.device.type == "cpu"
    copier = HostCopier(kv, slots) if on_cpu else DeviceCopier(kv, slots)
    disk = None
    if config.disk_cache:
        try:
            file = DiskFile(
                Path(config.disk_cache).expanduser(),
                kind_of(kv, spec, model_folder),
                content_bytes=block_bytes,
                tokens_bytes=config.block_size * 4,
                limit_bytes=config.disk_memory_bytes,
            )
            disk = DiskTier(DiskIndex(file.num_records, file.scan()), DiskThread(file), copier.slot, block_bytes)
        except OSError as error:
            _log.warning("serving without the disk cache: %s", error)
    return Tiers(cache, slots, copier, block_bytes=block_bytes, disk=disk)


def kind_of(kv: KVMemory, spec: ModelSpec, folder: Path) -> str:
    """Text that is equal for KV that is interchangeable: made by the same weights, in the same way, in one format."""
    weights = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in folder.glob("*.safetensors"))
    config = (folder / "config.json").read_text()
    made = (__version__, kv.pages.device.type, spec.precision, str(spec.dtype))
    return repr((made, tuple(kv.pages.shape[1:]), str(kv.pages.dtype), weights, config))


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
