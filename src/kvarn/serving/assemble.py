"""From settings to a running engine: finds and loads the model, sizes the KV pool, wires the parts together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from kvarn.errors import CapacityError, KvarnError, ModelError
from kvarn.models.loader import free_bytes, load_decoder, usable_device
from kvarn.models.sources import Progress, resolve
from kvarn.models.spec import ModelSpec
from kvarn.models.tokenizer import tokenizer_file
from kvarn.serving.agent_calls import AgentCalls
from kvarn.serving.assemble_rounds import build_rounds
from kvarn.serving.assemble_tiers import build_tiers
from kvarn.serving.clock import Clock, MonotonicClock
from kvarn.serving.config import EngineConfig
from kvarn.serving.engine import Engine
from kvarn.serving.executors.torch_executor import TorchExecutor, allocate_kv
from kvarn.serving.kvcache.cache import KVCache
from kvarn.serving.policies.agentic.inversions import Metered
from kvarn.serving.policies.registry import make_policy
from kvarn.serving.processors import usable_processors
from kvarn.serving.sampling.grammar import GrammarFactory
from kvarn.serving.sampling.sampler import Sampler
from kvarn.serving.speculation import Speculator

_SHARE_OF_FREE_MEMORY = 0.25
_METERED = 64
"""Waiting requests whose inversions are counted: looking all of them up would take time from steps."""


@dataclass(frozen=True)
class LoadedEngine:
    """An engine and what callers need to know of its model."""

    engine: Engine
    spec: ModelSpec
    folder: Path
    kv_dtype: torch.dtype
    """Of cached keys and values."""


def load_engine(
    config: EngineConfig, *, clock: Clock | None = None, progress: Progress = lambda stage, fraction: None
) -> LoadedEngine:
    """Build the engine that `config` describes.

    Raises KvarnError for impossible settings, ModelError for a model that cannot be found or read,
    CapacityError when the machine is too small.
    """
    config.validate()
    torch.set_num_threads(config.threads or usable_processors())
    device = usable_device(config.device)
    progress("finding the model", 0.0)
    files = resolve(config.model, progress=progress)
    progress("loading the model", 0.0)
    decoder = load_decoder(files, precision=config.precision, device=str(device), progress=progress)
    spec = decoder.spec
    max_context = min(config.max_context or spec.max_context, spec.max_context)
    progress("allocating the KV pool", 0.0)
    kv_dtype = _kv_dtype(config, spec)
    blocks = _count_blocks(config, spec, max_context, device, kv_dtype)
    kv = allocate_kv(spec, blocks, config.block_size, device, kv_dtype)
    executor = TorchExecutor(
        decoder,
        kv,
        Sampler(spec.vocab_size, _grammars(files.folder, spec)),
        max_rows=config.token_budget,
        max_requests=config.max_running,
        max_context=max_context,
        cuda_graphs=config.cuda_graphs,
        use_flashinfer=config.flashinfer,
    )
    cache = KVCache(executor.num_blocks, config.block_size, share_prefixes=config.share_prefixes)
    tiers = build_tiers(config, cache, kv, spec, files.folder)
    policy = make_policy(config)
    engine = Engine(
        executor,
        Metered(policy, _METERED) if config.knows_agents else policy,
        cache,
        clock or MonotonicClock(),
        token_budget=config.token_budget,
        max_running=config.max_running,
        max_context=max_context,
        vocab_size=spec.vocab_size,
        speculator=_speculator(config),
        tiers=tiers,
        agents=AgentCalls(cache, tiers) if config.knows_agents else None,
        rounds=build_rounds(config, decoder, kv, kv_dtype, cache, files.folder),
        round_budget=config.prefill_budget,
    )
    progress("ready", 1.0)
    return LoadedEngine(engine, spec, files.folder, kv_dtype)


def _speculator(config: EngineConfig) -> Speculator | None:
    if config.speculation == "off":
        return None
    return Speculator(config.draft_tokens, only_where_it_pays=config.speculation == "auto")


def _grammars(folder: Path, spec: ModelSpec) -> GrammarFactory | None:
    """Constrained decoding for this model; None without a tokenizer: such a model still runs on token ids."""
    try:
        path = tokenizer_file(folder)
    except ModelError:
        return None
    return GrammarFactory(path, min(spec.eos_tokens, default=0), spec.vocab_size)


def _kv_dtype(config: EngineConfig, spec: ModelSpec) -> torch.dtype:
    """What keys and values are kept as."""
    quantised = spec.precision in ("int8", "int4")
    if config.kv_dtype == "int8" or (config.kv_dtype == "auto" and quantised):
        return torch.int8
    if config.kv_dtype == "bfloat16" and spec.dtype != torch.bfloat16:
        dtype = str(spec.dtype).removeprefix("torch.")
        raise KvarnError(
            f"--kv-dtype bfloat16 needs a model that computes in bfloat16, not {dtype}; choose auto or int8"
        )
    return spec.dtype


def _count_blocks(
    config: EngineConfig, spec: ModelSpec, max_context: int, device: torch.device, kv_dtype: torch.dtype
) -> int:
    """Blocks of the KV pool: what was asked for, or a share of what is free."""
    shape, element = spec.kv_block(config.block_size, kv_dtype)
    block_bytes = math.prod(shape) * element.itemsize
    enough = config.max_running * -(-max_context // config.block_size)
    free = free_bytes(device)
    wanted = config.kv_memory_bytes or int(free * _SHARE_OF_FREE_MEMORY)
    blocks = min(wanted // block_bytes, enough)
    if blocks * block_bytes > free:  # allocating would succeed, and the process would be killed when it fills up
        raise CapacityError(
            f"--kv-memory asks for {wanted / 2**20:.0f} MiB; {free / 2**20:.0f} MiB are free: lower it, or free memory"
        )
    if blocks < 1:
        raise CapacityError(
            f"{wanted / 2**20:.1f} MiB for the KV pool is less than one block ({block_bytes / 2**20:.1f} MiB for "
            f"{config.block_size} tokens): raise --kv-memory, free memory, or take a smaller --block-size"
        )
    return blocks
