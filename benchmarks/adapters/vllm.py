"""vLLM for CPUs, driven step by step through its engine class."""

from __future__ import annotations

import os
from typing import Any

from benchmarks.adapters.protocol import Generate, Generated, serve

KV_CACHE_GIB = 2


def load(settings: dict[str, Any]) -> tuple[Generate, dict[str, Any]]:
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{settings['threads'] - 1}",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    import vllm
    from vllm.sampling_params import RequestOutputKind

    model = vllm.LLM(
        settings["model"], dtype="bfloat16", max_model_len=settings.get("context", 4096), max_num_seqs=64,
        disable_log_stats=True,
    )  # fmt: skip
    engine = model.llm_engine
    count = 0

    def generate(prompts: list[list[int]], output_tokens: int) -> Generated:
        nonlocal count
        params = vllm.SamplingParams(
            temperature=0.0, max_tokens=output_tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        made = Generated(len(prompts))
        places = {}
        for index, prompt in enumerate(prompts):
            count += 1
            places[str(count)] = index
            engine.add_request(str(count), {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                made.add(places[output.request_id], output.outputs[0].token_ids)
        return made

    return generate, {
        "version": vllm.__version__,
        "settings": f"max_num_seqs 64, {KV_CACHE_GIB} GiB of KV cache, else defaults",
    }


if __name__ == "__main__":
    serve(load)
