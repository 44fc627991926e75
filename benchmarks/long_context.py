"""Decode speed with long contexts: eight sequences of 4,096 and of about 8,000 tokens.

    python -m benchmarks.long_context            all installed contenders, about eight minutes
    python -m benchmarks.long_context --quick    short contexts: does everything run?

Every sequence has contents and memory of its own. The prompts are computed once: the runs that are timed find them in
the prefix cache (the shorter prompts are the longer ones' beginnings), llama.cpp keeps its context and copies the
first sequence's keys and values to the others. Decode is timed as in `benchmarks.offline`, after every sequence has
its first token. Each system runs with the cache formats it offers. Results: `benchmarks/results/long_context.*`.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from benchmarks import machine, model, settings
from benchmarks.contenders import LONG_CONTEXT, chosen
from benchmarks.engines import EngineProcess
from benchmarks.results import Results
from benchmarks.turns import take_turns

from kvarn.bench.offline import decode_rate, random_prompts

BATCH = 8
CONTEXTS = (4096, 8064)
"""Prompt tokens; whole blocks of every engine, and the second leaves room in a model made for 8192."""
OUTPUT_TOKENS = 24


def run_session(
    name: str, contexts: tuple[int, ...], output_tokens: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """One contender: {"about", "load_seconds", "prefill_seconds", "readings"}."""
    with EngineProcess(f"long-{name}", LONG_CONTEXT[name], arguments.threads, arguments.limit) as engine:
        session = engine.load()
        engine.generate(random_prompts(BATCH, 32, [7]), 4)
        prompts = random_prompts(BATCH, max(contexts), [8])
        started = time.monotonic()
        engine.generate(prompts, 2)
        seconds = time.monotonic() - started
        print(f"{name:20} {BATCH} prompts of {max(contexts)} tokens in {seconds:.0f} s", flush=True)
        readings = []
        for context in sorted(contexts, reverse=True):
            batch = [prompt[:context] for prompt in prompts]
            if context != max(contexts):
                engine.generate(batch, 2)
            rates, foreign = [], []
            for _ in range(arguments.repeats):
                machine.wait_until_quiet(arguments.patience)
                rates.append(decode_rate(engine.generate(batch, output_tokens)))
                foreign.append(round(engine.foreign[-1], 3))
            print(f"{name:20} context {context:5}  {sorted(rates)[len(rates) // 2]:8.1f} tokens/s", flush=True)
            readings.append({"kind": "decode", "size": context, "repeats": rates, "foreign_cores": foreign})
        return {**session, "prefill_seconds": seconds, "readings": readings}


def main() -> None:
    arguments = settings.parse(settings.side_by_side(__doc__, rounds=1, repeats=3, limit=400.0))
    contexts, output_tokens = ((128, 256), 8) if arguments.quick else (CONTEXTS, OUTPUT_TOKENS)
    names = chosen(arguments.only, LONG_CONTEXT)
    conditions = {
        "model": model.NAME, "batch": BATCH, "contexts": contexts, "output_tokens": output_tokens,
        "rounds": arguments.rounds, "repeats": arguments.repeats, "threads": arguments.threads,
    }  # fmt: skip
    results = Results("long_context", conditions, merge=arguments.merge, quick=arguments.quick)

    def session(name: str, turn: int) -> dict[str, Any]:
        return run_session(name, contexts, output_tokens, arguments)

    take_turns(names, session, results, arguments)


if __name__ == "__main__":
    main()
