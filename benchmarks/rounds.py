"""Rounds of agents on a real model: what each part of collective reuse is worth, arm beside arm.

    python -m benchmarks.rounds            about ten minutes
    python -m benchmarks.rounds --quick    does everything run?

N agents, each with a private history that is cached, get the N outputs of the last round (new ones in every repeat) and
a task. *prefill*: from the moment all N requests are there to the last first token. *round*: to the last answer's end.
Arms, each the engine with one thing changed, in turn within every repeat:

    recompute             prefix caching alone
    serial                reuse, one request after the other, each with copies of its own: as published before
    batched               the same for all at once
    collective, alone     one choice of blocks for the round; segments encoded alone, copies, as much computed anew
    collective, joint     segments encoded behind one another, which diverges less, so less is computed anew
    collective            the same, and all read the shared blocks in place
    lego                  the first block of each segment, without looking, read in place

*plain*: requests without rounds, with the feature on and off.
*capacity*: the most agents whose rounds, to the last answer's end, take `--slo` seconds or less in the median.

What is computed anew: `--share` of the shared tokens in the first arms, `--joint-share` in the last three but lego;
`kvarn reproduce tokendance` shows how far each diverges from computing everything.

Results: `benchmarks/results/rounds.json` and `.md`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
from benchmarks.results import Results
from numpy.typing import NDArray

from kvarn.serving.offline import OfflineEngine
from kvarn.serving.request import Request
from kvarn.serving.rounds.hints import RoundHint, Segment, SegmentKind
from kvarn.serving.rounds.settings import ReuseSettings
from kvarn.serving.sampling.params import SamplingParams
from kvarn.simulation.rounds.capacity import most_holding

Tokens = NDArray[np.int32]

ARMS: dict[str, dict[str, Any]] = {
    "recompute": {"mode": "exact"},
    "serial": {"mode": "serial"},
    "batched": {"mode": "batched"},
    "collective, alone": {"mode": "collective", "source": "isolated", "share_blocks": False},
    "collective, joint": {"mode": "collective", "source": "joint", "share_blocks": False},
    "collective": {"mode": "collective", "source": "joint"},
    "lego": {"mode": "lego", "source": "joint"},
}
"""Name -> what is set of ReuseSettings."""


class Arm:
    """One engine, and the agents' histories in its prefix cache."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        settings = ARMS[name]
        self.name = name
        self.offline = OfflineEngine.load(
            reuse=settings["mode"], round_wait=5.0, precision=arguments.precision, block_size=arguments.block_size,
            kv_memory_bytes=arguments.kv_memory * 2**20, speculation="off",
        )  # fmt: skip
        self.engine = self.offline.engine
        if self.engine.rounds is not None:
            share = arguments.joint_share if settings.get("source") == "joint" else arguments.share
            self.engine.rounds.settings = ReuseSettings(share=share, wait=5.0, **settings)
        self.count = 0

    def play(self, prompts: list[list[tuple[SegmentKind, Tokens]]], outputs: int) -> dict[str, float]:
        """One round; seconds to the last first token and to the end, and the most blocks in use."""
        self.count += 1
        engine = self.engine
        started = time.perf_counter()
        for i, parts in enumerate(prompts):
            tokens = np.concatenate([tokens for _, tokens in parts])
            segments = tuple(Segment(kind, len(tokens)) for kind, tokens in parts)
            engine.add(
                Request.create(
                    f"{self.count}-{i}",
                    tokens,
                    SamplingParams(temperature=0.0, max_tokens=outputs, ignore_eos=True),
                    arrival=engine.clock.now(),
                    segments=segments,
                    round=RoundHint(f"{self.count}", len(prompts), f"{i}"),
                )
            )
        begun: set[str] = set()
        first = peak = 0.0
        while engine.has_work:
            for emission in engine.step():
                if emission.token is not None and emission.request.id not in begun:
                    begun.add(emission.request.id)
                    first = time.perf_counter() - started
            peak = max(peak, engine.cache.pool.num_active)
        return {"prefill": first, "round": time.perf_counter() - started, "blocks": peak}

    def remember(self, histories: list[Tokens]) -> None:
        """Have the agents' histories cached."""
        self.offline.generate([history.tolist() for history in histories], SamplingParams(max_tokens=1))


class Society:
    """Agents whose histories an arm has in its prefix cache; every round they say something else."""

    def __init__(self, agents: int, vocabulary: int, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self._rng = np.random.default_rng([arguments.seed, agents])
        self._vocabulary = vocabulary
        head = self._text(16)
        self.histories = [np.concatenate([head, self._text(arguments.history - 16)]) for _ in range(agents)]

    def _text(self, tokens: int) -> Tokens:
        return self._rng.integers(100, self._vocabulary, tokens, dtype=np.int32)

    def next_round(self) -> list[list[tuple[SegmentKind, Tokens]]]:
        """The parts of each agent's prompt; each begins to read with another's words."""
        arguments, agents = self.arguments, len(self.histories)
        said = [self._text(arguments.output) for _ in range(agents)]
        return [
            [
                ("private", np.concatenate([history, self._text(arguments.fresh)])),
                *(("shared", said[(i + j) % agents]) for j in range(agents)),
                ("task", self._text(arguments.task)),
            ]
            for i, history in enumerate(self.histories)
        ]


def measure(agents: int, arms: list[Arm], arguments: argparse.Namespace) -> dict[str, Any]:
    """What each arm took in each repeat, for one number of agents; the arms in turn within every repeat."""
    society = Society(agents, arms[0].offline.spec.vocab_size, arguments)
    for arm in arms:
        arm.remember(society.histories)
    runs: dict[str, list[dict[str, float]]] = {arm.name: [] for arm in arms}
    for repeat in range(arguments.repeats + 1):
        prompts = society.next_round()
        for arm in arms if repeat % 2 else arms[::-1]:
            found = arm.play(prompts, arguments.answer)
            if repeat:  # the first warms up
                runs[arm.name].append(found)
    return {name: {key: [run[key] for run in found] for key in found[0]} for name, found in runs.items()}


def capacity(arm: Arm, arguments: argparse.Namespace) -> int:
    """The most agents whose rounds take `slo` seconds or less in the median."""

    def holds(agents: int) -> bool:
        taken = measure(agents, [arm], arguments)[arm.name]["round"]
        return statistics.median(taken) <= arguments.slo

    return most_holding(holds, arguments.most)


def plain(arms: list[Arm], arguments: argparse.Namespace) -> dict[str, Any]:
    """Requests without rounds or segments: seconds of each arm, in turns, and whether they say the same."""
    rng = np.random.default_rng(arguments.seed)
    vocabulary = arms[0].offline.spec.vocab_size
    seconds: dict[str, list[float]] = {arm.name: [] for arm in arms}
    same = True
    for repeat in range(2 * arguments.repeats + 1):
        prompts = [rng.integers(100, vocabulary, 128).tolist() for _ in range(16)]
        texts = []
        for arm in arms if repeat % 2 else arms[::-1]:
            started = time.perf_counter()
            found = arm.offline.generate(prompts, SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True))
            if repeat:
                seconds[arm.name].append(time.perf_counter() - started)
            texts.append([each.token_ids for each in found])
        same = same and all(each == texts[0] for each in texts)
    return {"seconds": seconds, "same_tokens": same}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", type=int, nargs="+", default=[2, 4, 8, 10, 16])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--history", type=int, default=256, help="cached tokens of each agent")
    parser.add_argument("--fresh", type=int, default=16, help="tokens of its history that are new in a round")
    parser.add_argument("--output", type=int, default=64, help="tokens of each shared output")
    parser.add_argument("--task", type=int, default=24)
    parser.add_argument("--answer", type=int, default=32, help="tokens that each agent says")
    parser.add_argument("--share", type=float, default=0.15)
    parser.add_argument("--joint-share", type=float, default=0.02)
    parser.add_argument("--slo", type=float, default=1.5, help="seconds of a round, for the capacity; 0: leave it out")
    parser.add_argument("--most", type=int, default=48, help="agents to try at most")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--kv-memory", type=int, default=600, help="MiB of each arm's pool")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two agents, once, results to .cache/benchmarks")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.agents, arguments.repeats, arguments.most = [2], 1, 2
    conditions = {key: value for key, value in vars(arguments).items() if key not in ("quick", "arms")}
    results = Results("rounds", conditions, merge=False, quick=arguments.quick)
    results.data["arms"] = {}
    arms = [Arm(name, arguments) for name in arguments.arms]
    for agents in arguments.agents:
        found = measure(agents, arms, arguments)
        results.data["arms"][str(agents)] = found
        results.save()
        base = found.get("serial") or found[arms[0].name]
        print(f"{agents} agents")
        for name, values in found.items():
            ratio = statistics.median(a / b for a, b in zip(base["prefill"], values["prefill"], strict=True))
            print(
                f"  {name:20} prefill {statistics.median(values['prefill']) * 1e3:8.1f} ms  serial/this {ratio:5.2f}"
                f"  round {statistics.median(values['round']) * 1e3:8.1f} ms  blocks {values['blocks'][-1]:6.0f}"
            )
    if {"recompute", "collective"} <= set(arguments.arms):
        found = plain([arm for arm in arms if arm.name in ("recompute", "collective")], arguments)
        results.data["arms"]["plain"] = found
        results.save()
        taken = found["seconds"]
        ratio = statistics.median(b / a for a, b in zip(taken["recompute"], taken["collective"], strict=True))
        print(f"without rounds: {ratio:.3f}x the time, the same tokens: {found['same_tokens']}")
    if arguments.slo:
        within: dict[str, int] = {}
        results.data["arms"]["capacity"] = within
        for arm in arms:
            within[arm.name] = capacity(arm, arguments)
            results.save()
            print(f"{arm.name:20} {within[arm.name]} agents within {arguments.slo:g} s")


if __name__ == "__main__":
    main()
