"""OpenVINO GenAI's continuous batching, driven step by step, on a GGUF file.

It reads f16 (not bf16) matrices and computes in bf16 when told to (`hint`); quantised ones it keeps as they are and
multiplies with int8 activations.
"""

from __future__ import annotations

from typing import Any

from benchmarks.adapters.protocol import Generate, Generated, serve


def load(settings: dict[str, Any]) -> tuple[Generate, dict[str, Any]]:
    import numpy as np
    import openvino
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.max_num_batched_tokens, scheduler.max_num_seqs = 2, 4096, 64
    scheduler.enable_prefix_caching = settings.get("share_prefixes", False)
    hints = {"INFERENCE_PRECISION_HINT": settings.get("hint", "bf16"), "INFERENCE_NUM_THREADS": settings["threads"]}
    pipeline = genai.ContinuousBatchingPipeline(settings["model"], scheduler, "CPU", hints)
    count = 0

    def generate(prompts: list[list[int]], output_tokens: int) -> Generated:
        nonlocal count
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = output_tokens, True, False
        made = Generated(len(prompts))
        handles = []
        for prompt in prompts:
            count += 1
            ids = openvino.Tensor(np.array([prompt], dtype=np.int64))
            handles.append(pipeline.add_request(count, ids, config))
        while pipeline.has_non_finished_requests():
            pipeline.step()
            for index, handle in enumerate(handles):
                if handle.can_read():
                    made.add(index, handle.read()[0].generated_ids)
        return made

    return generate, {
        "version": genai.__version__,
        "settings": "bf16 hint, max_num_batched_tokens 4096, max_num_seqs 64, 2 GiB of KV cache",
    }


if __name__ == "__main__":
    serve(load)
