"""Tiers under the real model: the text is the same, in fp32, whatever was moved where."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator

import pytest

from kvarn.errors import KvarnError
from kvarn.serving.offline import OfflineEngine
from kvarn.serving.sampling.params import SamplingParams
from tests.conftest import serve, wait_until

PARAMS = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
SMALL_POOL = 24 * 2**20
"""546 tokens: three of the prompts with their texts."""


def load(**settings: object) -> OfflineEngine:
    engine = OfflineEngine.load("smollm2", precision="float32", max_context=512, block_size=8, **settings)
    engine.engine._check = True
    return engine


def prompts(count: int = 8, length: int = 150) -> list[list[int]]:
    rng = random.Random(5)
    shared = [rng.randrange(1000, 20_000) for _ in range(40)]
    return [shared + [rng.randrange(1000, 20_000) for _ in range(length - 40)] for _ in range(count)]


@pytest.fixture(scope="module")
def expected() -> Iterator[list[list[int]]]:
    engine = load(kv_memory_bytes=512 * 2**20)
    yield [result.token_ids for result in engine.generate(prompts(), PARAMS)]
    engine.close()


def test_texts_are_the_same_with_a_host_tier(expected):
    engine = load(kv_memory_bytes=SMALL_POOL, host_memory_bytes=512 * 2**20)
    for _ in range(2):
        assert [result.token_ids for result in engine.generate(prompts(), PARAMS)] == expected
        while engine.engine.settle():
            engine.engine.tiers.wait(0.1)
    assert engine.engine.counters.preemptions > 0 and engine.engine.counters.loads > 0
    assert engine.engine.cache.pool.num_active == 0
    engine.close()


def test_after_a_restart_prompts_come_from_the_disk_and_texts_are_the_same(expected, tmp_path):
    settings = {"kv_memory_bytes": SMALL_POOL, "host_memory_bytes": 64 * 2**20, "disk_cache": str(tmp_path / "kv")}
    computed = []
    for _ in range(2):
        engine = load(**settings)
        assert [result.token_ids for result in engine.generate(prompts(), PARAMS)] == expected
        computed.append(engine.engine.counters.prompt_tokens)
        engine.close()
    known = sum(len(prompt) // 8 * 8 for prompt in prompts())
    assert computed[1] <= len(prompts()) * 150 - known + 100, "nearly all prompt tokens were read, not computed"
    assert engine.engine.tiers.disk.read_blocks > 0 and engine.engine.tiers.disk.bad_blocks == 0


def test_a_disk_that_cannot_be_used_is_done_without(expected, caplog, tmp_path):
    engine = load(kv_memory_bytes=512 * 2**20, disk_cache="/dev/null/kv")
    assert engine.generate(prompts(1), PARAMS)[0].token_ids == expected[0]
    assert "serving without the disk cache" in caplog.text
    engine.close()
    with pytest.raises(KvarnError, match="--disk-memory"):
        load(disk_cache=str(tmp_path), disk_memory_bytes=1000)
    for setting in ({"share_prefixes": False}, {"host_memory_bytes": 0}):
        with pytest.raises(KvarnError, match="disk_cache"):
            load(disk_cache=str(tmp_path), **setting)


def test_a_server_killed_while_it_writes_is_warm_and_right_afterwards(tmp_path):
    flags = ("--precision", "float32", "--kv-memory", "64MiB", "--host-memory", "256MiB", "--block-size", "8")
    body = {"model": "smollm2", "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    texts: list[list[str]] = []
    for life in range(3):
        with serve(*flags, "--disk-cache", str(tmp_path)) as server, server.client() as client:
            texts.append([])
            for prompt in prompts(6):
                answer = client.post("/v1/completions", json={**body, "prompt": prompt})
                texts[-1].append(answer.json()["choices"][0]["text"])
            if life == 0:
                wait_until(lambda: server.metric("kvarn_kv_to_disk_bytes_total") > 0, "something is written")
                assert all(
                    server.metric("kvarn_kv_copy_bytes_per_second", link=to) > 0 for to in ("to_host", "to_disk")
                )
            os.kill(server.engine_pid(), signal.SIGKILL)  # the next requests go to an engine made anew
            wait_until(lambda: server.metric("kvarn_engine_restarts_total") == 1, "it has come again")
            answer = client.post("/v1/completions", json={**body, "prompt": prompts(6)[0]})
            assert answer.json()["choices"][0]["text"] == texts[0][0]
            assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 100
            wait_until(lambda: server.metric("kvarn_kv_from_disk_bytes_total") > 0, "the read is counted")
            assert server.metric("kvarn_kv_copy_bytes_per_second", link="from_disk") > 0
            assert server.metric("kvarn_kv_bad_disk_blocks_total") == 0
    assert texts[0] == texts[1] == texts[2]
