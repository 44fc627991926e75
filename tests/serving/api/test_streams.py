"""Readers: who says how fast he reads, who is believed, who tells how far he is, and tokens sent as they are read."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import openai
import pytest

from kvarn.serving.api.messages import TokenOutput
from kvarn.serving.api.pacing import LEAD, PacedMailbox
from kvarn.serving.batch import TokenLogprobs
from tests.serving.api.conftest import Server

SLOW = {"KVARN_STANDIN_STEP": "0.01"}


def rate_heard(server: Server, **sent: Any) -> float:
    """The stream rate that the engine is told of a request."""
    before = len(server.engine_log("submit"))
    key = sent.pop("key", "none")
    server.openai(key).completions.create(model="smollm2", prompt="x", **sent)
    rate: float = server.wait_for("submit", before + 1)[-1]["stream_rate"]
    return rate


def test_the_body_comes_before_the_header_and_both_before_the_default(server: Server) -> None:
    header = {"X-Stream-Rate": "7.5"}
    assert rate_heard(server) == 20
    assert rate_heard(server, extra_headers=header) == 7.5
    assert rate_heard(server, extra_headers=header, extra_body={"stream_rate": 5}) == 5
    chat = server.openai().chat.completions.create(
        model="smollm2", messages=[{"role": "user", "content": "x"}], extra_body={"stream_rate": 9}
    )
    answer = server.openai().responses.create(model="smollm2", input="x", extra_body={"stream_rate": 11})
    heard = {line["id"].rsplit("-", 1)[0]: line["stream_rate"] for line in server.engine_log("submit")}
    assert heard[chat.id] == 9 and heard[answer.id] == 11


def test_nobody_is_believed_to_read_faster_than_his_key_allows(start: Any) -> None:
    limits = {"stream_rate_limits": {"a": 15.0}, "max_stream_rate": 50.0, "default_stream_rate": 30.0}
    with start(api_keys=["a", "b"], **limits) as server:
        assert rate_heard(server, key="a", extra_body={"stream_rate": 1000}) == 15
        assert rate_heard(server, key="a") == 15
        assert rate_heard(server, key="b", extra_body={"stream_rate": 1000}) == 50
        assert rate_heard(server, key="b") == 30


@pytest.mark.parametrize("header", ["fast", "0", "-3", "nan", "inf", ""])
def test_a_rate_that_is_no_rate_is_refused(server: Server, header: str) -> None:
    with server.http() as http:
        answer = http.post("/v1/completions", json={"prompt": "x"}, headers={"X-Stream-Rate": header})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "stream_rate"
        answer = http.post("/v1/completions", json={"prompt": "x", "stream_rate": 0})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "stream_rate"


def test_how_far_a_reader_is_reaches_the_engine(start: Any) -> None:
    with start(SLOW, api_keys=["a", "b"]) as server, server.http() as http:
        stream = server.openai("a").completions.create(
            model="smollm2", prompt="on and on ", max_tokens=500, stream=True, extra_body={"ignore_eos": True}
        )
        id = next(iter(stream)).id
        mine, other = ({"authorization": f"Bearer {key}"} for key in "ab")
        url = f"/v1/streams/{id}/read"
        assert http.post(url, json={"tokens": 3}, headers=mine).status_code == 200
        assert http.post(url, json={"tokens": 3, "index": 1}, headers=mine).status_code == 400
        assert http.post(url, json={"tokens": -1}, headers=mine).status_code == 400
        assert http.post(url, json={"tokens": 4}, headers=other).status_code == 404
        assert http.post("/v1/streams/none/read", json={"tokens": 4}, headers=mine).status_code == 404
        (line,) = server.wait_for("acknowledge")
        assert line["id"].startswith(id) and (line["tokens"], line["fastest"]) == (3, 200)
        stream.close()


def test_a_paced_stream_comes_as_it_is_read(start: Any) -> None:
    with start(pace=True) as server:
        asked: dict[str, Any] = {"model": "smollm2", "prompt": "on and on ", "max_tokens": 30}
        extra = {"ignore_eos": True, "stream_rate": 15}
        began = time.monotonic()
        whole = server.openai().completions.create(**asked, extra_body=extra)
        unpaced = time.monotonic() - began
        times, text = [], ""
        for chunk in server.openai().completions.create(**asked, stream=True, extra_body=extra):
            times.append(time.monotonic())
            text += chunk.choices[0].text
        assert text == whole.choices[0].text
        # The last token is read 29 / 15 s after the first, and sent LEAD before that.
        assert times[-1] - times[0] >= 29 / 15 - LEAD - 0.2 > unpaced


def test_a_paced_mailbox_splits_news_and_lets_all_go_when_something_fails() -> None:
    async def run() -> None:
        mailbox = PacedMailbox(rate=1000.0)
        mailbox.put(TokenOutput("a", [1, 2], logprobs=[TokenLogprobs(-1, []), TokenLogprobs(-2, [])], cached_tokens=3))
        mailbox.put(TokenOutput("a", [3], finish_reason="stop"))
        news = await mailbox.get()
        assert [(one.tokens, one.finish_reason) for one in news] == [([1], None), ([2], None), ([3], "stop")]
        assert [one.logprobs and one.logprobs[0].logprob for one in news] == [-1, -2, None]
        slow = PacedMailbox(rate=0.1)
        slow.put(TokenOutput("b", [1, 2, 3]))
        assert [one.tokens for one in await slow.get()] == [[1]]
        asyncio.get_running_loop().call_later(0.01, slow.fail, RuntimeError("gone"))
        assert [one.tokens for one in await slow.get()] == [[2], [3]]
        with pytest.raises(RuntimeError, match="gone"):
            await slow.get()

    asyncio.run(run())


def test_a_reader_who_leaves_a_paced_stream_is_noticed_while_nothing_is_sent(start: Any) -> None:
    with start(SLOW, pace=True) as server:
        stream = server.openai().completions.create(
            model="smollm2", prompt="on and on ", max_tokens=900, stream=True,
            extra_body={"ignore_eos": True, "stream_rate": 0.1},
        )  # fmt: skip
        next(iter(stream))
        stream.close()
        server.wait_for("cancel")


def test_openai_errors_name_the_field(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="stream_rate"):
        server.openai().completions.create(model="smollm2", prompt="x", extra_body={"stream_rate": "fast"})
