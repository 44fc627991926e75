"""/v1/completions: plain continuation of one or many prompts."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from kvarn.errors import RequestError
from kvarn.serving.api.bodies import read_body
from kvarn.serving.api.generation import Delta, Generation, new_id
from kvarn.serving.api.logprobs import completion_logprobs
from kvarn.serving.api.schemas import CompletionRequest, SegmentBody
from kvarn.serving.api.segments import Part, Prompt, split_text
from kvarn.serving.api.service import Service, abort_when_gone, output_limit
from kvarn.serving.api.sse import EventStream, chunk_template, last_chunk
from kvarn.serving.api.translate import ask_of, grammar_of, sampling_params

DEFAULT_MAX_TOKENS = 16
_json = msgspec.json.Encoder()


class Completions:
    """The endpoint; `create` is its handler."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, request: Request) -> Response:
        arrival = time.monotonic()
        service = self._service
        tenant = service.tenant(request)
        body = await read_body(request, CompletionRequest, service.config.max_body_bytes)
        service.check_model(body.model)
        _refuse_unsupported(body)
        link, ready = await service.engine()
        prompts = await self._tokenise(body)
        max_tokens = output_limit(
            max(len(prompt.tokens) for prompt in prompts),
            body.max_tokens,
            DEFAULT_MAX_TOKENS,
            ready.max_context,
            field="max_tokens",
            prompt_field="prompt" if body.segments is None else "segments",
        )
        logprobs = -1 if body.logprobs is None else body.logprobs
        params = sampling_params(
            body, max_tokens=max_tokens, logprobs=logprobs, grammar=grammar_of(body.response_format)
        )
        rate = service.stream_rate(request, body.stream_rate, tenant)
        ask = ask_of(body, "completions", prompts, params, tenant, rate, service.hints(request, body))
        echoes = await self._echoes(body, prompts)
        generation = service.generate(
            new_id("cmpl-"), ask, link, arrival, streams=bool(body.stream)
        )  # from here on nothing may wait unguarded
        writer = _Writer(service, generation, echoes, with_token_ids=bool(body.return_token_ids))
        if body.stream:
            usage = body.stream_options is not None and bool(body.stream_options.include_usage)
            return EventStream(generation, writer.events(include_usage=usage))
        async with abort_when_gone(request.receive, generation):
            with generation:
                return await writer.whole()

    async def _tokenise(self, body: CompletionRequest) -> list[Prompt]:
        text, given = self._service.text, _given(body)
        if body.segments is not None:
            prompts = [await text.encode_parts(_parts(body.segments))]
        elif all(isinstance(prompt, str) for prompt in given):
            prompts = await self._encode(given)
        else:
            prompts = [Prompt(tokens) for tokens in given]
        if any(not prompt.tokens for prompt in prompts):
            field = "prompt" if body.segments is None else "segments"
            raise RequestError("the prompt is empty; send at least one token of text", field=field)
        return prompts

    async def _encode(self, texts: list[str]) -> list[Prompt]:
        """The tokens of texts, which the server's separator, if it has one, may cut into segments."""
        separator = self._service.config.segment_separator
        if separator and any(separator in text for text in texts):
            return [
                await self._service.text.encode_parts(split_text(text, separator))
                if separator in text
                else Prompt(await self._service.text.encode(text))
                for text in texts
            ]
        return [Prompt(tokens) for tokens in await self._service.text.encode_all(texts)]

    async def _echoes(self, body: CompletionRequest, prompts: list[Prompt]) -> list[str]:
        """What to put before each prompt's answers."""
        if not body.echo:
            return [""] * len(prompts)
        if body.segments is not None:
            pieces = [segment.content for segment in body.segments]
            return ["".join([each if isinstance(each, str) else await self._decode(each) for each in pieces])]
        separator = self._service.config.segment_separator
        given = _given(body)
        if separator:
            given = [each.replace(separator, "") if isinstance(each, str) else each for each in given]
        return [each if isinstance(each, str) else await self._decode(each) for each in given]

    async def _decode(self, tokens: list[int]) -> str:
        return await self._service.text.decode(tokens)


def _given(body: CompletionRequest) -> list[Any]:
    """The prompts as a list: of texts, or of lists of tokens."""
    prompt = body.prompt
    return [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else list(prompt or ())


def _parts(segments: list[SegmentBody]) -> list[Part]:
    return [Part(segment.kind, segment.content, segment.id or "") for segment in segments]


def _refuse_unsupported(body: CompletionRequest) -> None:
    if body.prompt is None and body.segments is None:
        raise RequestError("the prompt is missing; send prompt, or segments in place of it", field="prompt")
    if body.prompt is not None and body.segments is not None:
        raise RequestError("segments stand in place of prompt; send one of the two", field="segments")
    if body.suffix:
        raise RequestError("suffix is not supported: this model only continues text; leave it out", field="suffix")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise RequestError("best_of is not supported; leave it out and use n", field="best_of")
    if body.echo and body.logprobs is not None:
        raise RequestError("echo together with logprobs is not supported; drop one of them", field="echo")


@dataclass(slots=True)
class _Choice:
    """One answer of a response that is not streamed."""

    text: str
    offset: int
    finish_reason: str | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: dict[str, list[Any]] = field(
        default_factory=lambda: {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    )


class _Writer:
    """Turns a generation's deltas into the endpoint's JSON, streamed or whole."""

    def __init__(self, service: Service, generation: Generation, echoes: list[str], *, with_token_ids: bool) -> None:
        self._text = service.text
        self._generation = generation
        self._model = service.model_name
        n = generation.ask.n
        self._choices = [_Choice(echoes[sequence.index // n], 0) for sequence in generation.sequences]
        for choice in self._choices:
            choice.offset = len(choice.text)
        self._with_logprobs = generation.ask.params.logprobs >= 0
        self._with_token_ids = with_token_ids

    async def whole(self) -> Response:
        while not self._generation.done:
            for delta in await self._generation.read():
                choice = self._choices[delta.index]
                choice.text += delta.text
                choice.token_ids += delta.tokens
                choice.finish_reason = delta.finish_reason
                for name, values in (self._logprobs(delta) or {}).items():
                    choice.logprobs[name] += values
        body = self._base() | {
            "choices": [
                {
                    "index": index,
                    "text": choice.text,
                    "logprobs": choice.logprobs if self._with_logprobs else None,
                    "finish_reason": choice.finish_reason,
                    **({"token_ids": choice.token_ids} if self._with_token_ids else {}),
                }
                for index, choice in enumerate(self._choices)
            ],
            "usage": self._generation.usage.to_json(),
        }
        hints = self._generation.ask.hints
        return Response(_json.encode(body | hints.answer()), 200, hints.headers(), media_type="application/json")

    async def events(self, *, include_usage: bool) -> AsyncGenerator[bytes, None]:
        base = self._base()
        choice = b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b%b}'
        template = chunk_template(base, choice, include_usage=include_usage)
        first = chunk_template(base | self._generation.ask.hints.answer(), choice, include_usage=include_usage)
        while not self._generation.done:
            events = b""
            for delta in await self._generation.read():
                token_ids = b',"token_ids":' + _json.encode(delta.tokens) if self._with_token_ids else b""
                if delta.text or delta.finish_reason or delta.logprobs or (token_ids and delta.tokens):
                    events += first % (
                        delta.index,
                        _json.encode(self._echo_once(delta.index) + delta.text),
                        _json.encode(self._logprobs(delta)),
                        _json.encode(delta.finish_reason),
                        token_ids,
                    )
                    first = template
            if events:
                yield events
        yield last_chunk(base, self._generation.usage if include_usage else None)

    def _base(self) -> dict[str, Any]:
        generation = self._generation
        return {"id": generation.id, "object": "text_completion", "created": generation.created, "model": self._model}

    def _echo_once(self, index: int) -> str:
        echo, self._choices[index].text = self._choices[index].text, ""
        return echo

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        choice = self._choices[delta.index]
        tokens, logprobs = self._text.without_end(delta.tokens, delta.finish_reason), delta.logprobs
        arrays, choice.offset = completion_logprobs(self._text, tokens, logprobs[: len(tokens)], choice.offset)
        return arrays
