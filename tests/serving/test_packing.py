"""Packed batches against one computed token by token, over requests that come, go, are preempted and drafted for."""

from __future__ import annotations

import random

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn.models.spec import ForwardBatch
from kvarn.serving.batch import Batch, ScheduledRequest
from kvarn.serving.executors.packing import Packer
from kvarn.serving.request import Request

from .paged_text import make_request

SIZE, LONGEST = 4, 60


def _check(batch: Batch, forward: ForwardBatch) -> None:
    row = 0
    logit_rows = []
    for i, scheduled in enumerate(batch.rows):
        request = scheduled.request
        end = request.num_computed + scheduled.count
        assert forward.query_starts[i] == row and forward.kv_slots[i] == end
        held = -(-end // SIZE)
        assert forward.block_tables[i, :held].tolist() == request.blocks[:held]
        if scheduled.samples:
            logit_rows += range(row + scheduled.count - scheduled.drafts - 1, row + scheduled.count)
        for position in range(request.num_computed, end):
            assert forward.positions[row] == position
            assert forward.tokens[row] == request.tokens[position]
            assert forward.slots[row] == request.blocks[position // SIZE] * SIZE + position % SIZE
            row += 1
    assert len(forward.tokens) == len(forward.positions) == len(forward.slots) == forward.query_starts[-1] == row
    assert forward.logit_rows.tolist() == logit_rows


def _hold(request: Request, tokens: int, rng: random.Random) -> None:
    request.add_blocks([rng.randrange(1000) for _ in range(-(-tokens // SIZE) - request.num_blocks)])


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 4))
def test_packed_tensors_are_what_each_token_says(seed, max_requests):
    rng = random.Random(seed)
    packer = Packer(
        max_rows=200, max_requests=max_requests, max_context=LONGEST, block_size=SIZE, device=torch.device("cpu")
    )
    requests: list[Request] = []
    for step in range(40):
        if len(requests) < max_requests and (not requests or rng.random() < 0.2):
            prompt = [rng.randrange(900) for _ in range(rng.randint(1, 12))]
            requests.append(make_request(f"r{step}", prompt, LONGEST - len(prompt)))
        batch = Batch()
        for request in requests:
            uncomputed = request.num_uncomputed
            count = uncomputed if uncomputed == 1 else rng.randint(1, uncomputed)
            drafts = rng.randint(0, 3) if count == uncomputed and rng.random() < 0.3 else 0
            drafts = min(drafts, LONGEST - request.num_tokens, len(request.tokens) - request.num_tokens)
            request.tokens[request.num_tokens : request.num_tokens + drafts] = rng.randrange(900)
            _hold(request, request.num_computed + count + drafts, rng)
            batch.rows.append(ScheduledRequest(request, count + drafts, drafts))
        _check(batch, packer.pack(batch))
        for row in batch.rows:
            samples = row.samples
            row.request.num_computed += row.count - row.drafts
            for _ in range(rng.randint(1, row.drafts + 1) if samples else 0):
                row.request.append(rng.randrange(900))
            row.request.num_computed += row.request.num_uncomputed - 1 if samples else 0
        for request in [*requests]:
            if request.num_tokens >= LONGEST - 1 or rng.random() < 0.03:
                requests.remove(request)
            elif rng.random() < 0.05:  # preempted, and back at once with other blocks, perhaps at the same token
                request.preemptions += 1
                request.num_blocks = 0
                request.block_table = np.empty(0, dtype=np.int32)
                request.num_computed = rng.randrange(request.num_computed + 1)
                _hold(request, request.num_computed, rng)
        if rng.random() < 0.1:
            rng.shuffle(requests)
