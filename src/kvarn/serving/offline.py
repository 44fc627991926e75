"""The engine without a server: give it prompts, get all their tokens. For batch jobs, benchmarks and tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from kvarn.models.sources import Progress
from kvarn.serving.assemble import LoadedEngine, load_engine
from kvarn.serving.batch import TokenLogprobs
from kvarn.serving.config import EngineConfig
from kvarn.serving.engine import Emission
from kvarn.serving.request import FinishReason, Request
from kvarn.serving.sampling.params import SamplingParams


@dataclass
class Generation:
    """What one prompt became."""

    token_ids: list[int] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)
    """Seconds from the call to each token."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None
    cached_tokens: int = 0


class OfflineEngine:
    """An engine in this process."""

    def __init__(self, loaded: LoadedEngine) -> None:
        self.engine = loaded.engine
        self.spec = loaded.spec
        self.folder = loaded.folder
        self.kv_dtype = loaded.kv_dtype
        self._count = 0

    @classmethod
    def load(
        cls, model: str = "smollm2", *, progress: Progress = lambda stage, fraction: None, **settings: Any
    ) -> Self:
        """Load a model; `settings` are the fields of EngineConfig. Raises what `load_engine` raises."""
        return cls(load_engine(EngineConfig(model=model, **settings), progress=progress))

    def generate(
        self,
        prompts: Sequence[list[int]],
        params: Sequence[SamplingParams] | SamplingParams,
        *,
        on_token: Callable[[int, Emission], None] | None = None,
    ) -> list[Generation]:
        """Generate for all prompts together; `on_token(index, emission)` hears of every token as it comes.

        Raises RequestError when a prompt can never be served; then nothing of this call runs on.
        """
        if isinstance(params, SamplingParams):
            params = [params] * len(prompts)
        clock = self.engine.clock
        started = clock.now()
        results = [Generation() for _ in prompts]
        index_of: dict[str, int] = {}
        try:
            for i, (prompt, sampling) in enumerate(zip(prompts, params, strict=True)):
                self._count += 1
                request = Request.create(
                    f"offline-{self._count}", prompt, sampling, arrival=clock.now(), eos_tokens=self.spec.eos_tokens
                )
                self.engine.add(request)
                index_of[request.id] = i
            while self.engine.has_work:
                for emission in self.engine.step():
                    i = index_of[emission.request.id]
                    _note(results[i], emission, clock.now() - started)
                    if on_token is not None:
                        on_token(i, emission)
        except BaseException:
            self._abandon(index_of)
            raise
        return results

    def close(self) -> None:
        """End what runs beside the engine; it cannot be used after this."""
        self.engine.close()

    def _abandon(self, ids: dict[str, int]) -> None:
        for id in ids:
            self.engine.cancel(id)
        self.engine.step()


def _note(result: Generation, emission: Emission, seconds: float) -> None:
    if emission.token is not None:
        result.token_ids.append(emission.token)
        result.token_times.append(seconds)
        result.cached_tokens = emission.request.cached_tokens
    if emission.logprobs is not None:
        result.logprobs.append(emission.logprobs)
    if emission.finish_reason is not None:
        result.finish_reason, result.error = emission.finish_reason, emission.error
