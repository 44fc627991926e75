"""Engines take turns: every one once a round, every other round in reverse, so that no drift of the machine is one's.

Each session is saved as it ends. A session that fails is noted with its error, and the next engine has its turn.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from benchmarks import render
from benchmarks.engines import EngineFailed
from benchmarks.results import Results
from benchmarks.servers import ServerFailed

from kvarn.errors import KvarnError

FAILURES: Final = (EngineFailed, ServerFailed, FileNotFoundError, KvarnError)
"""What ends a session, and not the benchmark."""
Session = Callable[[str, int], dict[str, Any]]
"""(name, round) -> what is noted of the engine; raises one of FAILURES."""


def take_turns(names: Sequence[str], session: Session, results: Results, arguments: argparse.Namespace) -> None:
    """Run `session` for every name in every round, and render the results."""
    started = time.monotonic()
    for turn in range(arguments.rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            try:
                found = session(name, turn)
            except FAILURES as error:
                print(f"{name} failed: {error}", file=sys.stderr, flush=True)
                found = {"error": str(error)}
            results.add_session(name, found, first=turn == 0)
    render.render(results.path)
    print(f"{time.monotonic() - started:.0f} s; written: {results.path} and {results.path.stem}.md")
