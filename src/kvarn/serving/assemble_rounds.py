"""Builds what an engine needs to reuse shared segments, where its settings and its model allow that."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path

import torch

from kvarn.errors import KvarnError
from kvarn.models.decoder_llama import LlamaDecoder
from kvarn.models.spec import Decoder, KVMemory, ModelSpec
from kvarn.serving.assemble_tiers import kind_of
from kvarn.serving.config import EngineConfig
from kvarn.serving.conversations import Conversations
from kvarn.serving.executors.segments import TorchSegments
from kvarn.serving.kvcache.cache import KVCache
from kvarn.serving.kvcache.mirrors import MirrorStore
from kvarn.serving.kvcache.segments import SegmentStore
from kvarn.serving.quality.certificate import Identity, fingerprint, read
from kvarn.serving.round_calls import RoundCalls
from kvarn.serving.rounds.settings import ReuseSettings

_CHECK_LAYER = 1
_log = logging.getLogger(__name__)


def build_rounds(
    config: EngineConfig, decoder: Decoder, kv: KVMemory, kv_dtype: torch.dtype, cache: KVCache, folder: Path
) -> RoundCalls | None:
    """None where nothing but prefixes is reused. KvarnError for a mode that this model cannot be served in.

    folder   the model's, which certificates are for
    """
    settings = _settings(config, decoder, kv_dtype, folder)
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
    kept, limit = None, config.mirror_bytes(kv.pages.nbytes)
    if limit and not settings.is_dense:
        kind = kind_of(kv, decoder.spec, folder)
        disk = Path(config.disk_cache).expanduser() if config.disk_cache else None
        kept = Conversations(cache, store, executor, settings, MirrorStore(limit), folder=disk, kind=kind)
    return RoundCalls(cache, store, executor, settings, kept)


def identity_of(spec: ModelSpec, kv_dtype: torch.dtype, block_size: int, folder: Path) -> Identity:
    """What a certificate for this model in this form is for."""
    usual = ReuseSettings()
    return Identity(
        spec.name, spec.precision, str(kv_dtype).removeprefix("torch."), block_size,
        f"{usual.source}, behind {usual.sink_tokens} or {usual.joint_sink} tokens", fingerprint(folder),
    )  # fmt: skip


def _settings(config: EngineConfig, decoder: Decoder, kv_dtype: torch.dtype, folder: Path) -> ReuseSettings | None:
    """What was asked for, with a warning where that is not certified; for "auto", the best that is."""
    asked = config.reuse_settings()
    if config.reuse == "exact" or (asked is None and not config.share_prefixes):
        return None
    if not isinstance(decoder, LlamaDecoder):
        return asked
    certificate = read(identity_of(decoder.spec, kv_dtype, config.block_size, folder))
    if asked is not None:
        all_anew = asked.mode != "lego" and asked.share == 1
        if not all_anew and (certificate is None or not certificate.allows(asked)):
            _log.warning(
                "%s is not certified for reuse %r with share %g: answers may differ from exact ones; "
                "see `kvarn model certify-reuse`", decoder.spec.name, asked.mode, asked.share,
            )  # fmt: skip
        return asked
    if certificate is None or not certificate.allowed:
        return None
    settings = certificate.allowed[0].settings(config.round_wait)
    measured_alone = settings.source == "isolated" or not settings.whole_blocks
    return replace(settings, share=max(settings.share, config.reuse_share), alone=measured_alone)
