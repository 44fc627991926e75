"""Runs the real API process over the stand-in engine: `serve_standin.py CONFIG`, ServerConfig's fields as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from kvarn.errors import KvarnError
from kvarn.serving.api.config import ServerConfig
from kvarn.serving.api.server import run_server
from kvarn.serving.config import EngineConfig

ENGINE = Path(__file__).with_name("standin_engine.py")


def main() -> int:
    fields = json.loads(sys.argv[1])
    fields["api_keys"] = tuple(fields.get("api_keys", ()))
    fields["engine"] = EngineConfig(**fields.get("engine", {}))
    if "record" in fields:
        fields["record"] = Path(fields["record"])
    config = ServerConfig(engine_command=(sys.executable, str(ENGINE)), **fields)
    try:
        return run_server(config, on_ready=lambda message: print(message, flush=True))
    except KvarnError as error:
        print(f"error: {error}", flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
