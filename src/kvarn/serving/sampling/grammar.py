"""Constrained decoding: grammars in, one bit mask of allowed tokens per request and step out.

llguidance does the parsing. A `GrammarFactory` holds what depends on the tokenizer alone and a cache of
compiled grammars; a `GrammarMatcher` is one request's place in its grammar. A matcher moves only forward, one
sampled token at a time, so a request that is preempted and recomputed just goes on with its own. llguidance and
its view of the tokenizer are loaded when the first grammar arrives: most servers never see one.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvarn.errors import RequestError
from kvarn.serving.sampling.params import Grammar

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

_CACHED_GRAMMARS = 256
_FIELD = "response_format"

# Small models babble white space for ever where the grammar lets them: between JSON tokens there may be at most
# one line break and indentation of a sensible depth.
_JSON_OPTIONS = {"whitespace_flexible": True, "whitespace_pattern": r"( |\n {0,16})?"}


class GrammarMatcher:
    """One request's place in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def done(self) -> bool:
        """True when the text is complete and nothing but end-of-sequence may follow, or it has followed."""
        return bool(self._matcher.is_stopped())

    @property
    def error(self) -> str | None:
        """Why the grammar cannot go on (a limit of the parser was hit, a token outside the mask came), else None."""
        return f"the grammar cannot go on: {_reason(self._matcher.get_error())}" if self._matcher.is_error() else None

    def advance(self, token: int) -> None:
        """Move past one sampled token. A token that the mask forbids leaves the matcher in `error`."""
        self._matcher.consume_token(token)


class GrammarFactory:
    """Compiles grammars for one tokenizer and computes masks for its matchers.

    `tokenizer_json_path` is a Hugging Face `tokenizer.json`, `eos_token` the id that ends a text, `vocab_size` the
    width of the logits, which may exceed the tokenizer's (padded embeddings): ids beyond it are never allowed.
    `compile` may be called from any thread.
    """

    def __init__(self, tokenizer_json_path: Path, eos_token: int, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._path = tokenizer_json_path
        self._eos_token = eos_token
        self._tokenizer: LLTokenizer | None = None
        self._executor: LLExecutor | None = None
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, grammar: Grammar) -> GrammarMatcher:
        """A matcher at the start of `grammar`. RequestError (field "response_format") says why it cannot be used."""
        with self._lock:
            compiled = self._compiled.pop(grammar, None)
            if compiled is None:
                compiled = self._build(grammar)
            self._compiled[grammar] = compiled
            if len(self._compiled) > _CACHED_GRAMMARS:
                self._compiled.popitem(last=False)
            return GrammarMatcher(compiled.deep_copy())

    def allowed(self, matchers: list[GrammarMatcher]) -> NDArray[np.uint8]:
        """Tokens that may come next: [len(matchers), vocab_size], 1 where allowed, at least one a row."""
        tokenizer = self._load_tokenizer()
        words = np.empty((len(matchers), (tokenizer.vocab_size + 31) // 32), dtype=np.int32)
        row_bytes = words.shape[1] * words.itemsize
        if len(matchers) == 1:
            matchers[0]._matcher.unsafe_compute_mask_ptr(words.ctypes.data, row_bytes)
        else:
            work = [(each._matcher, row) for row, each in enumerate(matchers)]
            self._load_executor().unsafe_compute_mask_ptr(work, words.ctypes.data, row_bytes, len(matchers))
        bits = words.astype("<i4", copy=False).view(np.uint8)  # bit t of a row is token t only in this byte order
        return np.unpackbits(bits, axis=1, count=self.vocab_size, bitorder="little")

    def _build(self, grammar: Grammar) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        tokenizer = self._load_tokenizer()
        try:
            source = _to_llguidance(grammar)
        except ValueError as error:  # nested too deeply for llguidance's parser
            raise _unusable(grammar, str(error)) from error
        # Verbose errors would put the parser's state, and with it other people's schemas, into messages and logs.
        matcher = LLMatcher(tokenizer, source, log_level=0, limits=LLParserLimits(verbose_errors=False))
        if matcher.is_error():
            raise _unusable(grammar, matcher.get_error())
        # A grammar without a single text (a schema that only refers to itself) shows when it is first used.
        probe = matcher.deep_copy()
        probe.compute_bitmask()
        if probe.is_error():
            raise _unusable(grammar, f"nothing satisfies it ({_reason(probe.get_error())})")
        return matcher

    def _load_tokenizer(self) -> LLTokenizer:
        if self._tokenizer is None:
            from llguidance import LLTokenizer

            source = self._path.read_text(encoding="utf-8")
            slices = LLTokenizer.json_slices()
            try:
                tokenizer = LLTokenizer(source, n_vocab=self.vocab_size, eos_token=self._eos_token, slices=slices)
            except ValueError:  # a tokenizer with more entries than the model has logits: the surplus is cut from masks
                tokenizer = LLTokenizer(source, eos_token=self._eos_token, slices=slices)
            self._tokenizer = tokenizer
        return self._tokenizer

    def _load_executor(self) -> LLExecutor:
        if self._executor is None:
            from llguidance import LLExecutor

            self._executor = LLExecutor()
        return self._executor


def _to_llguidance(grammar: Grammar) -> str:
    """The grammar in llguidance's own notation."""
    from llguidance import LLMatcher

    if grammar.kind == "json_object":
        return str(LLMatcher.grammar_from_json_schema('{"type": "object"}', overrides=_JSON_OPTIONS))
    if grammar.kind == "json_schema":
        return str(LLMatcher.grammar_from_json_schema(_parse_schema(grammar.source), overrides=_JSON_OPTIONS))
    if grammar.kind == "regex":
        return str(LLMatcher.grammar_from_regex(grammar.source))
    if grammar.kind == "lark":
        return str(LLMatcher.grammar_from_lark(grammar.source))
    raise RequestError(
        f'grammar kind is "{grammar.kind}"; expected json_object, json_schema, regex or lark', field=_FIELD
    )


def _parse_schema(source: str) -> str:
    try:
        schema: Any = json.loads(source)
    except ValueError as error:
        raise RequestError(f"the JSON schema is not JSON: {error}", field=_FIELD) from error
    if not isinstance(schema, dict | bool):
        raise RequestError(f"the JSON schema is a {type(schema).__name__}; expected an object", field=_FIELD)
    return json.dumps(schema if isinstance(schema, dict) else ({} if schema else {"not": {}}))


def _unusable(grammar: Grammar, message: str) -> RequestError:
    return RequestError(
        f"the {grammar.kind} grammar cannot be used: {_reason(message)}; correct it or leave out what is not supported",
        field=_FIELD,
    )


def _reason(message: str) -> str:
    """llguidance's message on one line."""
    return " ".join(message.split()) or "no reason given"
