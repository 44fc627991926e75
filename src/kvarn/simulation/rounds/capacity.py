"""How many agents a device serves within a limit on the latency of rounds.

The search assumes that more agents make rounds slower: N agents with answers of o tokens have N * N * o shared tokens
to read in a round, so they do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from kvarn.serving.engine import Engine
from kvarn.simulation.rounds.player import play_rounds
from kvarn.simulation.rounds.report import RoundsRun, Until
from kvarn.simulation.rounds.workload import RoundWorkload, draw_societies


def most_agents(
    make_engine: Callable[[], Engine],
    workload: RoundWorkload,
    slo: float,
    percentile: float = 95.0,
    *,
    most: int = 64,
    until: Until = "end",
    first_round: int = 1,
    segments: bool = True,
    on_run: Callable[[int, RoundsRun], None] = lambda agents, run: None,
) -> int:
    """The most agents of a society, up to `most`, whose rounds take `slo` seconds or less at `percentile`; 0: not one.

    `until` says where a round's time ends. Rounds before number `first_round` do not count, as they compute the
    histories that the others find; where there are no others, they do. Each trial has an engine of its own; a society
    that fails, since its prompts outgrow the context, say, is not within the limit. `on_run` hears of each trial.
    """
    first = min(first_round, workload.rounds - 1)

    def holds(agents: int) -> bool:
        engine = make_engine()
        try:
            run = play_rounds(engine, draw_societies(replace(workload, agents=agents)), segments=segments)
        finally:
            engine.close()
        on_run(agents, run)
        return not run.failures and run.round_percentile(percentile, first, until) <= slo

    return most_holding(holds, most)


def most_holding(holds: Callable[[int], bool], most: int) -> int:
    """The last number from 1 to `most` that `holds`, which every number before it is taken to do as well; 0: none.

    It doubles before it bisects: trials of many agents cost most, and most of them would fail.
    """
    fits, fails = 0, most + 1
    while fails - fits > 1:
        middle = min(2 * fits or 1, most) if fails > most else (fits + fails) // 2
        if holds(middle):
            fits = middle
        else:
            fails = middle
    return fits
