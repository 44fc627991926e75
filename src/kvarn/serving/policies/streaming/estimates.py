"""What the streaming policy remembers from one look to the next: how long texts get, how long newcomers wait, what the
device can generate, and whether that is less than what is read."""

from __future__ import annotations

import numpy as np

from kvarn.serving.policies.protocol import RequestView, Snapshot
from kvarn.serving.policies.streaming.crowd import Crowd
from kvarn.serving.policies.streaming.gains import Column
from kvarn.serving.policies.streaming.settings import StreamingSettings

_MEMORY = 0.9
"""What the texts (or looks) so far count for in an average when one more is added."""
_SHORTEST_DELAY = 0.1
"""Of a tick: the gain's weights vanish with the delay, its order must not."""


class Estimates:
    """Running averages. `note` is called once a look, with everybody who has been let in."""

    def __init__(self, settings: StreamingSettings) -> None:
        self.settings = settings
        self.length = 0.0
        """Output tokens of texts that have ended, on average; 0 before one has."""
        self.delay = settings.tick * _SHORTEST_DELAY
        """Seconds newcomers wait, between a tenth of a tick and a tick."""
        self.supply = 0.0
        """Tokens per second that the device could generate with as many requests as fit."""
        self.demand = 0.0
        """Tokens per second that those who have been let in read."""
        self.overloaded = False
        self._seen: dict[str, RequestView] = {}

    def note(self, snapshot: Snapshot, crowd: Crowd, longest_wait: float) -> None:
        """`crowd` and the loading have been let in; the newcomer at the head has waited for `longest_wait` seconds."""
        current = {request.id: request for request in (*crowd.requests, *snapshot.loading)}
        for id in self._seen.keys() - current.keys():
            outputs = self._seen[id].num_outputs
            self.length = _MEMORY * self.length + (1 - _MEMORY) * outputs if self.length else float(outputs)
        self._seen = current
        tick = self.settings.tick
        wait = min(max(longest_wait, tick * _SHORTEST_DELAY), tick)
        self.delay = _MEMORY * self.delay + (1 - _MEMORY) * wait
        self.demand = float(crowd.rates.sum()) + sum([request.reader.rate for request in snapshot.loading])
        if crowd.requests:
            supply = self._generated(snapshot, crowd)
            self.supply = (self.supply + supply) / 2 if self.supply else supply
        limit = self.settings.overload * self.supply
        self.overloaded = self.demand > limit * (1 - self.settings.relief * self.overloaded)

    def allows(self, rate: float) -> bool:
        """Whether one more reader of `rate` tokens per second could be kept supplied."""
        if not self.supply:
            return True
        return not self.overloaded and self.demand + rate <= self.settings.overload * self.supply

    def lengths(self, crowd: Crowd) -> Column:
        """Output tokens that each will have; their true lengths are not known to us."""
        return np.minimum(crowd.limits, np.maximum(self.length, crowd.outputs)) if self.length else crowd.limits

    def length_of(self, newcomer: RequestView) -> float:
        """The same of one that has not begun."""
        return min(newcomer.max_outputs, self.length or newcomer.max_outputs)

    def _generated(self, snapshot: Snapshot, crowd: Crowd) -> float:
        """Tokens per second at the largest batch that fits, half way to the texts' ends; prompts take their share."""
        prompt, length = float(crowd.prompts.mean()), max(1.0, float(self.lengths(crowd).mean()))
        now = float(crowd.tokens.mean())
        context = (now + max(now, prompt + length)) / 2
        rows = max(1, min(snapshot.max_running, int(snapshot.num_blocks * snapshot.block_size / context)))
        token_seconds = snapshot.costs.decode_seconds(rows, int(rows * context)) / rows
        return 1.0 / (token_seconds + snapshot.costs.prefill_seconds(int(prompt)) / length)
