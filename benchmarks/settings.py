"""Flags of the benchmarks: those in which engines take turns, and those of our engine alone."""

from __future__ import annotations

import argparse
import os


def side_by_side(description: str | None, *, rounds: int, repeats: int, limit: float) -> argparse.ArgumentParser:
    """A parser with --only, --merge, --quick, --rounds, --repeats, --threads, --limit and --patience."""
    parser = _parser(description)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="measure these; a system's name: all its precisions")
    parser.add_argument("--merge", action="store_true", help="keep the results of those that are not measured now")
    parser.add_argument("--quick", action="store_true", help="tiny settings, results to .cache/benchmarks")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"turns of everyone (default {rounds})")
    parser.add_argument("--repeats", type=int, default=repeats, help=f"runs in a turn (default {repeats})")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all processors")
    parser.add_argument("--limit", type=float, default=limit, help=f"seconds a turn may take (default {limit:g})")
    parser.add_argument("--patience", type=float, help="seconds to wait for quiet before a run (default 20; quick 0)")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The parsed flags, with a quick run's single round and lack of patience filled in."""
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds = arguments.repeats = 1
    if arguments.patience is None:
        arguments.patience = 0.0 if arguments.quick else 20.0
    return arguments


def alone(description: str | None, *, batches: list[int], quick_batch: int) -> argparse.Namespace:
    """The parsed flags --batches, --repeats, --precision and --quick, which means one batch, once."""
    parser = _parser(description)
    parser.add_argument("--batches", type=int, nargs="+", default=batches)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", default="auto", help="of the engine (default: what it chooses)")
    parser.add_argument("--quick", action="store_true", help="one small batch, results to .cache/benchmarks")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.batches, arguments.repeats = [quick_batch], 1
    return arguments


def _parser(description: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
