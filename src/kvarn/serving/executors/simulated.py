"""An executor without a device: a batch in, tokens out, and the clock set forward by what a roofline says it takes.

Everything around it (engine, policy, KV cache) is the real thing, so what is simulated is how long steps take and
nothing else. Tokens depend on their position alone: two equal prompts go on alike, as under greedy sampling. No torch.
"""

from __future__ import annotations

from kvarn.hardware.roofline import Roofline
from kvarn.serving.batch import Batch, SampledToken
from kvarn.serving.clock import VirtualClock
from kvarn.serving.request import Request
from kvarn.serving.rounds.layout import Layout

_CYCLE = 256


class SimulatedExecutor:
    """Executor over a `Roofline`. See kvarn.serving.executors.protocol."""

    def __init__(self, roofline: Roofline, clock: VirtualClock, *, num_blocks: int) -> None:
        self.roofline = roofline
        self.clock = clock
        self.forward_seconds = 0.0
        self._num_blocks = num_blocks
        # Results are only read: one of each will do.
        self._results = [[SampledToken(token_at(known, roofline.model.vocabulary))] for known in range(_CYCLE)]

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    def add(self, request: Request) -> None:
        """Nothing to prepare."""

    def remove(self, request: Request) -> None:
        """Nothing to forget."""

    def execute(self, batch: Batch) -> list[list[SampledToken]]:
        decodes = context = 0
        chunks, sampled = [], []
        readers: list[Layout] = []
        results = self._results
        for row in batch.rows:
            request, count = row.request, row.count
            computed, known = request.num_computed, request.num_tokens
            if count == 1:
                decodes += 1
                context += computed + 1
                if request.layout is not None and request.layout.views:
                    readers.append(request.layout)
            else:
                chunks.append((computed, count))
            if computed + count - row.drafts == known:
                sampled.append(results[known % _CYCLE])
        if readers:
            context -= self._read_once(readers)
        seconds = self.roofline.seconds(decodes, context, chunks, len(sampled))
        self.forward_seconds += seconds
        self.clock.advance(seconds)
        return sampled

    def _read_once(self, readers: list[Layout]) -> int:
        """Tokens that decode rows need not read, as others in the step read them too. All are still multiplied with."""
        reads = sum([layout.reused for layout in readers])
        segments = {id(view.segment): view.segment for layout in readers for view in layout.views}
        unique = min(reads, sum([segment.length for segment in segments.values()]))
        return int(min(reads - unique, reads * self.roofline.reading_share))


def token_at(known: int, vocabulary: int) -> int:
    """The token that follows so many known ones; the same comes again only after many others."""
    return known % _CYCLE % vocabulary
