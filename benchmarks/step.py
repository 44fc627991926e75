"""Where a decode step's time goes: the phases of the forward pass, and everything else (scheduling, packing, sampling).

    python -m benchmarks.step [--batches 1 16 32] [--repeats 5] [--precision int8] [--quick]

Greedy, 128 tokens in, 128 out; only steps in which every sequence decodes are counted. Results:
`benchmarks/results/step.json` and `.md`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks import machine, render, settings
from benchmarks.adapters.kvarn import engine_settings
from benchmarks.results import Results

from kvarn.bench.offline import random_prompts
from kvarn.serving.processors import wait_gently
from kvarn.serving.request import Request
from kvarn.serving.sampling.params import SamplingParams

if TYPE_CHECKING:
    import torch

    from kvarn.serving.offline import OfflineEngine

INPUT_TOKENS = OUTPUT_TOKENS = 128


def decode_seconds(
    offline: OfflineEngine, batch: int, run: int, phases: torch.Tensor | None = None
) -> tuple[float, float, int]:
    """Seconds of all decode steps of one batch, the part of them in the forward pass, and their number.

    `phases` [of the native forward pass] float64 has the seconds of each added to it.
    """
    engine = offline.engine
    params = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    prompts = random_prompts(batch, INPUT_TOKENS, (run + 1, batch))
    for i, prompt in enumerate(prompts):
        engine.add(Request.create(f"{run}-{batch}-{i}", prompt, params, arrival=engine.clock.now()))
    while engine.waiting or any(request.num_uncomputed > 1 for request in engine.running):
        engine.step()
    native = getattr(engine.executor.decoder, "native", None)
    if native is not None:
        native.seconds = phases
    steps, step_seconds = engine.counters.steps, engine.counters.step_seconds
    forward_seconds = engine.executor.forward_seconds
    while engine.has_work:
        engine.step()
    if native is not None:
        native.seconds = None
    return (
        engine.counters.step_seconds - step_seconds,
        engine.executor.forward_seconds - forward_seconds,
        engine.counters.steps - steps,
    )


def main() -> None:
    arguments = settings.alone(__doc__, batches=[1, 16, 32], quick_batch=4)
    wait_gently()
    import torch  # after it has been told how its threads wait

    from kvarn.kernels.llama import PHASES
    from kvarn.serving.offline import OfflineEngine

    offline = OfflineEngine.load(**engine_settings(precision=arguments.precision))
    decode_seconds(offline, max(arguments.batches), run=-1)  # warm-up
    conditions = {
        "repeats": arguments.repeats, "precision": arguments.precision, "input_tokens": INPUT_TOKENS,
        "output_tokens": OUTPUT_TOKENS,
    }  # fmt: skip
    results = Results("step", conditions, merge=False, quick=arguments.quick)
    rows: list[dict[str, Any]] = []
    for batch in arguments.batches:
        for run in range(arguments.repeats):
            load = machine.ForeignLoad()
            phases = torch.zeros(len(PHASES), dtype=torch.float64)
            step, forward, steps = decode_seconds(offline, batch, run, phases)
            rows.append({
                "batch": batch, "step_ms": step / steps * 1e3, "outside_share": 1 - forward / step,
                "foreign_cores": load.cores(),
                "phases_ms": dict(zip(PHASES, (phases / steps * 1e3).tolist(), strict=True)),
            })  # fmt: skip
            print(f"batch {batch:3}  step {rows[-1]['step_ms']:6.2f} ms  outside {rows[-1]['outside_share']:.1%}")
    results.data["rows"] = rows
    results.save()
    render.render(results.path)


if __name__ == "__main__":
    main()
