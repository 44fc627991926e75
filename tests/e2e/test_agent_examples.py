"""The examples of agents, each against a real server."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from tests.conftest import ServerProcess

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(("name", "end"), [("agents_langgraph", "answer"), ("agents_openai", "editor")])
def test_a_model_calls_a_tool_and_goes_on_with_what_was_computed(
    server: ServerProcess, monkeypatch, capsys, caplog, name: str, end: str
):
    url = f"{server.url}/v1"
    monkeypatch.setattr(sys, "argv", [name, "--base-url", url, "--tool-seconds", "0.1"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    found = [int(tokens) for tokens in re.findall(r"(\d+) of \d+ prompt tokens were there already", printed)]
    assert len(found) >= 2, "the model was asked again after the tool"
    assert found[1] > 100
    assert re.search(f"^{end}: ", printed, re.MULTILINE)
    assert [record.message for record in caplog.records if record.name == "kvarn.clients"] == []
