"""kvarn's own engine, in process."""

from __future__ import annotations

from typing import Any

from benchmarks.adapters.protocol import Generate, Generated, serve


def load(settings: dict[str, Any]) -> tuple[Generate, dict[str, Any]]:
    import kvarn
    from kvarn.serving.offline import OfflineEngine
    from kvarn.serving.sampling.params import SamplingParams

    chosen = engine_settings(**{name: settings[name] for name in ("precision", "kv_dtype") if name in settings})
    limits = {"max_running": settings["max_running"]} if "max_running" in settings else {}
    engine = OfflineEngine.load(threads=settings["threads"], **chosen, **limits)

    def generate(prompts: list[list[int]], output_tokens: int) -> Generated:
        made = Generated(len(prompts))
        params = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
        for index, one in enumerate(engine.generate(prompts, params)):
            made.tokens[index], made.times[index] = one.token_ids, one.token_times
        return made

    shown = ", ".join(f"{name} {value}" for name, value in chosen.items())
    return generate, {"version": kvarn.__version__, "settings": f"{shown}, else defaults"}


def engine_settings(**wanted: str) -> dict[str, Any]:
    """EngineConfig's fields for a comparison: the precision wanted, and no speculation (prompts are random)."""
    return {"model": "smollm2", "speculation": "off", **wanted}


if __name__ == "__main__":
    serve(load)
