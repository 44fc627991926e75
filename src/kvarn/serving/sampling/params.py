"""What a request asks of the sampler: one frozen value, validated on arrival, sent between processes as is."""

from __future__ import annotations

import msgspec

from kvarn.errors import RequestError

MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_GRAMMAR_LENGTH = 2**18
"""Characters. Grammars compile between two steps of the engine: a huge one would stall everybody."""
UNSET_SEED = -1


class Grammar(msgspec.Struct, frozen=True):
    """A constraint on the output text. `kind` is one of "json_object", "json_schema", "regex", "lark"."""

    kind: str
    source: str = ""
    """JSON schema (as JSON text), regular expression or Lark grammar; empty for "json_object"."""


class SamplingParams(msgspec.Struct, frozen=True):
    """How to turn logits into tokens, and when to stop. `temperature` 0 means greedy."""

    temperature: float = 1.0
    top_k: int = 0
    """Keep only the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    min_p: float = 0.0
    """Drop tokens less likely than min_p times the most likely one."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = UNSET_SEED
    """64-bit; the draw for output token i depends on (seed, i) alone. UNSET_SEED: the engine picks one."""
    max_tokens: int = 16
    min_tokens: int = 0
    """No end-of-sequence or stop token before this many output tokens."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: dict[int, float] = {}
    logprobs: int = -1
    """Number of alternatives to report beside the chosen token's logprob; -1 reports nothing, 0 the chosen only."""
    grammar: Grammar | None = None

    def validate(self, vocab_size: int) -> None:
        """Raise RequestError naming the first field whose value is impossible."""
        for field, low, high in _RANGES:
            value = getattr(self, field)
            if not low <= value <= high:  # also catches NaN
                raise RequestError(f"{field} is {value}; expected a number from {low:g} to {high:g}", field=field)
        if self.max_tokens < 1:
            raise RequestError(f"max_tokens is {self.max_tokens}; expected at least 1", field="max_tokens")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens}; expected 0 to max_tokens ({self.max_tokens})", field="min_tokens"
            )
        if not self.top_k >= 0:
            raise RequestError(f"top_k is {self.top_k}; expected 0 (off) or more", field="top_k")
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise RequestError(
                f"logit_bias has {len(self.logit_bias)} entries; at most {MAX_LOGIT_BIAS}", field="logit_bias"
            )
        for field, ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            for token in ids:
                if not 0 <= token < vocab_size:
                    raise RequestError(
                        f"{field} names token {token}; the vocabulary is 0 to {vocab_size - 1}", field=field
                    )
        if self.grammar is not None and len(self.grammar.source) > MAX_GRAMMAR_LENGTH:
            raise RequestError(
                f"the schema or grammar has {len(self.grammar.source)} characters; at most {MAX_GRAMMAR_LENGTH}",
                field="response_format",
            )
        for token, bias in self.logit_bias.items():
            if not -100 <= bias <= 100:
                raise RequestError(f"logit_bias of token {token} is {bias}; expected -100 to 100", field="logit_bias")


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("temperature", 0.0, 2.0),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
    ("repetition_penalty", 1e-2, 10.0),
    ("seed", -(2**63), 2**63 - 1),
    ("logprobs", -1, MAX_LOGPROBS),
)
