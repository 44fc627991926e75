"""The message loop of the engine process, over sockets inside this process and an executor without a model."""

from __future__ import annotations

import msgspec
import pytest
import zmq

from kvarn.errors import KvarnError, RequestError
from kvarn.hardware.accelerators import load_accelerator
from kvarn.hardware.models import load_model_shape
from kvarn.serving.api.messages import FromEngine, RoundsReport, StepOutputs, Submit, TokenOutput, WatchRounds
from kvarn.serving.config import EngineConfig
from kvarn.serving.engine import Engine
from kvarn.serving.engine_process import EngineProcess, Outbox
from kvarn.serving.request import Request
from kvarn.serving.rounds.hints import RoundHint, Segment
from kvarn.serving.sampling.params import SamplingParams
from kvarn.serving.speculation import Speculator
from kvarn.simulation.assemble import simulated_engine

from .paged_text import PagedTextExecutor, continuation, make_engine


class _Finishes:
    """Keeps what is sent; when every request has had its last news, asks for rounds and stops the loop."""

    def __init__(self, requests: int) -> None:
        self.process: EngineProcess | None = None
        self.news: dict[str, list[TokenOutput]] = {}
        self.reports: list[FromEngine] = []
        self._left = requests

    def send(self, message: FromEngine) -> None:
        if not isinstance(message, StepOutputs):
            self.reports.append(message)
            return
        for output in message.outputs:
            self.news.setdefault(output.id, []).append(output)
            self._left -= output.finish_reason is not None
        if not self._left and self.process is not None:
            self.process._handle(WatchRounds(5))
            self.process.stop()


def serve(
    *messages: Submit, engine: Engine | None = None, reports: list[FromEngine] | None = None
) -> dict[str, list[TokenOutput]]:
    with zmq.Context() as context, context.socket(zmq.PULL) as inbox, context.socket(zmq.PUSH) as push:
        inbox.bind("inproc://engine")
        push.connect("inproc://engine")
        for message in messages:
            push.send(msgspec.msgpack.encode(message))
        outbox = _Finishes(len(messages))
        outbox.process = EngineProcess(engine or make_engine(), frozenset(), inbox, outbox)  # type: ignore[arg-type]
        outbox.process.run()
    if reports is not None:
        reports += outbox.reports
    return outbox.news


PARAMS = SamplingParams(temperature=0.0, max_tokens=3)


def test_refused_request_names_its_field_and_the_others_run_on() -> None:
    news = serve(Submit("bad", [10**6], PARAMS), Submit("good", [1, 2], PARAMS))
    (refusal,) = news["bad"]
    assert (refusal.finish_reason, refusal.error_field) == ("error", "prompt")
    assert [token for output in news["good"] for token in output.tokens] == continuation([1, 2], 3)


def test_request_that_breaks_the_executor_on_arrival_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    add = PagedTextExecutor.add

    def fail_first(executor: PagedTextExecutor, request: Request) -> None:
        if request.id == "bad":
            raise ValueError("cannot be")
        add(executor, request)

    monkeypatch.setattr(PagedTextExecutor, "add", fail_first)
    news = serve(Submit("bad", [1], PARAMS), Submit("good", [1, 2], PARAMS))
    (refusal,) = news["bad"]
    assert (refusal.finish_reason, refusal.error_field) == ("error", None)
    assert "cannot be" in (refusal.error or "")
    assert [token for output in news["good"] for token in output.tokens] == continuation([1, 2], 3)


def test_tokens_of_one_step_come_in_one_output() -> None:
    engine = make_engine()
    engine.speculator = Speculator(4, only_where_it_pays=False)
    engine.executor.next_token = lambda context: (context[-1] + 1) % 5  # type: ignore[attr-defined]
    params = SamplingParams(temperature=0.0, max_tokens=12)
    news = serve(Submit("a", [0, 1, 2, 3, 4, 0, 1], params), Submit("b", [3, 4, 0, 1, 2], params), engine=engine)
    assert [token for output in news["a"] for token in output.tokens] == [2, 3, 4, 0, 1] * 2 + [2, 3]
    assert [token for output in news["b"] for token in output.tokens] == [3, 4, 0, 1, 2] * 2 + [3, 4]
    assert max(len(output.tokens) for output in news["a"]) == 5
    assert [output.finish_reason for output in news["a"]] == [None] * (len(news["a"]) - 1) + ["length"]
    assert len(news["a"]) <= 4


def test_closing_the_outbox_sends_what_is_left() -> None:
    with zmq.Context() as context, context.socket(zmq.PULL) as pull, context.socket(zmq.PUSH) as push:
        pull.bind("inproc://news")
        push.connect("inproc://news")
        outbox = Outbox(push)
        for i in range(100):
            outbox.send(StepOutputs([TokenOutput(str(i), [i])]))
        outbox.close()
        received = [msgspec.msgpack.decode(pull.recv(), type=StepOutputs) for _ in range(100)]
    assert [step.outputs[0].tokens for step in received] == [[i] for i in range(100)]
    with pytest.raises(KvarnError, match="has ended"):
        outbox.send(StepOutputs([]))


def test_segments_and_rounds_reach_the_engine_and_its_refusals_their_senders(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Request] = []

    def refuse(engine: Engine, request: Request) -> None:
        seen.append(request)
        raise RequestError("it has one already", field="round.agent", status=409)

    monkeypatch.setattr(Engine, "add", refuse)
    segments, round = (Segment("private", 1), Segment("shared", 2, "x")), RoundHint("r", 2, "a")
    (refusal,) = serve(Submit("one", [1, 2, 3], PARAMS, segments=segments, round=round))["one"]
    assert (seen[0].segments, seen[0].round) == (segments, round)
    assert (refusal.error_status, refusal.error_field) == (409, "round.agent")


@pytest.mark.parametrize("max_tokens", [1, 3])
def test_reused_tokens_and_what_became_of_rounds_are_told(max_tokens: int) -> None:
    """Also of an answer that is over with its first token."""
    config = EngineConfig(reuse="collective", kv_memory_bytes=2**30, speculation="off")
    engine = simulated_engine(config, load_accelerator("h200"), load_model_shape("llama3-8b"))
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    said, reports = list(range(1000, 1200)), []
    members = [
        Submit(
            agent,
            [*own, *said, 7],
            params,
            segments=(Segment("private", len(own)), Segment("shared", len(said)), Segment("task", 1)),
            round=RoundHint("r", 2, agent),
        )
        for agent, own in {"a": [9] * 20 + [5] * 50, "b": [9] * 20 + [6] * 75}.items()
    ]
    news = serve(*members, engine=engine, reports=reports)
    reused = {agent: outputs[0].reused_tokens for agent, outputs in news.items()}
    assert 100 < reused["a"] < 200 and 100 < reused["b"] < 200
    (report,) = reports
    assert isinstance(report, RoundsReport) and report.stats.rounds is not None
    (told,) = report.rounds
    assert (told.id, told.members, told.arrived, told.segments) == ("r", 2, 2, 1)
    assert told.reused_tokens == report.stats.rounds.reused_tokens == sum(reused.values())
