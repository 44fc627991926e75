"""Any other causal LM of transformers as a `Decoder`: its own model code, with attention over kvarn's paged KV memory.

transformers calls attention through a table of functions; ours writes keys and values into the pool and reads them back
through the block tables. A model fits when attention is all the state it keeps and every layer attends through that
table; loading finds out by tracing one pass, then by comparing a short paged pass with the model's own eager one.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from kvarn.errors import ModelError
from kvarn.kernels import ops
from kvarn.models.config import eos_tokens
from kvarn.models.sources import ModelFiles
from kvarn.models.spec import ForwardBatch, KVMemory, ModelSpec

_ATTENTION: Final = "kvarn_paged"
_CHECK_TOKENS: Final = 12
"""Length of each of the two sequences that loading compares."""
_CHECK_SIMILARITY: Final = {torch.float32: (0.0, 0.9999), torch.bfloat16: (0.5, 0.97)}
"""(quantile of rows, least cosine there) between paged and eager logits. A wrong position, mask or scale shows in all
rows; in bfloat16 single rows may differ honestly, where rounding sends a token to another expert."""


@dataclass(frozen=True, slots=True)
class _Shape:
    """What one layer's attention is called with."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int


@dataclass(slots=True)
class _Step:
    """One forward pass in progress. Layers are told apart by the order of their calls."""

    batch: ForwardBatch | None = None
    """None while tracing: attention then notes shapes and answers zeros."""
    kv: KVMemory | None = None
    calls: int = 0
    shapes: list[_Shape] = field(default_factory=list)
    unsupported: set[str] = field(default_factory=set)


_step: ContextVar[_Step] = ContextVar("kvarn_attention_step")


class TransformersDecoder:
    """See `kvarn.models.spec.Decoder`. Made by `load`."""

    capturable = False  # what a model of transformers does with its tensors is not ours to promise
    shares_views = False  # nor how it rotates its queries

    def __init__(self, model: Any, spec: ModelSpec) -> None:
        self.spec = spec
        self._model = model
        self._keeps_rows = "logits_to_keep" in inspect.signature(model.forward).parameters

    @classmethod
    def load(
        cls, files: ModelFiles, config: dict[str, Any], dtype: torch.dtype, device: torch.device
    ) -> TransformersDecoder:
        """Load and check the model in `files`. Raises ModelError when it cannot run over paged KV memory."""
        model = _load_model(files, dtype).to(device).eval()
        shape, layers = _trace(model, files.name)
        text = model.config.get_text_config()
        spec = ModelSpec(
            name=files.name,
            architecture=type(model).__name__,
            num_layers=layers,
            hidden_size=int(text.hidden_size),
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            vocab_size=int(text.vocab_size),
            max_context=_max_context(text, files.name),
            eos_tokens=eos_tokens(files.folder, config),
            dtype=dtype,
            precision=str(dtype).removeprefix("torch."),
        )
        decoder = cls(model, spec)
        _check_against_eager(decoder)
        return decoder

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, kv: KVMemory) -> torch.Tensor:
        if batch.views is not None:
            raise ModelError(f"{self.spec.name} ({self.spec.architecture}) cannot share KV by views; give it copies")
        inputs = {"input_ids": batch.tokens[None], "position_ids": batch.positions[None].long(), "use_cache": False}
        with _running(_Step(batch, kv)):
            if self._keeps_rows:
                logits: torch.Tensor = self._model(**inputs, logits_to_keep=batch.logit_rows).logits[0]
                return logits
            every_row: torch.Tensor = self._model(**inputs).logits[0]
            return every_row[batch.logit_rows]

    @torch.inference_mode()
    def eager_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [T, vocab_size] of one sequence [T] by the model's own attention: what `forward` must agree with."""
        self._model.set_attn_implementation("eager")
        try:
            logits: torch.Tensor = self._model(input_ids=tokens[None], use_cache=False).logits[0]
        finally:
            self._model.set_attn_implementation(_ATTENTION)
        return logits


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function over the step in progress.

    query [1, heads, T, D]; key [1, kv heads, T, D]; value [1, kv heads, T, Dv] with Dv <= D (padded in the pool).
    The mask is ignored: positions say what a row may see. Gives [1, T, heads, Dv].
    """
    step = _step.get()
    if step.batch is None or step.kv is None:
        step.shapes.append(_Shape(query.shape[1], key.shape[1], key.shape[3], value.shape[3]))
        step.unsupported |= {name for name in ("position_bias", "alibi", "head_mask") if kwargs.get(name) is not None}
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None
    head_dim, value_dim = key.shape[3], value.shape[3]
    if value_dim < head_dim:
        value = torch.nn.functional.pad(value, (0, head_dim - value_dim))
    pages = step.kv.layer(step.calls)
    step.calls += 1
    batch = step.batch
    ops.write_cache(key[0].transpose(0, 1), value[0].transpose(0, 1), pages, batch.slots)
    output = ops.paged_attention(
        query[0].transpose(0, 1), pages, step.kv.slot_positions, batch.block_tables, batch.kv_slots, batch.query_starts,
        batch.positions, head_dim**-0.5 if scaling is None else scaling, sliding_window or 0, softcap or 0.0, s_aux,
    )  # fmt: skip
    return output[None, ..., :value_dim], None


@contextlib.contextmanager
def _running(step: _Step) -> Iterator[None]:
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


def _load_model(files: ModelFiles, dtype: torch.dtype) -> Any:
    import transformers
    from transformers.utils import logging

    transformers.AttentionInterface.register(_ATTENTION, paged_attention)
    logging.disable_progress_bar()
    load: Callable[..., Any] = transformers.AutoModelForCausalLM.from_pretrained
    try:
        model, report = load(
            files.folder, dtype=dtype, attn_implementation=_ATTENTION, local_files_only=True, output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
        )  # fmt: skip
    except Exception as error:  # from KeyError to bare Exception, by model family
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if _ATTENTION in reason:  # the model looks its attention up in a table of its own
            reason = "its code in transformers does not take its attention from outside, so it cannot be paged"
        raise ModelError(f"{files.name} cannot be loaded: {reason}") from error
    for problem in ("missing_keys", "mismatched_keys"):
        if names := sorted(map(str, report.get(problem) or ())):
            raise ModelError(
                f"{files.folder}: {problem.replace('_keys', ' tensors')}: {', '.join(names[:5])}; "
                "the files and config.json do not belong together"
            )
    return model


def _trace(model: Any, name: str) -> tuple[_Shape, int]:
    """The shape that all layers' attention has, and their number. Raises ModelError for what paged KV cannot hold."""
    step = _Step()
    device = next(model.parameters()).device
    tokens = torch.zeros(1, 2, dtype=torch.long, device=device)
    try:
        with _running(step), torch.inference_mode():
            model(input_ids=tokens, position_ids=torch.tensor([[0, 1]], device=device), use_cache=False)
    except Exception as error:  # a model that wants other inputs says so in its own way
        raise ModelError(f"{name} ({type(model).__name__}) is not a plain causal language model: {error}") from error
    layers = int(model.config.get_text_config().num_hidden_layers)
    if len(step.shapes) != layers:
        raise ModelError(
            f"{name} ({type(model).__name__}): {len(step.shapes)} of {layers} layers use attention that can be paged; "
            "the others keep another kind of state (recurrent, convolutional) or attend in their own way (ALiBi), "
            "which kvarn cannot serve"
        )
    if step.unsupported:
        raise ModelError(
            f"{name} biases its attention ({', '.join(sorted(step.unsupported))}), which kvarn cannot serve"
        )
    if len(set(step.shapes)) != 1:
        raise ModelError(
            f"{name}: its layers differ in heads or head size; one KV pool cannot hold them: {step.shapes}"
        )
    shape = step.shapes[0]
    if shape.value_dim > shape.head_dim or shape.head_dim % 8:
        raise ModelError(
            f"{name}: head sizes are {shape.head_dim} (key) and {shape.value_dim} (value); "
            "expected a multiple of 8 and values no wider than keys"
        )
    return shape, layers


def _max_context(config: Any, name: str) -> int:
    """Context length. Beyond its original context LongRoPE changes all frequencies, cached keys' too: stop there."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return int(rope["original_max_position_embeddings"])
    for key in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if getattr(config, key, None):
            return int(getattr(config, key))
    raise ModelError(f"{name}: config.json names no context length (max_position_embeddings)")


def _check_against_eager(decoder: TransformersDecoder) -> None:
    """Two short sequences in one paged batch against each alone through the model's own attention."""
    spec = decoder.spec
    device = next(decoder._model.parameters()).device
    kv = KVMemory(
        torch.zeros(2, spec.num_layers, 2, spec.num_kv_heads, 16, spec.head_dim, dtype=spec.dtype, device=device),
        torch.arange(16, dtype=torch.int32, device=device).repeat(2, 1),
    )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(spec.vocab_size, (2, _CHECK_TOKENS), generator=generator).to(device)
    positions = torch.arange(_CHECK_TOKENS, dtype=torch.int32, device=device)
    batch = ForwardBatch(
        tokens=tokens.flatten(),
        positions=positions.repeat(2),
        slots=torch.cat((positions, positions + 16)),
        block_tables=torch.tensor([[0], [1]], dtype=torch.int32, device=device),
        kv_slots=torch.full((2,), _CHECK_TOKENS, dtype=torch.int32, device=device),
        query_starts=torch.tensor([0, _CHECK_TOKENS, 2 * _CHECK_TOKENS], dtype=torch.int32, device=device),
        logit_rows=torch.arange(2 * _CHECK_TOKENS, device=device),
    )
    paged = decoder.forward(batch, kv).float()
    eager = torch.cat([decoder.eager_logits(row) for row in tokens]).float()
    quantile, least = _CHECK_SIMILARITY[spec.dtype]
    similarity = float(torch.nn.functional.cosine_similarity(paged, eager, dim=-1).quantile(quantile))
    if not similarity >= least:
        raise ModelError(
            f"{spec.name} ({spec.architecture}) gives other results over paged KV memory than by itself "
            f"(cosine {similarity:.4f}); its attention does something kvarn does not know, so it cannot be served"
        )
