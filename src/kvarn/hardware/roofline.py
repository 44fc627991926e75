"""How long one forward pass takes on an accelerator: what it computes in, seconds out.

    step = overhead + layers + output layer + attention

    layers        read every weight once; operations of all tokens
    output layer  read it once; operations of the sampled tokens
    attention     of each sequence: read its keys and values; operations of its queries with them; with several
                  tokens, what a call for it alone takes

The first two take the longer of their two times where the device reads and multiplies at once, their sum where it takes
turns (`Accelerator.overlap`); attention the longer one. Prefill is bound by operations and decode by what it reads; a
mixed batch shares the reading of the weights, which is why prompts beside decode rows cost less than apart. Every
term is zero without work and grows with it, so more tokens are never cheaper. Left out, being small: activations,
norms, and what is written to the KV cache.

Source: S. Williams et al., Roofline (CACM 2009).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvarn.hardware.accelerators import Accelerator
from kvarn.hardware.models import BYTES_PER_WEIGHT, ModelShape

_SCALE_BYTES = 4
"""Of each row of an int8 cache."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one forward pass computes."""

    decodes: int = 0
    """Sequences that compute one token."""
    decode_context: int = 0
    """Tokens whose keys and values those look at, their own included, summed over them."""
    chunks: tuple[tuple[int, int], ...] = ()
    """(tokens with keys and values already, tokens to compute) of every sequence that computes more than one token."""
    sampled: int = 0
    """Tokens that go through the output layer."""

    @classmethod
    def of(cls, rows: Iterable[tuple[int, int]], sampled: int) -> Work:
        """From (tokens already computed, tokens to compute) of every sequence."""
        rows = list(rows)
        singles = [past + 1 for past, count in rows if count == 1]
        return cls(len(singles), sum(singles), tuple((past, count) for past, count in rows if count > 1), sampled)

    @property
    def tokens(self) -> int:
        return self.decodes + sum(count for _, count in self.chunks)

    @property
    def sequences(self) -> int:
        return self.decodes + len(self.chunks)


class Roofline:
    """Times of one model on one accelerator; `weight_bytes` and `kv_bytes` are those of one element."""

    def __init__(
        self, accelerator: Accelerator, model: ModelShape, *, weight_bytes: float = 2.0, kv_bytes: float = 2.0
    ) -> None:
        self.accelerator = accelerator
        self.model = model
        self.weight_bytes = weight_bytes
        self.kv_bytes = kv_bytes
        reading = weight_bytes / (accelerator.memory_bandwidth * accelerator.weights_share)
        computing = 1.0 / (accelerator.flops * accelerator.compute_share)
        self._layers_read = model.layer_weights * reading
        self._layers_token = model.linear_flops * computing
        self._head_read = model.head_weights * reading
        self._head_token = model.head_flops * computing
        self._kv_token = model.kv_bytes_per_token(kv_bytes) / (accelerator.memory_bandwidth * accelerator.kv_share)
        self._pair = model.attention_flops / (accelerator.flops * accelerator.attention_share)
        self._decode_token = max(self._kv_token, self._pair)

    @classmethod
    def of(cls, accelerator: Accelerator, model: ModelShape, precision: str, kv_dtype: str = "auto") -> Roofline:
        """With the element sizes that kvarn's settings of these names mean; "auto" weights are bfloat16.

        An "auto" cache is int8 with weights of 8 or 4 bits, and otherwise as wide as activations.
        """
        weight_bytes = BYTES_PER_WEIGHT["bfloat16" if precision == "auto" else precision]
        kv_bytes = 4.0 if precision == "float32" else 2.0
        if kv_dtype == "int8" or (kv_dtype == "auto" and weight_bytes < 2.0):
            kv_bytes = 1.0 + _SCALE_BYTES / model.head_dim
        return cls(accelerator, model, weight_bytes=weight_bytes, kv_bytes=kv_bytes)

    @property
    def reading_share(self) -> float:
        """Of the time that a decode row's attention takes, what would be spared if it need not read."""
        return 1.0 - self._pair / self._decode_token

    def step_seconds(self, work: Work) -> float:
        """Seconds of one step; nothing to compute takes none."""
        return self.seconds(work.decodes, work.decode_context, work.chunks, work.sampled)

    def seconds(self, decodes: int, decode_context: int, chunks: Iterable[tuple[int, int]], sampled: int) -> float:
        """`step_seconds` of the `Work` with these fields, without making one."""
        tokens, sequences = decodes, decodes
        attention, chunk_seconds = decode_context * self._decode_token, self.accelerator.chunk_seconds
        for past, count in chunks:
            tokens += count
            sequences += 1
            attention += chunk_seconds + max((past + count) * self._kv_token, query_key_pairs(past, count) * self._pair)
        if not tokens:
            return 0.0
        accelerator = self.accelerator
        return (
            accelerator.step_seconds
            + sequences * accelerator.sequence_seconds
            + self._join(self._layers_read, tokens * self._layers_token)
            + (self._join(self._head_read, sampled * self._head_token) if sampled else 0.0)
            + attention
        )

    def _join(self, reading: float, computing: float) -> float:
        return max(reading, computing) if self.accelerator.overlap else reading + computing

    def kv_tokens(self, memory_fraction: float) -> int:
        """Tokens whose KV fits beside the weights in this share of the memory (SGLang's mem-fraction-static)."""
        room = self.accelerator.memory_bytes * memory_fraction - self.model.num_weights * self.weight_bytes
        return max(0, int(room // self.model.kv_bytes_per_token(self.kv_bytes)))


def query_key_pairs(past: int, count: int) -> int:
    """Pairs that causal attention looks at: `count` tokens, each with the `past` ones, those before it and itself."""
    return count * past + count * (count + 1) // 2
