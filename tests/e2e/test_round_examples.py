"""The examples of rounds and group chats, each against a real server."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from tests.conftest import ServerProcess

EXAMPLES = Path(__file__).parents[2] / "examples"


def printed_by(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *flags: str) -> str:
    monkeypatch.setattr(sys, "argv", [name, *flags])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def test_agents_of_a_langgraph_talk_in_rounds(
    server: ServerProcess, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--base-url", f"{server.url}/v1", "--rounds", "2")
    printed = printed_by("rounds_langgraph", capsys, monkeypatch, *flags)
    spoke = re.findall(r"^round (\d), (\w+): ['\"].+['\"]$", printed, re.MULTILINE)
    assert sorted(spoke) == [(str(number), name) for number in (1, 2) for name in ("Ada", "Bram", "Cleo", "Dov")]
    assert "after 2 rounds: Ada, Bram, Cleo, Dov have spoken" in printed


def test_members_of_a_group_chat_speak_in_turn(
    server: ServerProcess, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--base-url", f"{server.url}/v1", "--turns", "4")
    printed = printed_by("rounds_groupchat", capsys, monkeypatch, *flags)
    spoke = re.findall(r"^(\w+): ['\"].+['\"]$", printed, re.MULTILINE)
    assert spoke == ["editor", "reporter", "critic", "editor"]
    found = [int(tokens) for tokens in re.findall(r"(\d+) of \d+ prompt tokens were there already", printed)]
    assert found[3] >= 32, "the editor's own beginning was there"
