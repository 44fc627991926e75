"""kvarn's own engine, in process."""

from __future__ import annotations

from typing import Any

from benchmarks.adapters.protocol import Generate, Generated, serve


def load(settings: dict[str, Any]) -> tuple[Generate, dict[str, str]]:
    import kvarn
    from kvarn.serving.offline import OfflineEngine
    from kvarn.serving.sampling.params import SamplingParams

    engine = OfflineEngine.load(settings["model"], dtype="bfloat16", threads=settings["threads"])

    def generate(prompts: list[list[int]], output_tokens: int) -> Generated:
        made = Generated(len(prompts))
        params = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
        for index, one in enumerate(engine.generate(prompts, params)):
            made.tokens[index], made.times[index] = one.token_ids, one.token_times
        return made

    return generate, {"version": kvarn.__version__, "precision": "bf16", "settings": "defaults"}


if __name__ == "__main__":
    serve(load)
