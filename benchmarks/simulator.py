"""The simulator against the real engine: `kvarn calibrate` once, then the same traces served and simulated.

    python -m benchmarks.simulator                         calibrates, serves steady traces: about six minutes
    python -m benchmarks.simulator --profile FILE          with a profile made before

Bursts are those of `benchmarks.streaming`, which has to be run before: what its servers of kvarn did is compared with
simulations of the same requests. Steady traces (Poisson arrivals, half of what the machine can do) are served here,
under the same KV cache. A simulation is warmed up as a server is, and its requests arrive as far apart as a client
sends them. Results: `benchmarks/results/simulator.*`, errors of time to first token and makespan.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import peers, render, results, streaming
from benchmarks.results import Results
from benchmarks.servers import LOGS, ROOT, running
from benchmarks.streaming_tables import FIGURES, bursts_of
from benchmarks.tables import good

from kvarn.hardware.accelerators import load_accelerator
from kvarn.hardware.models import load_model_shape
from kvarn.serving.config import EngineConfig
from kvarn.simulation import runner
from kvarn.simulation.assemble import simulated_engine
from kvarn.simulation.report import Report, summarize
from kvarn.simulation.workloads import Poisson, RequestSpec, with_arrivals

POLICIES = ("fcfs", "streaming")
COMPARED = ("TTFT P50 s", "TTFT P99 s", "makespan s")
_SENT_APART = 1e-3
"""Seconds between two requests of a burst, as the client sends them."""
_WARM_UP = 15.0
"""Seconds of virtual time for each request of the warm-up."""


def simulate(specs: list[RequestSpec], policy: str, profile: Path, kv_tokens: int) -> Report:
    """What `kvarn simulate` says of this workload after the warm-up of a server."""
    shape, device = load_model_shape("smollm2"), load_accelerator(str(profile))
    config = EngineConfig(
        precision="bfloat16",
        policy=policy,  # type: ignore[arg-type]
        kv_memory_bytes=streaming.kv_bytes(kv_tokens),
        speculation="off",
    )
    start = 2 * _WARM_UP
    warm_up = [replace(specs[0], arrival=number * _WARM_UP) for number in range(2)]
    main = [replace(spec, arrival=start + spec.arrival + number * _SENT_APART) for number, spec in enumerate(specs)]
    done = runner.run(simulated_engine(config, device, shape), [*warm_up, *main]).records[len(warm_up) :]
    sent = [replace(record, arrival=start + spec.arrival) for record, spec in zip(done, specs, strict=True)]
    return summarize(sent)


def compare(trace: str, policy: str, seed: int, real: dict[str, Any], simulated: Report) -> dict[str, Any]:
    """One row of the results: both figures and their errors."""
    model = {**simulated.to_json(), "counted": {"preemptions": 0}}
    both = {title: (FIGURES[title](real), FIGURES[title](model)) for title in COMPARED}
    errors = {title: ours / theirs - 1 for title, (theirs, ours) in both.items()}
    print(f"{policy:10} {trace:8} seed {seed}: ", *(f"{title} {error:+.1%}" for title, error in errors.items()))
    return {"policy": policy, "trace": trace, "seed": seed, "errors": errors, "real_and_simulated": both}


def steady(arguments: argparse.Namespace, seed: int) -> list[RequestSpec]:
    """The requests of the burst of this seed, by a Poisson process."""
    return with_arrivals(streaming.workload(arguments, seed), Poisson(arguments.rate), seed=seed)


def served(arguments: argparse.Namespace, tokens: int) -> Iterator[tuple[str, int, list[RequestSpec], dict[str, Any]]]:
    """(policy, seed, workload, report as JSON) of every steady trace that is served now."""
    servers = streaming.contenders(tokens)
    for seed in range(arguments.seeds):
        for policy in POLICIES:
            name = f"kvarn-{policy}"
            with running(name, servers[name], arguments.threads) as server:
                specs = steady(arguments, seed)
                report = streaming.burst(name, server, arguments, seed, specs)
            yield policy, seed, specs, report


def main() -> None:
    parser = streaming.parser(__doc__)
    parser.add_argument("--profile", type=Path, help="made by kvarn calibrate (default: one is made now)")
    parser.add_argument("--rate", type=float, default=1.2, help="requests/s of a steady trace (default 1.2)")
    parser.add_argument("--seeds", type=int, default=2, help="steady traces (default 2)")
    arguments = streaming.parsed(parser)
    tokens = streaming.pool_tokens(arguments)
    profile = arguments.profile or LOGS / "profile.toml"
    if arguments.profile is None:
        calibrate = ["-m", "kvarn.cli.main", "calibrate", "smollm2", "--precision", "bfloat16", "--output"]
        subprocess.run([str(peers.python_of("kvarn")), *calibrate, str(profile)], cwd=ROOT, check=True)
    found = Results("simulator", {**streaming.conditions(arguments), "rate": arguments.rate}, merge=False,
                    quick=arguments.quick)  # fmt: skip
    rows = found.data["rows"] = []
    bursts = json.loads((results.FOLDER / "streaming.json").read_text())
    if bursts["conditions"] != streaming.conditions(arguments):
        raise SystemExit("streaming.json was made under other conditions; run benchmarks.streaming first")
    for policy in POLICIES:
        for one in bursts_of(good(bursts).get(f"kvarn-{policy}", [])):
            specs = streaming.workload(arguments, one["seed"])
            rows.append(compare("burst", policy, one["seed"], one, simulate(specs, policy, profile, tokens)))
    for policy, seed, specs, report in served(arguments, tokens):
        rows.append(compare("Poisson", policy, seed, report, simulate(specs, policy, profile, tokens)))
        found.save()
    found.save()
    render.render(found.path)


if __name__ == "__main__":
    main()
