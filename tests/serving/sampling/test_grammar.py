"""Constrained output with the bundled model's tokenizer: random logits, yet every text obeys its grammar."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from kvarn.errors import RequestError
from kvarn.serving.request import FinishReason, Request
from kvarn.serving.sampling.grammar import GrammarFactory
from kvarn.serving.sampling.params import Grammar
from kvarn.serving.sampling.sampler import Sampler

from .conftest import TOKENIZER_SIZE
from .making import EOS, make_request

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
        "active": {"type": "boolean"},
    },
    "required": ["name", "age", "tags", "active"],
    "additionalProperties": False,
}
JSON_SCHEMA = Grammar("json_schema", json.dumps(SCHEMA))


@pytest.fixture(scope="module")
def decode(tokenizer_path: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tokenizer_path))


def generate(grammars: GrammarFactory, requests: list[Request], seed: int = 0) -> list[FinishReason | None]:
    """Run the requests to their ends as the engine would, on random logits."""
    generator = torch.Generator().manual_seed(seed)
    sampler = Sampler(grammars.vocab_size, grammars)
    for request in requests:
        sampler.add(request)
    reasons: dict[str, FinishReason | None] = {}
    while running := [request for request in requests if request.id not in reasons]:
        logits = torch.randn(len(running), grammars.vocab_size, generator=generator) * 2
        for request, sampled in zip(running, sampler.sample(logits, running), strict=True):
            assert sampled.error is None
            reason = request.append(sampled.token)
            if reason is not None or sampled.grammar_done:
                reasons[request.id] = reason
    return [reasons[request.id] for request in requests]


def text_of(decode: Tokenizer, request: Request) -> str:
    tokens = request.tokens[request.prompt_length : request.num_tokens]
    return str(decode.decode(tokens.tolist(), skip_special_tokens=True))


def test_random_logits_under_a_schema_always_give_json_of_that_schema(
    grammars: GrammarFactory, decode: Tokenizer
) -> None:
    requests = [make_request(grammar=JSON_SCHEMA, seed=seed, top_p=0.99 if seed % 2 else 1.0) for seed in range(20)]
    generate(grammars, requests)
    for request in requests:
        value = json.loads(text_of(decode, request))
        assert list(value) == ["name", "age", "tags", "active"]
        assert len(value["name"]) <= 12
        assert isinstance(value["age"], int)
        assert 0 <= value["age"] <= 150
        assert len(value["tags"]) <= 3
        assert set(value["tags"]) <= {"red", "green", "blue"}
        assert isinstance(value["active"], bool)


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (Grammar("regex", r"[A-Z][a-z]{2,8} [0-9]{3}(\.[0-9]+)?!"), r"[A-Z][a-z]{2,8} [0-9]{3}(\.[0-9]+)?!"),
        (Grammar("lark", 'start: "yes" | "no" ("," " never"){1,3}'), r"yes|no(, never){1,3}"),
    ],
)
def test_output_matches_a_regex_or_a_lark_grammar(
    grammars: GrammarFactory, decode: Tokenizer, grammar: Grammar, pattern: str
) -> None:
    requests = [make_request(grammar=grammar, seed=seed) for seed in range(10)]
    generate(grammars, requests)
    for request in requests:
        assert re.fullmatch(pattern, text_of(decode, request))


def test_white_space_between_json_tokens_cannot_go_on_for_ever(grammars: GrammarFactory, decode: Tokenizer) -> None:
    """A model that loves white space above all else still gets on with its JSON."""
    schema = {"type": "array", "items": {"type": "boolean"}, "minItems": 3, "maxItems": 3}
    request = make_request(grammar=Grammar("json_schema", json.dumps(schema)), temperature=0.0, max_tokens=100)
    sampler = Sampler(grammars.vocab_size, grammars)
    sampler.add(request)
    logits = torch.randn(1, grammars.vocab_size, generator=torch.Generator().manual_seed(1))
    logits[0, [token for text, token in decode.get_vocab().items() if re.fullmatch("[ĠĊĉč]+", text)]] += 50.0
    done = False
    while not done:
        (sampled,) = sampler.sample(logits, [request])
        assert request.append(sampled.token) is None
        done = sampled.grammar_done
    assert len(json.loads(text_of(decode, request))) == 3


def test_json_object_allows_any_object_and_nothing_else(grammars: GrammarFactory, decode: Tokenizer) -> None:
    matcher = grammars.compile(Grammar("json_object"))
    for wrong in ("[", '"', "1", "Sure"):
        assert not grammars.allowed([matcher])[0, decode.encode(wrong).ids[0]]
    document = '{"a": [1, {"b": null}, -2.5e3],\n  "çö": {"": "\\n x"}}'
    for token in decode.encode(document).ids:
        assert not matcher.done
        assert grammars.allowed([matcher])[0, token]
        matcher.advance(token)
    assert matcher.done
    assert matcher.error is None


def test_only_end_of_sequence_follows_a_complete_text_even_before_min_tokens(
    grammars: GrammarFactory, decode: Tokenizer
) -> None:
    complete = make_request(grammar=Grammar("regex", "ab|abc"), temperature=0.0, min_tokens=50)
    (token,) = decode.encode("ab").ids
    sampler = Sampler(grammars.vocab_size, grammars)
    sampler.add(complete)
    logits = torch.zeros(1, grammars.vocab_size)
    logits[0, token] = 10.0
    (first,) = sampler.sample(logits, [complete])
    complete.append(first.token)
    assert (first.token, first.grammar_done) == (token, False)
    logits[0, EOS] = 100.0  # banned by min_tokens while the grammar has another way on
    (second,) = sampler.sample(logits, [complete])
    complete.append(second.token)
    assert text_of(decode, complete) == "abc"
    assert second.grammar_done
    (third,) = sampler.sample(logits, [complete])
    assert (third.token, third.grammar_done, third.error) == (EOS, True, None)


def test_a_stop_token_inside_the_grammar_ends_the_request(grammars: GrammarFactory, decode: Tokenizer) -> None:
    (stop,) = decode.encode("7").ids
    request = make_request(grammar=Grammar("regex", "[0-9]+"), seed=1, stop_token_ids=(stop,))
    assert generate(grammars, [request]) == [FinishReason.STOP]
    assert request.tokens[request.num_tokens - 1] in (stop, EOS)


def test_logits_beyond_the_tokenizer_are_never_allowed(grammars: GrammarFactory) -> None:
    allowed = grammars.allowed([grammars.compile(Grammar("regex", r"(.|\n)*"))])
    assert allowed.shape == (1, grammars.vocab_size)
    assert allowed[0, :TOKENIZER_SIZE].sum() > 40000
    assert not allowed[0, TOKENIZER_SIZE:].any()


def test_a_tokenizer_larger_than_the_model_is_cut(tokenizer_path: Path) -> None:
    factory = GrammarFactory(tokenizer_path, EOS, TOKENIZER_SIZE - 100)
    assert factory.allowed([factory.compile(Grammar("regex", "a+"))]).shape == (1, TOKENIZER_SIZE - 100)


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (Grammar("json_schema", '{"type": "objct"}'), "objct"),
        (Grammar("json_schema", '{"type": '), "not JSON"),
        (Grammar("json_schema", "[1]"), "expected an object"),
        (Grammar("json_schema", '{"not": {"type": "string"}}'), "not"),
        (Grammar("json_schema", '{"properties": {"a": ' * 150 + "{}" + "}}" * 150), "recursion limit"),
        (Grammar("json_schema", '{"$ref": "#"}'), "nothing satisfies it"),
        (Grammar("regex", "(ab"), "unclosed group"),
        (Grammar("lark", "start: missing"), "missing"),
        (Grammar("yaml", ""), "expected json_object, json_schema, regex or lark"),
    ],
)
def test_a_wrong_grammar_is_refused_with_the_reason(grammars: GrammarFactory, grammar: Grammar, reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as caught:
        Sampler(grammars.vocab_size, grammars).add(make_request(grammar=grammar))
    assert caught.value.field == "response_format"


def test_a_matcher_that_cannot_go_on_says_so(grammars: GrammarFactory, decode: Tokenizer) -> None:
    matcher = grammars.compile(Grammar("regex", "[0-9]+"))
    matcher.advance(decode.encode("x").ids[0])
    assert matcher.error is not None
    assert "cannot go on" in matcher.error


def test_requests_of_one_grammar_keep_their_own_places(grammars: GrammarFactory, decode: Tokenizer) -> None:
    one, two = grammars.compile(JSON_SCHEMA), grammars.compile(JSON_SCHEMA)
    start = grammars.allowed([two])
    one.advance(decode.encode('{"').ids[0])
    assert (grammars.allowed([two]) == start).all()
    assert (grammars.allowed([one]) != start).any()
