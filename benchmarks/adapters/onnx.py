"""ONNX Runtime GenAI on the int4 model that its own builder makes (int8 activations: its fastest setting)."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.adapters.protocol import Generate, Generated, serve


def load(settings: dict[str, Any]) -> tuple[Generate, dict[str, Any]]:
    import numpy as np
    import onnxruntime_genai as genai

    config = genai.Config(settings["model"])
    options = {"intra_op_num_threads": settings["threads"]}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    model = genai.Model(config)

    def generate(prompts: list[list[int]], output_tokens: int) -> Generated:
        params = genai.GeneratorParams(model)
        length = len(prompts[0]) + output_tokens
        params.set_search_options(
            batch_size=len(prompts), max_length=length, min_length=length, do_sample=False, num_beams=1
        )
        made = Generated(len(prompts))
        generator = genai.Generator(model, params)
        generator.append_tokens(np.array(prompts, dtype=np.int32))
        for _ in range(output_tokens):
            generator.generate_next_token()
            for index, token in enumerate(generator.get_next_tokens()):
                made.add(index, [token])
        return made

    return generate, {
        "version": genai.__version__,
        "settings": "int4 in blocks of 32, int8 activations (accuracy level 4)",
    }


if __name__ == "__main__":
    serve(load)
