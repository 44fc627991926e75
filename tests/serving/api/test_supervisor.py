"""What the supervisor says of an engine process that never came up."""

from __future__ import annotations

import asyncio
import sys

import pytest

from kvarn.errors import KvarnError
from kvarn.serving.api.config import ServerConfig
from kvarn.serving.api.supervisor import EngineSupervisor


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("/no/such/program",), "cannot be started: No such file"),
        ((sys.executable, "-c", "raise SystemExit(3)"), "exit status 3"),
        ((sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"), "memory ran out"),
        ((sys.executable, "-c", "import os; os.kill(os.getpid(), 11)"), "signal 11"),
    ],
)
def test_first_engine_that_ends_wordless_is_described(command: tuple[str, ...], message: str) -> None:
    with pytest.raises(KvarnError, match=message):
        asyncio.run(EngineSupervisor(ServerConfig(engine_command=command)).run())
