"""transformers' generate on the whole batch; a token's time is when the step's stopping rule is asked."""

from __future__ import annotations

import os
import time
from typing import Any

from benchmarks.adapters.protocol import Generate, Generated, serve


def load(settings: dict[str, Any]) -> tuple[Generate, dict[str, Any]]:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers

    torch.set_num_threads(settings["threads"])
    model = transformers.AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.bfloat16)

    def generate(prompts: list[list[int]], output_tokens: int) -> Generated:
        moments: list[float] = []

        def note(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            moments.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool)

        made = Generated(len(prompts))
        inputs = torch.tensor(prompts)
        with torch.inference_mode():
            outputs = model.generate(
                inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=output_tokens,
                eos_token_id=None, pad_token_id=0, stopping_criteria=transformers.StoppingCriteriaList([note]),
            )  # fmt: skip
        for index, row in enumerate(outputs[:, inputs.shape[1] :].tolist()):
            for token, moment in zip(row, moments, strict=True):
                made.add(index, [token], moment)
        return made

    return generate, {"version": transformers.__version__, "settings": "generate, SDPA attention"}


if __name__ == "__main__":
    serve(load)
