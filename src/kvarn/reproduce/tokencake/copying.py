"""Cells of E7 and E8: what moving KV costs beside computing it again, and what finding a place for it costs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvarn.hardware.accelerators import load_accelerator
from kvarn.hardware.links import HostLink
from kvarn.hardware.models import load_model_shape
from kvarn.hardware.roofline import Roofline
from kvarn.serving.agents.upload import Return, next_step
from kvarn.serving.clock import VirtualClock
from kvarn.serving.executors.simulated_copier import SimulatedCopier
from kvarn.serving.kvcache.copies import CopyJob, Direction
from kvarn.serving.kvcache.host import HostIndex

BLOCK_TOKENS = 16
CONVERSATION_TOKENS = 2048
"""Blocks are computed again in conversations of this length."""
_LEAD = 8


@dataclass(frozen=True)
class Transfer:
    """The cell: so many blocks of a model to the host and back over a device's link, and computed again. Seconds."""

    hardware: str
    model: str
    blocks: int

    cost = 0.1
    alone = False

    def run(self) -> dict[str, Any]:
        accelerator, model = load_accelerator(self.hardware), load_model_shape(self.model)
        roofline = Roofline(accelerator, model)
        block_bytes = int(model.kv_bytes_per_token(2) * BLOCK_TOKENS)
        clock = VirtualClock()
        copier = SimulatedCopier(HostLink(accelerator), clock, block_bytes=block_bytes)
        seconds, places = {}, list(range(self.blocks))
        for name, direction in (("offload", Direction.TO_HOST), ("upload", Direction.TO_DEVICE)):
            started = clock.now()
            copier.start(CopyJob(direction, places, places, [0] * self.blocks))
            while not copier.finished():
                copier.wait(1.0)
            seconds[name] = clock.now() - started
        budget = accelerator.prefill_budget
        conversation = sum(
            roofline.seconds(0, 0, [(past, min(budget, CONVERSATION_TOKENS - past))], 1)
            for past in range(0, CONVERSATION_TOKENS, budget)
        )
        recompute = conversation * self.blocks * BLOCK_TOKENS / CONVERSATION_TOKENS
        ideal = self.blocks * block_bytes * (1 / accelerator.device_to_host + 1 / accelerator.host_to_device)
        return seconds | {"recompute": recompute, "ideal": ideal}


@dataclass(frozen=True)
class SlotCost:
    """The cell: seconds to find host slots for a conversation of so many blocks in a full tier, on this machine.

    Beside it, one block of memory taken from the system and written for the first time.
    """

    blocks: int
    repeats: int
    block_bytes: int
    repeat: int

    alone = True

    @property
    def cost(self) -> float:
        return self.repeats * self.blocks * 1e-5

    def run(self) -> dict[str, Any]:
        index = HostIndex(2 * self.blocks)
        whole: list[float] = []
        each: list[float] = []
        for turn in range(self.repeats):
            keys = [(turn * self.blocks + i).to_bytes(16, "little") for i in range(self.blocks)]
            started = time.perf_counter()
            entries = [index.reserve(key, b"", b"", "") for key in keys]
            whole.append(time.perf_counter() - started)
            for entry in entries:
                assert entry is not None
                index.written(entry)
        for number in range(self.blocks):
            key = number.to_bytes(16, "big")
            started = time.perf_counter()
            index.reserve(key, b"", b"", "")
            each.append(time.perf_counter() - started)
        fresh = []
        for _ in range(self.repeats):
            started = time.perf_counter()
            np.empty(self.block_bytes, dtype=np.uint8).fill(1)
            fresh.append(time.perf_counter() - started)
        found = {"each": each, "whole": whole, "fresh": fresh}
        return {name: float(np.percentile(values, 99)) for name, values in found.items()}


@dataclass(frozen=True)
class ReturnDelay:
    """The cell: by how many steps conversations come back late to a device of which 95 % is used.

    Requests end and make blocks free at random; whoever waits takes all of them that are not reserved, but for the 5 %.
    """

    gradual: bool
    returns: int
    seed: int
    num_blocks: int = 3050
    step_seconds: float = 0.03
    patience: int = 400
    """Steps after which one that is still not on its way is given up."""

    cost = 1.0
    alone = False

    def run(self) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, 7])
        return {"late": [self._late(int(rng.integers(60, 300)), rng) for _ in range(self.returns)]}

    def _late(self, blocks: int, rng: np.random.Generator) -> int:
        """Steps after it was due at which a conversation of so many blocks began to be copied."""
        free = spare = self.num_blocks // 20
        copy, reserved = blocks * 1.26e-4, 0
        notice = 0.1 + 1.25 * copy
        for step in range(-2 * _LEAD, self.patience):
            back = Return(blocks, reserved, notice - (step + 0.5) * self.step_seconds, copy)
            move = next_step(
                back,
                step_seconds=self.step_seconds,
                lead=_LEAD,
                free=free,
                allowance=self.num_blocks,
                gradual=self.gradual,
            )
            if move.upload:
                return max(0, step)
            reserved += move.reserve
            free = min(spare, free - move.reserve + int(rng.poisson(1.0) * rng.integers(20, 80)))
        return self.patience
