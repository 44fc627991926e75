"""llama.cpp through its C API: all prompts in one logical batch, then one token a sequence a step, arg-max."""

from __future__ import annotations

from typing import Any

from benchmarks.adapters.protocol import Generate, Generated, serve

LOGICAL_BATCH, PHYSICAL_BATCH = 4096, 512


def load(settings: dict[str, Any]) -> tuple[Generate, dict[str, str]]:
    import llama_cpp as lib
    import numpy as np

    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(settings["gguf_bf16"].encode(), lib.llama_model_default_params())
    vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    batch = lib.llama_batch_init(LOGICAL_BATCH, 0, 1)

    def open_context(sequences: int, length: int) -> Any:
        params = lib.llama_context_default_params()
        params.n_ctx = sequences * (-(-length // 256) * 256)  # it rounds each sequence's share up to this
        params.n_seq_max, params.kv_unified = sequences, False
        params.n_batch, params.n_ubatch = LOGICAL_BATCH, PHYSICAL_BATCH
        params.n_threads = params.n_threads_batch = settings["threads"]
        return lib.llama_init_from_model(model, params)

    def put(token: int, position: int, sequence: int, wanted: bool) -> None:
        row = batch.n_tokens
        batch.token[row], batch.pos[row], batch.logits[row] = token, position, wanted
        batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
        batch.n_tokens = row + 1

    def decode(context: Any) -> None:
        if status := lib.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode returned {status}")

    def choose(context: Any, row: int) -> int:
        return int(np.ctypeslib.as_array(lib.llama_get_logits_ith(context, row), (vocabulary,)).argmax())

    def generate(prompts: list[list[int]], output_tokens: int) -> Generated:
        context = open_context(len(prompts), max(map(len, prompts)) + output_tokens)
        made = Generated(len(prompts))  # the clock starts with the context made: a server has its own long since
        rows: dict[int, int] = {}
        batch.n_tokens = 0
        for sequence, prompt in enumerate(prompts):
            for position, token in enumerate(prompt):
                last = position == len(prompt) - 1
                if last:
                    rows[sequence] = batch.n_tokens
                put(token, position, sequence, last)
                if batch.n_tokens == LOGICAL_BATCH or (last and sequence == len(prompts) - 1):
                    decode(context)
                    for done, row in rows.items():
                        made.add(done, [choose(context, row)])
                    rows, batch.n_tokens = {}, 0
        for step in range(output_tokens - 1):
            batch.n_tokens = 0
            for sequence, prompt in enumerate(prompts):
                put(made.tokens[sequence][-1], len(prompt) + step, sequence, True)
            decode(context)
            for sequence in range(len(prompts)):
                made.add(sequence, [choose(context, sequence)])
        lib.llama_free(context)
        return made

    return generate, {
        "version": f"llama-cpp-python {lib.__version__}",
        "precision": "bf16",
        "settings": f"native build, n_batch {LOGICAL_BATCH}, n_ubatch {PHYSICAL_BATCH}, KV a sequence, else defaults",
    }


if __name__ == "__main__":
    serve(load)
