"""What the engine asks of whatever computes: a torch device, or a simulated one."""

from __future__ import annotations

from typing import Protocol

from kvarn.serving.batch import Batch, SampledToken
from kvarn.serving.request import Request


class Executor(Protocol):
    """Computes batches. Holds weights and KV memory; decides nothing."""

    @property
    def num_blocks(self) -> int:
        """KV blocks that its memory holds."""
        ...

    @property
    def forward_seconds(self) -> float:
        """Seconds spent in the model's forward pass since start (on an asynchronous device: in launching it)."""
        ...

    def add(self, request: Request) -> None:
        """Prepare per-request state (seed, penalties, grammar). Raises RequestError when it cannot be served."""
        ...

    def execute(self, batch: Batch) -> list[list[SampledToken]]:
        """One forward pass; the tokens of each row with `samples`, in batch order.

        A row gets one token, and one more for each of its leading drafts that is the token sampled before it.
        """
        ...

    def remove(self, request: Request) -> None:
        """Forget the request's state. Called once for each added request, however it ended."""
        ...
