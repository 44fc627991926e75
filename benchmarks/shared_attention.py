"""Attention of agents that share their context: `python -m benchmarks.shared_attention [--quick] [--rows 1 136]`.

N agents, each with 640 shared tokens behind 64 of its own: every agent with a copy of what is shared
(`paged_attention`), or all with views of one (`shared_attention`). In a decode step each has one row, behind all; in a
prefill step 136 rows among the shared tokens, as where some of these are computed anew. What is shared is 10 segments,
which each agent has in another order, so a view each; or one in one order, as where the outputs of a round are always
told in turn.
SmolLM2-135M's shape. All of a pool's layers are computed one after another, as a step does, so that the caches do not
hold them; a figure is the median of a layer's time, the two taken in turn. Prints a JSON object for each row.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable

import torch

from kvarn.kernels import ops

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 9, 3, 64, 16
SHARED, OWN = 640, 64
SEGMENTS = (10, 1)
AGENTS = (2, 4, 10, 16)
ROWS = (1, 136)
POOL_BYTES = 128 * 2**20  # of a copy for every agent: more than caches hold


class Round:
    """`agents` sequences of `count` rows over `layers` layers of a pool."""

    def __init__(self, agents: int, segments: int, count: int, dtype: torch.dtype, sharing: bool, layers: int) -> None:
        each = SHARED // segments
        own_blocks, segment_blocks = OWN // BLOCK, each // BLOCK
        copies = 1 if sharing else agents
        blocks = agents * own_blocks + copies * SHARED // BLOCK
        width = HEAD_DIM + 4 if dtype == torch.int8 else HEAD_DIM
        shape = (blocks, layers, 2, KV_HEADS, BLOCK * width) if dtype == torch.int8 else (
            blocks, layers, 2, KV_HEADS, BLOCK, width)  # fmt: skip
        self.pages = torch.zeros(shape, dtype=torch.uint8 if dtype == torch.int8 else dtype)
        slots = torch.arange(blocks * BLOCK, dtype=torch.int32)
        values = torch.randn(len(slots), KV_HEADS, HEAD_DIM).bfloat16()
        for layer in range(layers):
            ops.write_cache(values, values, self.pages[:, layer], slots)
        order = torch.randperm(blocks).int()
        own = order[: agents * own_blocks].view(agents, own_blocks)
        held = order[agents * own_blocks :].view(copies, segments, segment_blocks)
        positions = torch.empty(blocks, BLOCK, dtype=torch.int32)
        positions[own.long()] = torch.arange(OWN, dtype=torch.int32).view(own_blocks, BLOCK)
        # Where each agent has each segment; a shared copy stands at the positions of the first.
        places = torch.stack([torch.arange(segments).roll(i) for i in range(agents)]).int() * each + OWN
        within = torch.arange(each, dtype=torch.int32).view(segment_blocks, BLOCK)
        for copy in range(copies):
            positions[held[copy].long()] = places[copy][:, None, None] + within
        rows = torch.arange(agents * count, dtype=torch.int32)
        tables = own if sharing else torch.cat([own, held.flatten(1)], dim=1)
        self.query = torch.randn(agents * count, HEADS, HEAD_DIM).bfloat16()
        at = (OWN + SHARED * (torch.arange(count, dtype=torch.int32) + 1) // count).repeat(agents)
        slots_of_each = torch.full((agents,), tables.shape[1] * BLOCK, dtype=torch.int32)
        starts = torch.arange(agents + 1, dtype=torch.int32) * count
        self.arguments = [positions, tables, slots_of_each, starts, at]
        self.attend: Callable[..., torch.Tensor] = ops.shared_attention if sharing else ops.paged_attention
        if sharing:
            angles = torch.outer(torch.arange(OWN + SHARED + 1), 10000.0 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM))
            self.arguments += [
                held[0], torch.full((segments,), each, dtype=torch.int32),
                torch.arange(segments + 1, dtype=torch.int32) * len(rows), rows.repeat(segments),
                (places - places[0]).T.flatten().repeat_interleave(count),
                torch.cat([angles.cos(), angles.sin()], dim=1),
            ]  # fmt: skip

    def layer_seconds(self) -> float:
        """Of one layer, over all of them in turn."""
        layers = self.pages.shape[1]
        started = time.perf_counter()
        for layer in range(layers):
            self.attend(self.query, self.pages[:, layer], *self.arguments, HEAD_DIM**-0.5)
        return (time.perf_counter() - started) / layers


def measure(agents: int, segments: int, rows: int, dtype: torch.dtype, repeats: int) -> dict[str, float | int | str]:
    layers = max(
        1,
        min(30 if rows == 1 else 5, POOL_BYTES // (agents * (SHARED + OWN) * 2 * KV_HEADS * HEAD_DIM * dtype.itemsize)),
    )
    rounds = {
        "copies": Round(agents, segments, rows, dtype, False, layers),
        "views": Round(agents, segments, rows, dtype, True, layers),
    }
    times: dict[str, list[float]] = {name: [] for name in rounds}
    for _ in range(repeats + 1):
        for name, each in rounds.items():
            times[name].append(each.layer_seconds())
    median = {name: statistics.median(taken[1:]) * 1e6 for name, taken in times.items()}
    return {
        "agents": agents, "segments": segments, "rows": rows, "cache": str(dtype).removeprefix("torch."),
        "copies_us": round(median["copies"], 1),
        "views_us": round(median["views"], 1), "ratio": round(median["copies"] / median["views"], 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few repeats: says that it runs")
    parser.add_argument("--agents", type=int, nargs="+", default=AGENTS)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="of each agent")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        shapes = itertools.product((torch.bfloat16, torch.int8), options.rows, SEGMENTS, options.agents)
        for dtype, rows, segments, agents in shapes:
            print(json.dumps(measure(agents, segments, rows, dtype, 2 if options.quick else 25)), flush=True)


if __name__ == "__main__":
    main()
