"""One streamed completion of an OpenAI-compatible server: a request's JSON in, what came of it out.

For clients whose next request depends on the answer, so that they want all of it: token ids, text, usage.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvarn.bench import http
from kvarn.bench.client import UNREADABLE, failure_reason, http_reason


class CompletionFailed(Exception):
    """There is no whole answer; the message is fit for a table of reasons."""


@dataclass
class Completion:
    """What has been read of one answer."""

    id: str = ""
    first_token: float | None = None
    """Seconds of `time.perf_counter`."""
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int | None = None
    """Of the prompt, what the server had; None where it does not say."""
    reused_tokens: int | None = None
    """Of these, what it took from shared segments; likewise."""

    def take(self, event: dict[str, Any], now: float) -> None:
        """Read one event of the stream. TransferFailed when it tells of an error."""
        if error := event.get("error"):
            raise http.TransferFailed(f"error mid-stream: {str(error)[:120]}")
        self.id = event.get("id") or self.id
        for choice in event.get("choices") or ():
            self.token_ids += choice.get("token_ids") or ()
            self.text += choice.get("text") or ""
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            if self.first_token is None and (choice.get("text") or choice.get("token_ids")):
                self.first_token = now
        if usage := event.get("usage"):
            self.prompt_tokens, self.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
            details = usage.get("prompt_tokens_details") or {}
            self.cached_tokens, self.reused_tokens = details.get("cached_tokens"), details.get("reused_tokens")


async def complete(
    endpoint: http.Endpoint,
    body: dict[str, Any],
    timeout: float,
    headers: Sequence[tuple[str, str]] = (),
) -> Completion:
    """POST `body`, which must ask for a stream, to /completions, and read to the end within `timeout` seconds.

    Raises CompletionFailed.
    """
    answer, finished = Completion(), False
    try:
        async with asyncio.timeout(timeout):
            reply = await http.post(endpoint, "/completions", json.dumps(body).encode(), headers)
            try:
                if reply.status != 200:
                    raise http.TransferFailed(http_reason(reply.status, await reply.body()))
                async for line in reply.lines():
                    if line.startswith(b"data:"):
                        data = line[5:].strip()
                        if finished := data == b"[DONE]":
                            break
                        answer.take(json.loads(data), time.perf_counter())
            finally:
                reply.close()
    except TimeoutError as failure:
        raise CompletionFailed(f"timeout after {timeout:g} s") from failure
    except (http.TransferFailed, OSError, EOFError, asyncio.LimitOverrunError, *UNREADABLE) as failure:
        raise CompletionFailed(failure_reason(failure)) from failure
    if not finished:
        raise CompletionFailed("disconnected mid-stream")
    return answer
