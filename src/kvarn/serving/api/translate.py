"""From a client's fields to the engine's: sampling parameters and grammars."""

from __future__ import annotations

import json
from typing import Any

from kvarn.errors import RequestError
from kvarn.serving.api.generation import Ask
from kvarn.serving.api.hints import Hints
from kvarn.serving.api.schemas import ResponseFormat, SamplingFields, TextFormat
from kvarn.serving.api.segments import Prompt, require_single
from kvarn.serving.sampling.params import UNSET_SEED, Grammar, SamplingParams


def sampling_params(
    body: SamplingFields, *, max_tokens: int, logprobs: int = -1, grammar: Grammar | None = None
) -> SamplingParams:
    """The sampling parameters of a chat or plain completion. Ranges are checked by `SamplingParams.validate`."""

    def value(given: float | None, default: float) -> float:
        return default if given is None else given

    return SamplingParams(
        temperature=value(body.temperature, 1.0),
        top_k=max(0, body.top_k or 0),
        top_p=value(body.top_p, 1.0),
        min_p=value(body.min_p, 0.0),
        presence_penalty=value(body.presence_penalty, 0.0),
        frequency_penalty=value(body.frequency_penalty, 0.0),
        repetition_penalty=value(body.repetition_penalty, 1.0),
        seed=UNSET_SEED if body.seed is None else body.seed,
        max_tokens=max_tokens,
        min_tokens=body.min_tokens or 0,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        logit_bias={int(token): bias for token, bias in (body.logit_bias or {}).items()},
        logprobs=logprobs,
        grammar=grammar,
    )


def ask_of(
    body: SamplingFields,
    endpoint: str,
    prompts: list[Prompt],
    params: SamplingParams,
    tenant: str,
    stream_rate: float,
    hints: Hints,
) -> Ask:
    """What a chat or plain completion wants from the engine, for prompts that are already tokens. Raises RequestError
    where a round cannot have such a request."""
    require_single(body.round_hint, prompts=len(prompts), answers=body.n or 1)
    return Ask(
        endpoint,
        prompts,
        params,
        n=body.n or 1,
        stops=body.stop_strings,
        include_stop=bool(body.include_stop_str_in_output),
        show_special=body.skip_special_tokens is False,
        tenant=tenant,
        stream_rate=stream_rate,
        hints=hints,
        round=body.round_hint,
    )


def grammar_of(format: ResponseFormat | None) -> Grammar | None:
    """The grammar of a chat request's response_format. Raises RequestError."""
    if format is None or format.type == "text":
        return None
    if format.type == "json_object":
        return Grammar("json_object")
    if format.json_schema is None or format.json_schema.schema_ is None:
        raise RequestError(
            'response_format of type "json_schema" needs {"json_schema": {"name": ..., "schema": {...}}}',
            field="response_format.json_schema.schema",
        )
    return schema_grammar(format.json_schema.schema_, "response_format.json_schema.schema")


def text_grammar(format: TextFormat | None) -> Grammar | None:
    """The same for /v1/responses, where the schema lies in text.format itself."""
    if format is None or format.type == "text":
        return None
    if format.type == "json_object":
        return Grammar("json_object")
    if format.schema_ is None:
        raise RequestError('text.format of type "json_schema" needs a "schema"', field="text.format.schema")
    return schema_grammar(format.schema_, "text.format.schema")


def schema_grammar(schema: dict[str, Any], field: str) -> Grammar:
    """A grammar for values of a JSON schema. Raises RequestError when it is not JSON."""
    try:
        return Grammar("json_schema", json.dumps(schema, allow_nan=False))
    except ValueError as error:
        raise RequestError("the schema has a number that is not finite", field=field) from error
