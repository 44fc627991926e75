"""What the engine counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """Totals since start."""

    preemptions: int = 0
    """Requests taken off the device, whether or not the host had a copy."""
    loads: int = 0
    """Requests brought back from the host."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    drafted_tokens: int = 0
    """Guesses at tokens to come that were computed."""
    accepted_tokens: int = 0
    """Those that came true."""
    steps: int = 0
    step_seconds: float = 0.0
