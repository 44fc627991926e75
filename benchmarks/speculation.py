"""Decode speed with and without speculation, on work that copies and on plain chat; the tokens must be the same.

    python -m benchmarks.speculation [--precision auto] [--batches 1 4 16] [--repeats 5] [--quick]

Greedy, real prompts in the model's chat format. The three modes take turns in one process on one engine, so they share
the machine's moods. In float32 the tokens of all modes must be equal. In other precisions two rows of one sequence may
be rounded otherwise than one, so equality is reported. Results: `benchmarks/results/speculation.json` and `.md`.
"""

from __future__ import annotations

from itertools import cycle, islice
from typing import Any

from benchmarks import machine, render, settings
from benchmarks.adapters.kvarn import engine_settings
from benchmarks.results import Results

from kvarn.bench.offline import decode_rate
from kvarn.models.chat import ChatTemplate
from kvarn.models.tokenizer import Tokenizer
from kvarn.serving.offline import OfflineEngine
from kvarn.serving.sampling.params import SamplingParams
from kvarn.serving.speculation import Speculator

REPORT = (
    "The harbour of Kallvik froze on the third of December. Two fishing boats were caught in the ice, and the ferry to "
    "the islands stopped for eleven days. The mayor, Ingrid Dahl, asked the coast guard for help on the fifth. An "
    "icebreaker came from Umea on the ninth and opened a channel of forty metres. On the fourteenth the ferry sailed "
    "again, with mail, medicine and sixty passengers who had waited in the school."
)
CODE = (
    "def read_orders(path):\n    orders = []\n    with open(path) as file:\n        for line in file:\n"
    "            name, count, price = line.split(',')\n            orders.append((name, int(count), float(price)))\n"
    "    return orders\n\n\ndef total(orders):\n    result = 0.0\n    for name, count, price in orders:\n"
    "        result += count * price\n    return result\n"
)
TASKS = {
    "copying": [
        f"Repeat the following text word for word.\n\n{REPORT}",
        f"Correct the spelling of this text and write it out in full:\n\n{REPORT.replace('harbour', 'harbor')}",
        f"Rename the function total to order_total and write out the whole file:\n\n{CODE}",
        f"Summarise this report in three sentences, quoting its words where you can:\n\n{REPORT}",
    ],
    "chat": [
        "Why is the sky blue?",
        "Write a short poem about a lighthouse in autumn.",
        "Give me some advice on learning to play the piano as an adult.",
        "Explain to a child how a vaccine works.",
    ],
}
MODES = {
    "off": lambda: None,
    "ngram": lambda: Speculator(only_where_it_pays=False),
    "auto": lambda: Speculator(only_where_it_pays=True),
}
OUTPUT_TOKENS = 128


class Bench:
    """One engine whose speculator is changed between runs; each mode keeps its own, as a server would."""

    def __init__(self, precision: str) -> None:
        self.offline = OfflineEngine.load(**engine_settings(precision=precision))
        self._speculators = {mode: make() for mode, make in MODES.items()}
        tokenizer, template = Tokenizer.load(self.offline.folder), ChatTemplate.load(self.offline.folder)
        self._prompts = {
            task: [
                tokenizer.encode(template.render([{"role": "user", "content": text}]), add_special_tokens=False)
                for text in texts
            ]
            for task, texts in TASKS.items()
        }

    def run(self, task: str, batch: int, mode: str) -> tuple[dict[str, Any], list[list[int]]]:
        """Figures of one batch, and its tokens."""
        engine = self.offline.engine
        engine.speculator = self._speculators[mode]
        before = engine.counters.drafted_tokens, engine.counters.accepted_tokens, engine.counters.steps
        params = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
        load = machine.ForeignLoad()
        results = self.offline.generate(list(islice(cycle(self._prompts[task]), batch)), params)
        row = {
            "task": task, "batch": batch, "mode": mode, "foreign_cores": load.cores(),
            "tokens_per_second": decode_rate([one.token_times for one in results]),
            "drafted": engine.counters.drafted_tokens - before[0],
            "accepted": engine.counters.accepted_tokens - before[1],
            "steps": engine.counters.steps - before[2],
        }  # fmt: skip
        return row, [one.token_ids for one in results]


def main() -> None:
    arguments = settings.alone(__doc__, batches=[1, 4, 16], quick_batch=1)
    bench = Bench(arguments.precision)
    conditions = {
        "repeats": arguments.repeats, "precision": arguments.precision, "output_tokens": OUTPUT_TOKENS,
    }  # fmt: skip
    results = Results("speculation", conditions, merge=False, quick=arguments.quick)
    rows = results.data["rows"] = []
    for batch in arguments.batches:
        for task in TASKS:
            bench.run(task, batch, "off")  # warm-up, and the prompts into the prefix cache
            for _ in range(arguments.repeats):
                plain: list[list[int]] = []
                for mode in MODES:
                    row, tokens = bench.run(task, batch, mode)
                    plain = plain or tokens
                    row["same_tokens"] = tokens == plain
                    if arguments.precision == "float32" and not row["same_tokens"]:
                        raise SystemExit(f"{mode} changed the text of {task} at batch {batch}")
                    rows.append(row)
                    print(
                        f"batch {batch:2}  {task:8} {mode:6} {row['tokens_per_second']:7.1f} tokens/s  {row['steps']} "
                        f"steps, {row['accepted']} of {row['drafted']} drafts came true, same: {row['same_tokens']}",
                        flush=True,
                    )
    results.save()
    render.render(results.path)


if __name__ == "__main__":
    main()
