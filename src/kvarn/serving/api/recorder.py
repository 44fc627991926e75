"""`--record`: one JSON line for every finished sequence, made to be replayed.

Lines are handed to a thread, which hashes the prompt's blocks and writes; the event loop never waits for the
disk. A disk that fails ends recording with one warning, and serving goes on. `close` writes what is left.

A line: id, arrival (Unix seconds), time (seconds since the server started), prompt_tokens, output_tokens,
cached_tokens, block_size, block_hashes (chained, one a full prompt block, salted by tenant), token_times (seconds
since arrival), finish_reason, params; where a client told of its agent also program, agent and node, and `continues`:
the id of the sequence whose tool call this one answered; where it told of them `segments` (kind, tokens, maybe id, and
of shared ones a hash of the tokens) with reused_tokens, and `round` (id, size, maybe agent); with content also prompt
and output token ids.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from kvarn.errors import KvarnError
from kvarn.serving.agents.hints import AgentHints
from kvarn.serving.kvcache.prefix import chain_hashes
from kvarn.serving.rounds.hints import RoundHint, Segment
from kvarn.serving.sampling.params import SamplingParams

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FinishedSequence:
    id: str
    arrival: float
    """Unix seconds."""
    monotonic_arrival: float
    """The same moment on `time.monotonic`."""
    tenant: str
    prompt: list[int]
    output: list[int]
    cached_tokens: int
    token_times: list[float]
    """Seconds since arrival."""
    finish_reason: str
    params: SamplingParams
    stream_rate: float
    """Tokens a second that its reader took, as far as he was believed."""
    agent: AgentHints | None = None
    continues: str = ""
    """The sequence whose tool call it answered."""
    segments: tuple[Segment, ...] = ()
    round: RoundHint | None = None
    reused_tokens: int = 0


class Recorder:
    """Owns the file and the thread that writes it."""

    def __init__(self, path: Path, *, block_size: int, content: bool) -> None:
        try:
            self._file = path.open("ab")
        except OSError as error:
            raise KvarnError(f"cannot record to {path}: {error.strerror}; name a file that can be written") from error
        self._path = path
        self._block_size = block_size
        self._content = content
        self._started = time.monotonic()
        self._lines: queue.SimpleQueue[FinishedSequence | None] = queue.SimpleQueue()
        self._failed = False
        self._thread = threading.Thread(target=self._write_all, name="recorder", daemon=True)
        self._thread.start()

    def record(self, sequence: FinishedSequence) -> None:
        if not self._failed:
            self._lines.put(sequence)

    def close(self) -> None:
        """Write what is left and close the file."""
        self._lines.put(None)
        self._thread.join()

    def _write_all(self) -> None:
        while (sequence := self._lines.get()) is not None:
            if self._failed:
                continue
            try:
                self._file.write(self._line(sequence))
                if self._lines.empty():
                    self._file.flush()
            except OSError as error:
                self._failed = True
                _log.warning("recording to %s ended: %s; requests go on", self._path, error.strerror)
        try:
            self._file.close()
        except OSError as error:  # what was still buffered does not fit either
            if not self._failed:
                _log.warning("the last lines of %s could not be written: %s", self._path, error.strerror)

    def _line(self, sequence: FinishedSequence) -> bytes:
        hashes = chain_hashes(np.array(sequence.prompt, dtype=np.int32), self._block_size, sequence.tenant)
        line: dict[str, Any] = {
            "id": sequence.id,
            "arrival": sequence.arrival,
            "time": round(sequence.monotonic_arrival - self._started, 6),
            "prompt_tokens": len(sequence.prompt),
            "output_tokens": len(sequence.output),
            "cached_tokens": sequence.cached_tokens,
            "block_size": self._block_size,
            "block_hashes": [value.hex() for value in hashes],
            "token_times": [round(seconds, 6) for seconds in sequence.token_times],
            "finish_reason": sequence.finish_reason,
            "stream_rate": sequence.stream_rate,
            "params": msgspec.to_builtins(sequence.params, str_keys=True),
        }
        agent = sequence.agent or AgentHints()
        told = {"program": agent.program, "agent": agent.agent, "node": agent.node, "continues": sequence.continues}
        line |= {name: value for name, value in told.items() if value}
        if sequence.segments:
            line["segments"], line["reused_tokens"] = _segments(sequence), sequence.reused_tokens
        if sequence.round is not None:
            line["round"] = msgspec.to_builtins(sequence.round)
        if not self._content:
            # A grammar and a bias may quote the user: they are content too.
            line["params"]["grammar"] = sequence.params.grammar.kind if sequence.params.grammar else None
            line["params"]["logit_bias"] = {}
        else:
            line["prompt"], line["output"] = sequence.prompt, sequence.output
        return msgspec.json.encode(line) + b"\n"


def _segments(sequence: FinishedSequence) -> list[dict[str, Any]]:
    """What the parts of a prompt are, and for each shared one a hash of its tokens: equal ones are equal."""
    lines, place, prompt = [], 0, np.array(sequence.prompt, dtype=np.int32)
    for segment in sequence.segments:
        line = msgspec.to_builtins(segment)
        if segment.kind == "shared":
            tokens = prompt[place : place + segment.tokens]
            line["hash"] = chain_hashes(tokens, segment.tokens, sequence.tenant)[0].hex()
        lines.append(line)
        place += segment.tokens
    return lines
