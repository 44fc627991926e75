"""What rounds were like: records of requests and rounds in, figures out.

A round lasts from the moment when the last output of the round before was there (its society's arrival, for the first)
to the end of its last answer: thinking and waiting for others count. All times in seconds on one clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Group
from rich.table import Table
from rich.text import Text

Until = Literal["end", "first_token"]
"""Where a round's time ends: with its last answer, or with the first token of the agent that gets it last."""


@dataclass(slots=True)
class TurnRecord:
    """One request: an agent's part in a round."""

    society: str
    round: int
    agent: str
    ready: float
    """When the last output of the round before was there."""
    sent: float
    first_token: float = 0.0
    """0 while there is none."""
    end: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int | None = None
    """Of the prompt, what was not computed; None where the server does not say."""
    reused_tokens: int | None = None
    """Of these, what was taken from shared segments and not found as a prefix; likewise."""
    output_tokens: int = 0
    preemptions: int = 0
    said: list[int] = field(default_factory=list)
    """Token ids of the answer; empty of a simulated device."""


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """One round that came to its end."""

    society: str
    round: int
    agents: int
    ready: float
    last_sent: float
    last_first_token: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.ready

    @property
    def first_token_seconds(self) -> float:
        """To the last agent's first token."""
        return self.last_first_token - self.ready


def end_round(turns: Sequence[TurnRecord]) -> RoundRecord:
    """Of all the turns of one round."""
    return RoundRecord(
        turns[0].society,
        turns[0].round,
        len(turns),
        turns[0].ready,
        max(turn.sent for turn in turns),
        max(turn.first_token for turn in turns),
        max(turn.end for turn in turns),
    )


@dataclass
class RoundsRun:
    """What happened."""

    turns: list[TurnRecord] = field(default_factory=list)
    """As they were sent."""
    rounds: list[RoundRecord] = field(default_factory=list)
    """As they ended."""
    failures: dict[str, str] = field(default_factory=dict)
    """Society -> why it did not get to its end."""
    peak_blocks: int | None = None
    """KV blocks that requests held at most; None of a server that is not looked into."""

    def round_seconds(self, first: int = 0, until: Until = "end") -> NDArray[np.float64]:
        """Of the rounds from number `first` on, in order of society and number; shape (rounds,). Round 0 computes
        histories that the others find."""
        chosen = sorted(
            (each for each in self.rounds if each.round >= first), key=lambda each: (each.society, each.round)
        )
        return np.array(
            [each.seconds if until == "end" else each.first_token_seconds for each in chosen], dtype=np.float64
        )

    def round_percentile(self, percentile: float, first: int = 0, until: Until = "end") -> float:
        """Seconds; NaN without rounds."""
        seconds = self.round_seconds(first, until)
        return float(np.percentile(seconds, percentile)) if len(seconds) else float("nan")

    def summary(self) -> dict[str, Any]:
        """Plain values for JSON. Seconds, tokens, blocks."""
        done = [turn for turn in self.turns if turn.end]
        ttfts = np.array([turn.first_token - turn.sent for turn in done if turn.first_token])
        start = min((turn.ready for turn in self.turns), default=0.0)
        makespan = max((turn.end for turn in done), default=start) - start
        prompts, outputs = sum(turn.prompt_tokens for turn in done), sum(turn.output_tokens for turn in done)
        cached, reused = (_known(done, name) for name in ("cached_tokens", "reused_tokens"))
        return {
            "rounds": len(self.rounds),
            "failures": dict(Counter(self.failures.values())),
            **_percentiles("round", self.round_seconds()),
            **_percentiles("later_round", self.round_seconds(first=1)),
            **_percentiles("last_first_token", self.round_seconds(until="first_token")),
            **_percentiles("ttft", ttfts),
            "makespan": makespan,
            "requests": len(done),
            "prompt_tokens": prompts,
            "cached_tokens": cached,
            "reused_tokens": reused,
            "computed_tokens": prompts - (cached or 0),
            "reused_share": (cached or 0) / prompts if prompts else 0.0,
            "output_tokens": outputs,
            "output_tokens_per_second": outputs / makespan if makespan > 0 else 0.0,
            "preemptions": sum(turn.preemptions for turn in done),
            "peak_blocks": self.peak_blocks,
        }

    def to_json(self) -> dict[str, Any]:
        """The summary and every record."""
        records = {name: [asdict(record) for record in getattr(self, name)] for name in ("turns", "rounds")}
        return {"summary": self.summary(), **records, "failures": self.failures}


def render(run: RoundsRun, title: str = "") -> Group:
    """A table for people."""
    summary = run.summary()
    table = Table("", "P50", "P95")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, key in (
        ("round s", "round"), ("rounds after the first s", "later_round"), ("last agent's first token s",
        "last_first_token"), ("TTFT s", "ttft"),
    ):  # fmt: skip
        values = [summary[f"{key}_p{each}_seconds"] for each in (50, 95)]
        table.add_row(name, *("-" if value is None else f"{value:,.3f}" for value in values))
    cached, reused = summary["cached_tokens"], summary["reused_tokens"] or 0
    prefixes = (cached or 0) - reused
    parts = [f"{count:,} {what}" for count, what in ((prefixes, "as prefixes"), (reused, "from segments")) if count]
    grid = Table.grid(padding=(0, 2))
    rows = [
        ("rounds", f"{summary['rounds']}, {summary['requests']:,} requests in {summary['makespan']:,.2f} s"),
        ("output tokens", f"{summary['output_tokens']:,}, {summary['output_tokens_per_second']:,.1f} a second"),
        ("prompt tokens", f"{summary['prompt_tokens']:,}"),
        *(
            [("reused", f"{summary['reused_share']:.0%}" + (f": {', '.join(parts)}" if parts else ""))]
            if cached is not None
            else []
        ),
        *((f"failed: {reason}", str(count)) for reason, count in summary["failures"].items()),
    ]
    for name, text in rows:
        grid.add_row(f" {name}", text)
    return Group(*([Text(title, style="italic")] if title else []), grid, table)


def _known(turns: Sequence[TurnRecord], name: str) -> int | None:
    """The sum over those that say; None where nobody does."""
    values = [getattr(turn, name) for turn in turns]
    said = [value for value in values if value is not None]
    return sum(said) if said else None


def _percentiles(name: str, values: NDArray[np.float64]) -> dict[str, float | None]:
    """P50 and P95, None of nothing."""
    return {f"{name}_p{each}_seconds": float(np.percentile(values, each)) if len(values) else None for each in (50, 95)}
