"""Plays one society on a real engine in this process, and lets its caches be looked at: rounds in, times and words out.

The bundled model, in bfloat16. What agents read is what they have said, or seeded text as long as wanted: then an
answer may be short, and everybody reads the same whatever the engine makes of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from kvarn.errors import KvarnError
from kvarn.models.tokenizer import Tokenizer
from kvarn.serving.assemble import LoadedEngine, load_engine
from kvarn.serving.config import EngineConfig
from kvarn.serving.engine import Engine
from kvarn.serving.request import FinishReason, Request
from kvarn.serving.rounds.hints import ReuseMode
from kvarn.serving.sampling.params import SamplingParams
from kvarn.simulation.rounds.progress import Ask, SocietyRun
from kvarn.simulation.rounds.texts import CHATML, RoundTexts, ScenarioTexts, SeededTexts
from kvarn.simulation.rounds.workload import SocietySpec

LAYERS, KV_HEADS, HEAD_DIM = 30, 3, 64
"""Of SmolLM2-135M."""
_TOKEN_BYTES = LAYERS * 2 * KV_HEADS * HEAD_DIM * 2
_SHORTEST = 16
"""Tokens of a segment that is reused: half of what is usual, since answers are short here."""
_LONG_WAIT = 600.0
"""Seconds that a round waits at most: all members are sent at once."""

OnMember = Callable[[Ask, Request], None]


@dataclass(frozen=True)
class Arm:
    """How shared text is reused, and what else is not as usual."""

    mode: ReuseMode = "exact"
    share: float = 0.05
    share_blocks: bool = True
    segments: bool = True
    """Whether the engine is told of prompts' parts."""
    source: Literal["joint", "isolated"] = "joint"
    """What a segment is encoded behind where all read the same ones: those before it too, or a few tokens."""
    block_size: int = 16
    token_budget: int = 512
    max_running: int = 64


@dataclass
class PlayedRound:
    """One round that has ended; seconds from its first request."""

    first_token_seconds: float = 0.0
    """To the first token of the agent that got it last."""
    seconds: float = 0.0
    said: list[list[int]] = field(default_factory=list)
    """Of each agent; only of answers that agents read."""


def load(arm: Arm, *, tokens: int, threads: int) -> LoadedEngine:
    """An engine with room for so many tokens in its pool and as many of segments."""
    config = EngineConfig(
        model="smollm2", precision="bfloat16", kv_dtype="bfloat16", reuse=arm.mode, reuse_share=arm.share,
        round_wait=_LONG_WAIT, block_size=arm.block_size, token_budget=arm.token_budget,
        max_running=arm.max_running, kv_memory_bytes=tokens * _TOKEN_BYTES,
        segment_memory_bytes=tokens * _TOKEN_BYTES, host_memory_bytes=0, speculation="off", threads=threads,
    )  # fmt: skip
    loaded = load_engine(config)
    configure(loaded.engine, arm)
    return loaded


def configure(engine: Engine, arm: Arm) -> None:
    """Let an engine that reuses segments do so in another way, from its next round on."""
    if engine.rounds is not None:
        engine.rounds.settings = replace(
            engine.rounds.settings, mode=arm.mode, share=arm.share, share_blocks=arm.share_blocks, source=arm.source,
            shortest=_SHORTEST,
        )  # fmt: skip


def scenario_texts(loaded: LoadedEngine, seed: int) -> ScenarioTexts:
    """English, in the form of the model's conversations."""
    return ScenarioTexts(Tokenizer.load(loaded.folder).encode_part, seed, CHATML)


def play_society(
    engine: Engine,
    spec: SocietySpec,
    texts: RoundTexts,
    *,
    segments: bool = True,
    invented: SeededTexts | None = None,
    eos_tokens: frozenset[int] = frozenset(),
    on_member: OnMember = lambda ask, request: None,
) -> list[PlayedRound]:
    """Play all rounds, greedily.

    With `invented` agents answer with two tokens, and read seeded text as long as the spec says. `on_member` sees each
    request when all of its prompt is computed and its last token is not. KvarnError when one fails.
    """
    society, played = SocietyRun(spec, texts), list[PlayedRound]()
    asks = society.start()
    while asks:
        play = _Round(engine, asks, segments, 2 if invented else 0, eos_tokens, on_member)
        played.append(play.run())
        following: list[Ask] = []
        for ask in asks:
            said, told = play.said[ask.agent], None
            if invented is not None:
                told = invented.named(f"{ask.society} {ask.round} {ask.agent} says", ask.output_tokens)
            else:
                played[-1].said.append(said)
            following += society.answered(ask.agent, said, told)
        asks = following
    return played


class _Round:
    """The requests of one round."""

    def __init__(
        self, engine: Engine, asks: list[Ask], segments: bool, answer_tokens: int, eos_tokens: frozenset[int],
        on_member: OnMember,
    ) -> None:  # fmt: skip
        self.said: dict[int, list[int]] = {}
        self._engine, self._on_member, self._seen = engine, on_member, set[str]()
        self._asked: dict[str, tuple[Ask, Request]] = {}
        for ask in asks:
            params = SamplingParams(
                temperature=0.0, max_tokens=answer_tokens or max(2, ask.output_tokens), ignore_eos=not eos_tokens
            )
            request = Request.create(
                f"{ask.hint.id}/{ask.agent}", ask.prompt, params, arrival=engine.clock.now(), eos_tokens=eos_tokens,
                segments=ask.segments if segments else (), round=ask.hint if segments else None,
            )  # fmt: skip
            self._asked[request.id] = (ask, request)

    def run(self) -> PlayedRound:
        started, played = time.perf_counter(), PlayedRound()
        for _, request in self._asked.values():
            self._engine.add(request)
        while self._engine.has_work:
            emissions = self._engine.step()
            now = time.perf_counter() - started
            for emission in emissions:
                ask, request = self._asked[emission.request.id]
                if emission.error is not None:
                    raise KvarnError(f"agent {ask.agent} of round {ask.round} failed: {emission.error}")
                if emission.token is not None and request.num_outputs == 1:
                    played.first_token_seconds = now
                if emission.finish_reason is not None:
                    end = request.num_tokens - (emission.finish_reason is FinishReason.STOP)
                    self.said[ask.agent] = request.tokens[request.prompt_length : end].tolist()
                    played.seconds = now
                elif request.id not in self._seen:
                    self._seen.add(request.id)
                    self._on_member(ask, request)
        return played
