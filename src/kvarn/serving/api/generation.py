"""One HTTP request's generation: its sequences in the engine, turned back into text as news arrives.

`read` gives `Delta`s: text that is certain (whole characters, no half stop strings), the tokens behind it, the
reason when a sequence ends. Whatever happens to the reader, leaving the `with` block cancels what still runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import msgspec

from kvarn.errors import EngineDead, RequestError
from kvarn.models.tokenizer import IncrementalDecoder
from kvarn.serving.agents.events import CallStart
from kvarn.serving.api.engine_client import EngineLink, Mailbox
from kvarn.serving.api.errors import ClientGone, GenerationFailed, RequestTimeout, Unavailable
from kvarn.serving.api.hints import NO_HINTS, Hints
from kvarn.serving.api.messages import Submit, TokenOutput
from kvarn.serving.api.metrics import Metrics
from kvarn.serving.api.pacing import PacedMailbox
from kvarn.serving.api.recorder import FinishedSequence
from kvarn.serving.api.segments import Prompt
from kvarn.serving.api.stops import StopStrings
from kvarn.serving.batch import TokenLogprobs
from kvarn.serving.reader import DEFAULT_RATE
from kvarn.serving.request import FinishReason
from kvarn.serving.rounds.hints import RoundHint
from kvarn.serving.sampling.params import UNSET_SEED, SamplingParams


@dataclass(frozen=True, slots=True)
class Ask:
    """What one HTTP request wants from the engine."""

    endpoint: str
    prompts: list[Prompt]
    params: SamplingParams
    n: int = 1
    """Sequences for each prompt."""
    stops: tuple[str, ...] = ()
    include_stop: bool = False
    """Leave the stop string in the text."""
    show_special: bool = False
    """Leave special tokens in the text."""
    tenant: str = ""
    stream_rate: float = DEFAULT_RATE
    """Tokens a second that the reader takes."""
    hints: Hints = NO_HINTS
    tools: bool = False
    """Whether the model may answer with calls."""
    continues: str = ""
    """The engine request whose calls this one has the results of."""
    round: RoundHint | None = None

    @property
    def is_single(self) -> bool:
        """One sequence: only then can an answer's call be anything but the answer itself."""
        return len(self.prompts) * self.n == 1


@dataclass(slots=True)
class Delta:
    """What is new about one sequence."""

    index: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Beside `tokens` when asked for."""
    finish_reason: str | None = None
    """"stop" or "length" with the last delta."""


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reused_tokens: int = 0
    """Prompt tokens whose KV was that of shared segments."""

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def to_json(self) -> dict[str, Any]:
        """As chat and plain completions report it."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.total_tokens,
            "prompt_tokens_details": self.prompt_details(),
        }

    def prompt_details(self) -> dict[str, int]:
        """Where the KV of prompt tokens came from, if it was not computed."""
        reused = {"reused_tokens": self.reused_tokens} if self.reused_tokens else {}
        return {"cached_tokens": self.cached_tokens} | reused


@dataclass(slots=True, eq=False)
class _Sequence:
    index: int
    id: str
    prompt: Prompt
    params: SamplingParams
    decoder: IncrementalDecoder
    stops: StopStrings
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    """Seconds since the request's arrival."""
    cached_tokens: int = 0
    reused_tokens: int = 0
    finish_reason: str | None = None


class Generation:
    """The sequences of one request, prompt by prompt, n each. Made and read within one task; `abort` from any."""

    def __init__(
        self,
        id: str,
        ask: Ask,
        link: EngineLink,
        metrics: Metrics,
        new_decoder: Callable[[bool, list[int]], IncrementalDecoder],
        on_finished: Callable[[FinishedSequence], None],
        on_close: Callable[[Generation], None],
        *,
        arrival: float,
        timeout: float,
        pace: bool = False,
    ) -> None:
        self.id = id
        self.ask = ask
        self.created = int(time.time())
        self._arrival = arrival
        self._unix_arrival = time.time() - (time.monotonic() - arrival)
        self._link = link
        self._metrics = metrics
        self._on_finished = on_finished
        self._on_close = on_close
        self._mailbox = PacedMailbox(ask.stream_rate) if pace else Mailbox()
        self._closed = False
        self.sequences = [
            _Sequence(
                index,
                f"{id}-{index}",
                ask.prompts[index // ask.n],
                _params_of(ask.params, index % ask.n),
                new_decoder(ask.show_special, ask.prompts[index // ask.n].tokens),
                StopStrings(ask.stops, include=ask.include_stop),
            )
            for index in range(len(ask.prompts) * ask.n)
        ]
        self._running = {sequence.id: sequence for sequence in self.sequences}
        for sequence in self.sequences:
            link.submit(self._submit(sequence, timeout), self._mailbox)

    def _submit(self, sequence: _Sequence, timeout: float) -> Submit:
        ask, hints = self.ask, self.ask.hints
        return Submit(
            sequence.id,
            sequence.prompt.tokens,
            sequence.params,
            ask.tenant,
            hints.priority,
            timeout,
            ask.stream_rate,
            agent=hints.agent,
            continues=ask.continues,
            may_call=ask.is_single and (ask.tools or hints.agent is not None or hints.retain_seconds > 0),
            retain_seconds=hints.retain_seconds,
            segments=sequence.prompt.segments,
            round=ask.round,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(error)

    @property
    def done(self) -> bool:
        return not self._running

    @property
    def usage(self) -> Usage:
        """Each prompt counts once, however many sequences it has."""
        firsts = self.sequences[:: self.ask.n]
        return Usage(
            sum(len(sequence.prompt.tokens) for sequence in firsts),
            sum(len(sequence.tokens) for sequence in self.sequences),
            sum(sequence.cached_tokens for sequence in firsts),
            sum(sequence.reused_tokens for sequence in firsts),
        )

    def acknowledge(self, index: int, tokens: int, fastest: float) -> None:
        """The reader has read so many tokens of one sequence. Raises RequestError when there is no such sequence."""
        if index >= len(self.sequences):
            raise RequestError(f"there is no answer {index}; this request has {len(self.sequences)}", field="index")
        self._link.acknowledge(self.sequences[index].id, tokens, fastest)

    def note_calls(self, tools: list[str]) -> str:
        """The answer, of one sequence, has ended with calls of these tools: its engine request, which is told."""
        id = self.sequences[0].id
        if self.ask.hints.retain_seconds != 0:  # else the client wants nothing kept
            self._link.mention(CallStart(id, self.ask.tenant, tool=",".join(tools), implicit=True))
        return id

    def abort(self, error: BaseException) -> None:
        """Stop everything now; the reader gets `error`."""
        for id in self._running:
            self._link.cancel(id)
        self._mailbox.fail(error)

    async def read(self) -> list[Delta]:
        """What is new, at most one delta a sequence; call until `done`.

        Raises EngineDead, RequestError, RequestTimeout, Unavailable, GenerationFailed or what `abort` was given.
        """
        deltas: dict[str, Delta] = {}
        news = await self._mailbox.get()
        now = time.monotonic() - self._arrival
        for output in news:
            sequence = self._running.get(output.id)
            if sequence is None:
                continue  # ended by a stop string; the engine had not heard of it yet
            delta = deltas.get(output.id)
            if delta is None:
                delta = deltas[output.id] = Delta(sequence.index)
            self._take(sequence, output, delta, now)
        return list(deltas.values())

    def _take(self, sequence: _Sequence, output: TokenOutput, delta: Delta, now: float) -> None:
        if output.finish_reason not in (None, FinishReason.STOP, FinishReason.LENGTH):
            sequence.finish_reason = output.finish_reason
            del self._running[sequence.id]
            raise _failure(output)
        if output.tokens:
            if not sequence.tokens:
                sequence.cached_tokens, sequence.reused_tokens = output.cached_tokens, output.reused_tokens
            self._note_times(sequence, len(output.tokens), now)
        for position, token in enumerate(output.tokens):
            sequence.tokens.append(token)
            sequence.times.append(now)
            delta.tokens.append(token)
            if output.logprobs is not None:
                delta.logprobs.append(output.logprobs[position])
            self._add_text(sequence, delta, sequence.decoder.push([token]))
            if sequence.stops.hit is not None:
                self._link.cancel(sequence.id)
                self._finish(sequence, delta, FinishReason.STOP)
                return
        if output.finish_reason is not None:
            self._add_text(sequence, delta, sequence.decoder.flush())
            delta.text += sequence.stops.flush()
            hit = sequence.stops.hit is not None
            self._finish(sequence, delta, FinishReason.STOP if hit else output.finish_reason)

    def _add_text(self, sequence: _Sequence, delta: Delta, text: str) -> None:
        if len(sequence.tokens) <= sequence.params.min_tokens and self.ask.stops:
            delta.text += text  # too early to stop
        else:
            delta.text += sequence.stops.push(text)

    def _finish(self, sequence: _Sequence, delta: Delta, reason: str) -> None:
        delta.finish_reason = sequence.finish_reason = str(reason)
        del self._running[sequence.id]
        times = sequence.times
        if len(times) > 1:
            self._metrics.tpot.observe((times[-1] - times[0]) / (len(times) - 1))
        self._metrics.e2e.observe(time.monotonic() - self._arrival)

    def _note_times(self, sequence: _Sequence, count: int, now: float) -> None:
        if not sequence.times:
            self._metrics.ttft.observe(now)
            return
        gap = (now - sequence.times[-1]) / count
        for _ in range(count):
            self._metrics.itl.observe(gap)

    def close(self, error: BaseException | None = None) -> None:
        """Cancel what still runs, count and record. `error` is what ended the reading, if anything did."""
        if self._closed:
            return
        self._closed = True
        for id in self._running:
            self._link.cancel(id)
        self._running.clear()
        usage = self.usage
        self._metrics.prompt_tokens.inc(usage.prompt_tokens)
        self._metrics.output_tokens.inc(usage.completion_tokens)
        self._metrics.requests.labels(self.ask.endpoint, _outcome(error)).inc()
        for sequence in self.sequences:
            self._on_finished(self._finished(sequence, error))
        self._on_close(self)

    def _finished(self, sequence: _Sequence, error: BaseException | None) -> FinishedSequence:
        return FinishedSequence(
            id=sequence.id,
            arrival=self._unix_arrival,
            monotonic_arrival=self._arrival,
            tenant=self.ask.tenant,
            prompt=sequence.prompt.tokens,
            output=sequence.tokens,
            cached_tokens=sequence.cached_tokens,
            token_times=sequence.times,
            finish_reason=sequence.finish_reason or ("error" if isinstance(error, EngineDead) else "cancelled"),
            params=sequence.params,
            stream_rate=self.ask.stream_rate,
            agent=self.ask.hints.agent,
            continues=self.ask.continues,
            segments=sequence.prompt.segments,
            round=self.ask.round,
            reused_tokens=sequence.reused_tokens,
        )


def new_id(prefix: str) -> str:
    """An id such as "chatcmpl-4f…", unique among all servers."""
    return prefix + uuid4().hex


def _params_of(params: SamplingParams, choice: int) -> SamplingParams:
    """Equal seeds would make the n answers equal: each gets its own, the first the client's."""
    if params.seed == UNSET_SEED or choice == 0:
        return params
    # Stay in 64 bits, and clear of the value that means "no seed".
    seed = (params.seed + choice + 2**63) % 2**64 - 2**63
    return msgspec.structs.replace(params, seed=seed if seed != UNSET_SEED else 2**62)


def _failure(output: TokenOutput) -> Exception:
    message = output.error or f"the engine ended the request ({output.finish_reason})"
    if output.finish_reason == FinishReason.DEADLINE:
        return RequestTimeout(output.error or "the request took longer than this server allows; ask for fewer tokens")
    if output.finish_reason == FinishReason.CANCELLED:
        return Unavailable("the request was cancelled by the server", retry_after=2)
    if output.error_field is not None:
        code = "conflict" if output.error_status == 409 else None
        return RequestError(message, field=output.error_field or None, code=code, status=output.error_status)
    return GenerationFailed(message)


def _outcome(error: BaseException | None) -> str:
    match error:
        case None:
            return "ok"
        case EngineDead():
            return "engine_dead"
        case RequestTimeout():
            return "timeout"
        case RequestError():
            return "invalid"
        case Unavailable():
            return "unavailable"
        case ClientGone() | GeneratorExit():
            return "client_gone"
        case _:
            return "error"
