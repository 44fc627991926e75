"""Certifies a model: loads it as it would be served, measures ways of reuse, and says which keep the limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Final

from kvarn.errors import KvarnError
from kvarn.models.chat import ChatTemplate
from kvarn.models.tokenizer import Tokenizer
from kvarn.serving.assemble import LoadedEngine, load_engine
from kvarn.serving.assemble_rounds import identity_of
from kvarn.serving.config import EngineConfig
from kvarn.serving.quality.certificate import VERSION, Certificate, Limits, Measured, allowed
from kvarn.serving.quality.groups import Encode, Frame, make_groups
from kvarn.serving.quality.measure import measure
from kvarn.serving.rounds.settings import ReuseSettings

SHARES: Final = (0.05, 0.1, 0.15, 0.3, 0.5)
GROUPS: Final = 12
"""Of 4, 5 and 6 agents in turn."""
_CONTEXT, _RUNNING = 2048, 8
"""Tokens of a prompt and requests at once, as many as groups can have."""


def engine_config(model: str, precision: str, kv_dtype: str, device: str, block_size: int) -> EngineConfig:
    """An engine that ways of reuse can be measured on; by itself it computes everything anew."""
    return EngineConfig(
        model=model, precision=precision, kv_dtype=kv_dtype, device=device, block_size=block_size,  # type: ignore[arg-type]
        max_context=_CONTEXT, max_running=_RUNNING, reuse="batched", reuse_share=1.0, speculation="off",
    )  # fmt: skip


def texts(loaded: LoadedEngine) -> tuple[Encode, Callable[[list[int]], str], Frame]:
    """How to make tokens of texts and texts of tokens, and the model's chat template as a frame, if it has one."""
    tokenizer, template = Tokenizer.load(loaded.folder), ChatTemplate.load(loaded.folder)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    return encode, tokenizer.decode, Frame.of(template.render) if template.sources else Frame(tokenizer.bos_token)


def certify(
    config: EngineConfig,
    *,
    shares: Sequence[float] = SHARES,
    limits: Limits = Limits(),
    groups: int = GROUPS,
    seed: int = 0,
    on_group: Callable[[], None] = lambda: None,
) -> Certificate:
    """Measure; nothing is written. KvarnError for numbers that make no sense, and what `load_engine` raises."""
    limits.validate()
    for share in shares:
        if not 0 < share <= 1:
            raise KvarnError(f"--share is {share}; expected more than 0, at most 1")
    if groups < 1:
        raise KvarnError(f"--groups is {groups}; expected 1 or more")
    loaded = load_engine(config)
    encode, decode, frame = texts(loaded)
    ways = [ReuseSettings("batched", 1.0), ReuseSettings("lego", 0.0)]
    ways += [ReuseSettings(mode, share) for mode in ("collective", "batched") for share in sorted(set(shares))]
    floor, *qualities = measure(loaded, ways, make_groups(encode, frame, groups, seed=seed), decode, on_group=on_group)
    measured = [
        Measured(way.mode, way.share, way.lego_blocks if way.mode == "lego" else 0, quality)
        for way, quality in zip(ways[1:], qualities, strict=True)
    ]
    return Certificate(
        VERSION, identity_of(loaded.spec, loaded.kv_dtype, config.block_size, loaded.folder), limits, measured,
        allowed(measured, limits), floor, groups, seed, datetime.now(UTC).date().isoformat(),
    )  # fmt: skip
