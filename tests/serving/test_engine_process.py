"""The message loop of the engine process, over sockets inside this process and an executor without a model."""

from __future__ import annotations

import msgspec
import pytest
import zmq

from kvarn.serving.api.messages import FromEngine, StepOutputs, Submit, TokenOutput
from kvarn.serving.engine_process import EngineProcess
from kvarn.serving.request import Request
from kvarn.serving.sampling.params import SamplingParams

from .paged_text import PagedTextExecutor, continuation, make_engine


class _Finishes:
    """Keeps what is sent; stops the loop when every request has had its last news."""

    def __init__(self, requests: int) -> None:
        self.process: EngineProcess | None = None
        self.news: dict[str, list[TokenOutput]] = {}
        self._left = requests

    def send(self, message: FromEngine) -> None:
        assert isinstance(message, StepOutputs)
        for output in message.outputs:
            self.news.setdefault(output.id, []).append(output)
            self._left -= output.finish_reason is not None
        if not self._left and self.process is not None:
            self.process.stop()


def serve(*messages: Submit) -> dict[str, list[TokenOutput]]:
    with zmq.Context() as context, context.socket(zmq.PULL) as inbox, context.socket(zmq.PUSH) as push:
        inbox.bind("inproc://engine")
        push.connect("inproc://engine")
        for message in messages:
            push.send(msgspec.msgpack.encode(message))
        outbox = _Finishes(len(messages))
        outbox.process = EngineProcess(make_engine(), frozenset(), inbox, outbox)  # type: ignore[arg-type]
        outbox.process.run()
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
