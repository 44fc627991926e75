"""Builds what an engine needs to reuse shared segments, where its settings and its model allow that."""

from __future__ import annotations

import math

from kvarn.errors import KvarnError
from kvarn.models.decoder_llama import LlamaDecoder
from kvarn.models.spec import Decoder, KVMemory
from kvarn.serving.config import EngineConfig
from kvarn.serving.executors.segments import TorchSegments
from kvarn.serving.kvcache.cache import KVCache
from kvarn.serving.kvcache.segments import SegmentStore
from kvarn.serving.round_calls import RoundCalls

_CHECK_LAYER = 1


def build_rounds(config: EngineConfig, decoder: Decoder, kv: KVMemory, cache: KVCache) -> RoundCalls | None:
    """None where nothing but prefixes is reused. KvarnError for a mode that this model cannot be served in."""
    settings = config.reuse_settings()
    if settings is None:
        return None
    mode = settings.mode
    if not isinstance(decoder, LlamaDecoder) or decoder.spec.num_layers <= _CHECK_LAYER:
        raise KvarnError(
            f"reuse is {mode!r}, which needs a model of the Llama family (Llama, Mistral, Qwen2, Qwen3) of two layers "
            f"or more; {decoder.spec.architecture} is served with reuse 'exact'"
        )
    if not config.share_prefixes:
        raise KvarnError(f"reuse is {mode!r}, and share_prefixes is off: KV that nobody shares cannot be reused")
    shape, element = decoder.spec.kv_block(config.block_size, decoder.spec.dtype)
    wanted = config.segment_bytes(kv.pages.nbytes)
    blocks = wanted // (math.prod(shape) * element.itemsize)
    if blocks < 1:
        raise KvarnError(f"segment_memory_bytes is {wanted}, less than one block of KV: give more, or reuse 'exact'")
    executor = TorchSegments(decoder, kv, blocks, check_layer=_CHECK_LAYER)
    store = cache.segments = SegmentStore(cache, executor.num_blocks)
    return RoundCalls(cache, store, executor, settings)
