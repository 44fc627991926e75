"""llama.cpp through its C API: all prompts in one logical batch, then one token a sequence a step, arg-max."""

from __future__ import annotations

from typing import Any

from benchmarks.adapters.protocol import Generate, Generated, serve

LOGICAL_BATCH, PHYSICAL_BATCH = 4096, 512


def load(settings: dict[str, Any]) -> tuple[Generate, dict[str, Any]]:
    import llama_cpp as lib

    engine = LlamaCpp(settings)
    return engine.generate, {
        "version": f"llama-cpp-python {lib.__version__}",
        "settings": f"native build, n_batch {LOGICAL_BATCH}, n_ubatch {PHYSICAL_BATCH}, KV a sequence in "
        f"{settings.get('kv', 'f16')}, else defaults",
    }


class LlamaCpp:
    """The model, and a context a batch. With `copy_prefill`, only the first prompt is computed; the others get copies
    of its keys and values in memory of their own, and a context is kept while prompts begin as its own does."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import llama_cpp as lib

        self.lib = lib
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(settings["model"].encode(), lib.llama_model_default_params())
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.batch = lib.llama_batch_init(LOGICAL_BATCH, 0, 1)
        self.threads = settings["threads"]
        self.kv = {"f16": lib.GGML_TYPE_F16, "q8_0": lib.GGML_TYPE_Q8_0}[settings.get("kv", "f16")]
        self.copy_prefill = settings.get("copy_prefill", False)
        self.kept: tuple[list[int], Any] | None = None

    def generate(self, prompts: list[list[int]], output_tokens: int) -> Generated:
        if self.copy_prefill:
            made, context = self._first_tokens_by_copy(prompts, output_tokens)
        else:
            context = self._open_context(len(prompts), max(map(len, prompts)) + output_tokens)
            made = Generated(len(prompts))  # the clock starts with the context made: a server has its own long since
            self._first_tokens(context, prompts, made)
        for step in range(output_tokens - 1):
            self._step(context, [one[-1] for one in made.tokens], [len(one) + step for one in prompts], made)
        if not self.copy_prefill:
            self.lib.llama_free(context)
        return made

    def _open_context(self, sequences: int, length: int) -> Any:
        params = self.lib.llama_context_default_params()
        params.n_ctx = sequences * (-(-length // 256) * 256)  # it rounds each sequence's share up to this
        params.n_seq_max, params.kv_unified = sequences, False
        params.n_batch, params.n_ubatch = LOGICAL_BATCH, PHYSICAL_BATCH
        params.n_threads = params.n_threads_batch = self.threads
        params.type_k = params.type_v = self.kv
        return self.lib.llama_init_from_model(self.model, params)

    def _first_tokens(self, context: Any, prompts: list[list[int]], made: Generated) -> None:
        """Compute all prompts, as many tokens at once as fit."""
        rows: dict[int, int] = {}
        self.batch.n_tokens = 0
        for sequence, prompt in enumerate(prompts):
            for position, token in enumerate(prompt):
                last = position == len(prompt) - 1
                if last:
                    rows[sequence] = self.batch.n_tokens
                self._put(token, position, sequence, last)
                if self.batch.n_tokens == LOGICAL_BATCH or (last and sequence == len(prompts) - 1):
                    self._decode(context)
                    for done, row in rows.items():
                        made.add(done, [self._choose(context, row)])
                    rows, self.batch.n_tokens = {}, 0

    def _first_tokens_by_copy(self, prompts: list[list[int]], output_tokens: int) -> tuple[Generated, Any]:
        """All but the last token of the first prompt once, copied to every sequence; then a step for the last ones."""
        lib, prompt = self.lib, prompts[0]
        if self.kept is None or self.kept[0][: len(prompt)] != prompt:
            if self.kept is not None:
                lib.llama_free(self.kept[1])
            context = self._open_context(len(prompts), len(prompt) + output_tokens)
            self._first_tokens(context, [prompt[:-1]], Generated(1))
            for sequence in range(1, len(prompts)):
                lib.llama_memory_seq_cp(lib.llama_get_memory(context), 0, sequence, -1, -1)
            self.kept = (prompt, context)
        context = self.kept[1]
        for sequence in range(len(prompts)):
            lib.llama_memory_seq_rm(lib.llama_get_memory(context), sequence, len(prompt) - 1, -1)
        made = Generated(len(prompts))
        self._step(context, [prompt[-1]] * len(prompts), [len(prompt) - 1] * len(prompts), made)
        return made, context

    def _step(self, context: Any, tokens: list[int], positions: list[int], made: Generated) -> None:
        """One token of every sequence in, the next one out."""
        self.batch.n_tokens = 0
        for sequence, (token, position) in enumerate(zip(tokens, positions, strict=True)):
            self._put(token, position, sequence, True)
        self._decode(context)
        for sequence in range(len(tokens)):
            made.add(sequence, [self._choose(context, sequence)])

    def _put(self, token: int, position: int, sequence: int, wanted: bool) -> None:
        batch = self.batch
        row = batch.n_tokens
        batch.token[row], batch.pos[row], batch.logits[row] = token, position, wanted
        batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
        batch.n_tokens = row + 1

    def _decode(self, context: Any) -> None:
        if status := self.lib.llama_decode(context, self.batch):
            raise RuntimeError(f"llama_decode returned {status}")

    def _choose(self, context: Any, row: int) -> int:
        import numpy as np

        logits = np.ctypeslib.as_array(self.lib.llama_get_logits_ith(context, row), (self.vocabulary,))
        return int(logits.argmax())


if __name__ == "__main__":
    serve(load)
