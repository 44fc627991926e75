"""Keys, limits, the recorder, metrics."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from kvarn.errors import RequestError
from kvarn.serving.api.auth import ApiKeys
from kvarn.serving.api.recorder import FinishedSequence, Recorder
from kvarn.serving.kvcache.prefix import chain_hashes
from kvarn.serving.sampling.params import Grammar, SamplingParams
from tests.conftest import wait_until
from tests.serving.api.conftest import Server

ENDLESS: dict[str, Any] = {"prompt": "on and on ", "max_tokens": 900, "ignore_eos": True}
SLOW = {"KVARN_STANDIN_STEP": "0.01"}


def test_keys_are_asked_for_and_tell_tenants_apart(start: Any) -> None:
    with start(api_keys=["secret", "other"]) as server:
        with server.http() as http:
            for header in (
                {},
                {"authorization": "Bearer wrong"},
                {"authorization": "Basic secret"},
                {"authorization": "Bearer"},
            ):
                answer = http.post("/v1/completions", json={"prompt": "x"}, headers=header)
                assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
            assert http.get("/v1/models").status_code == 401 and http.get("/metrics").status_code == 401
            assert http.get("/health").status_code == 200 and http.get("/ready").status_code == 200
        for key in ("secret", "other", "secret"):
            server.openai(key).completions.create(model="smollm2", prompt="x")
        first, second, third = [line["tenant"] for line in server.wait_for("submit", 3)]
        assert first == third != second and "secret" not in first and first


def test_without_keys_everyone_is_one_tenant() -> None:
    assert ApiKeys([]).tenant(None) == ApiKeys([]).tenant("Bearer x") == ""
    with pytest.raises(RequestError):
        ApiKeys(["k"]).tenant("Bearer \udcff")


@pytest.mark.parametrize("limits", [{"max_queued": 2}, {"max_concurrent": 2}])
def test_a_request_that_would_always_be_too_much_is_not_told_to_come_back(start: Any, limits: dict[str, int]) -> None:
    with start(SLOW, **limits) as server, server.http() as http:
        answer = http.post("/v1/completions", json=ENDLESS | {"n": 3})
        assert answer.status_code == 400 and "retry-after" not in answer.headers
        assert answer.json()["error"]["param"] == "n"


def test_running_requests_count_until_they_end(start: Any) -> None:
    with start(SLOW, max_concurrent=2) as server, server.http() as http:
        with http.stream("POST", "/v1/completions", json=ENDLESS | {"n": 2, "stream": True}) as first:
            lines = first.iter_lines()
            next(lines)
            refused = http.post("/v1/completions", json={"prompt": "x"})
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["type"] == "rate_limit_error"
        wait_until(lambda: http.post("/v1/completions", json={"prompt": "x"}).status_code == 200, "room again")


def test_a_request_that_takes_too_long_is_given_up(start: Any) -> None:
    with start(SLOW, request_timeout=0.1) as server:
        with pytest.raises(openai.InternalServerError) as caught:
            server.openai().completions.create(
                model="smollm2", prompt="x", max_tokens=900, extra_body={"ignore_eos": True}
            )
        assert caught.value.status_code == 504


def test_metrics_count_what_happened(server: Server) -> None:
    before = server.metric('kvarn_requests_total{endpoint="completions",outcome="ok"}')
    tokens = server.metric("kvarn_output_tokens_total")
    server.openai().completions.create(model="smollm2", prompt="one two three four", max_tokens=4)
    assert server.metric('kvarn_requests_total{endpoint="completions",outcome="ok"}') == before + 1
    assert server.metric("kvarn_output_tokens_total") == tokens + 4
    assert server.metric("kvarn_time_to_first_token_seconds_count") >= 1
    assert server.metric("kvarn_inter_token_latency_seconds_count") >= 3
    assert server.metric("kvarn_engine_up") == 1
    assert server.metric('kvarn_kv_blocks{state="free"}') == 7


def test_every_finished_sequence_leaves_one_line(start: Any, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    with start(record=str(trace)) as server:
        tokens = server.http().post("/tokenize", json={"prompt": "one two three " * 20}).json()["tokens"]
        began = time.time()
        server.openai().completions.create(model="smollm2", prompt=tokens, max_tokens=5, n=2, seed=3)
        server.openai().completions.create(model="smollm2", prompt="x", stop="x", stream=True).close()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    assert len(lines) == 3
    line = lines[0]
    assert (line["prompt_tokens"], line["output_tokens"], line["cached_tokens"]) == (len(tokens), 5, 16)
    assert line["finish_reason"] == "length" and line["params"]["seed"] == 3 and line["params"]["max_tokens"] == 5
    assert line["block_hashes"] == [value.hex() for value in chain_hashes(np.array(tokens, np.int32), 16, "")]
    assert len(line["token_times"]) == 5 and line["token_times"] == sorted(line["token_times"])
    assert abs(line["arrival"] - began) < 30 and line["time"] >= 0
    assert "prompt" not in line and "output" not in line


def sequence(id: str, **params: Any) -> FinishedSequence:
    return FinishedSequence(
        id, 1.0, time.monotonic(), "", [1] * 40, [2, 3], 0, [0.1, 0.2], "stop", SamplingParams(**params), 20.0
    )


def test_content_is_recorded_only_on_request(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "t", block_size=16, content=True)
    recorder.record(sequence("a"))
    recorder.close()
    line = json.loads((tmp_path / "t").read_text())
    assert (line["prompt"], line["output"]) == ([1] * 40, [2, 3])


def test_words_of_the_user_among_the_parameters_are_content_too(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "t", block_size=16, content=False)
    recorder.record(sequence("a", logit_bias={4711: 5.0}, grammar=Grammar("regex", "secret")))
    recorder.close()
    text = (tmp_path / "t").read_text()
    assert "4711" not in text and "secret" not in text
    assert json.loads(text)["params"]["grammar"] == "regex"


def test_no_line_is_lost_on_close(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "t", block_size=16, content=False)
    for number in range(2000):
        recorder.record(sequence(str(number)))
    recorder.close()
    assert [json.loads(line)["id"] for line in (tmp_path / "t").open()] == [str(number) for number in range(2000)]


def test_a_full_disk_ends_recording_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(Path("/dev/full"), block_size=16, content=True)
    for number in range(2000):
        recorder.record(sequence(str(number)))
    recorder.close()
    assert len(caplog.records) == 1 and "recording" in caplog.text
    recorder.record(sequence("later"))


def test_a_record_that_cannot_be_written_is_refused_at_start(start: Any, tmp_path: Path) -> None:
    with start(wait=False, record=str(tmp_path / "no" / "such" / "folder")) as server:
        assert server.process.wait(30) == 2
        assert "cannot record" in server.output()
