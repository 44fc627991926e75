"""`kvarn reproduce tokenflow` as a person and as a machine run it, in small; and what its cells measure."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kvarn.cli.main import app
from kvarn.errors import KvarnError
from kvarn.reproduce.contract import Level, Scope
from kvarn.reproduce.statistics import Estimate
from kvarn.reproduce.tokenflow import pictures
from kvarn.reproduce.tokenflow.cells import Load, Simulated, Switches, about
from kvarn.reproduce.tokenflow.experiment import EXPERIMENT
from kvarn.reproduce.tokenflow.setups import RTX4090
from kvarn.serving.config import PolicyName
from kvarn.serving.kvcache.copies import CopyRules

SMALL = replace(RTX4090, name="small", scale=0.1)
LOAD = Load(12, about(200), about(300))


def reproduce(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["reproduce", *arguments])


def test_prints_rows_as_the_contract_has_them_and_keeps_them(tmp_path: Path) -> None:
    outcome = reproduce("tokenflow", "--quick", "--only", "e0,e5", "--seed", "7", "--output", str(tmp_path), "--json")
    assert outcome.exit_code == 0, outcome.output
    document = json.loads(outcome.stdout)
    assert document["name"] == "tokenflow" and document["conditions"]["seeds"] == [7, 8]
    rows = {row["id"]: row for row in document["rows"]}
    assert (rows["e0.first"]["measured"], rows["e0.second"]["measured"], rows["e0.stalls"]["measured"]) == (3, 5, 0)
    assert {row["kind"] for row in document["rows"]} == {"simulated"}
    delivered = rows["e5.rtx4090.a.delivered-15"]
    assert delivered["low"] <= delivered["measured"] <= delivered["high"]
    assert json.loads((tmp_path / "tokenflow" / "report.json").read_text()) == document
    again = reproduce("tokenflow", "--quick", "--only", "e0,e5", "--seed", "7", "--output", str(tmp_path))
    assert again.exit_code == 0
    assert "e5.rtx4090.a" in again.stdout and "bars hold" in again.stdout


def test_lists_what_there_is() -> None:
    outcome = reproduce("--list")
    assert "2510.02758" in outcome.stdout
    assert all(f"e{number} " in outcome.stdout for number in range(11))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "tokendance, or all"),
        (("perpetuum",), "tokenflow"),
        (("tokenflow", "--quick", "--full"), "--full"),
        (("tokenflow", "--only", "e77"), "e10"),
    ],
)
def test_errors_are_in_words(arguments: tuple[str, ...], message: str) -> None:
    outcome = reproduce(*arguments)
    assert isinstance(outcome.exception, KvarnError)  # `kvarn` prints it and ends with code 2
    assert message in str(outcome.exception)


@pytest.mark.parametrize("level", ["quick", "default", "full"])
def test_every_scope_has_every_part(level: Level) -> None:
    parts = EXPERIMENT.parts(Scope(level))
    assert [part.id for part in parts] == [f"e{number}" for number in range(11)]
    assert all(part.cells for part in parts)


def test_the_same_cell_gives_the_same_figures() -> None:
    cell = Simulated(LOAD, SMALL, "streaming", 0, series=True)
    one = cell.run()
    assert one == json.loads(json.dumps(cell.run()))
    assert one["completed"] == 12
    assert one["classes"]["20"]["delivered"] <= 20.0
    assert len(one["series"]["ttft"]) == 12 and len(one["series"]["times"]) == len(one["series"]["slack_p50"])
    assert one != replace(cell, seed=1).run()


def test_pictures_are_drawn(tmp_path: Path) -> None:
    policies: tuple[PolicyName, ...] = ("streaming", "fcfs-conservative")
    runs = {policy: Simulated(LOAD, SMALL, policy, 0, series=True).run() for policy in policies}
    pictures.draw_burst(runs, tmp_path / "burst.png", "A burst")
    times = {"full": Estimate(1.0, 1.0, 1.0), "without": Estimate(1.2, 1.1, 1.3), "once": Estimate(1.1)}
    pictures.draw_ablation(times, tmp_path / "ablation.png", "Without")
    assert all(path.stat().st_size > 10_000 for path in (tmp_path / "burst.png", tmp_path / "ablation.png"))


def test_switches_change_what_runs() -> None:
    """More requests than fit, so that blocks are moved."""
    load = replace(LOAD, requests=30)
    usual = Simulated(load, SMALL, "streaming", 0).run()
    others = [
        Simulated(load, SMALL, "streaming", 0, switches).run()
        for switches in (
            Switches(("offload=off",)), Switches(copies=CopyRules(overlap=False)), Switches(("tick=2",)),
        )
    ]  # fmt: skip
    assert usual["loads"] > 0 == others[0]["loads"]
    assert all(other != usual for other in others)


def test_what_clients_declare_is_not_what_their_readers_read() -> None:
    """The policy believes a rate of 5; stalls are those of readers of 20."""
    load = replace(LOAD, requests=30, declared=0.25)
    specs = load.specs(0)
    assert {(spec.stream_rate, spec.declared_rate) for spec in specs} == {(20.0, 5.0)}
    truth, wrong = (Simulated(one, SMALL, "streaming", 0).run() for one in (replace(load, declared=1.0), load))
    assert set(wrong["classes"]) == {"20"}
    assert wrong["stall_mean"] > truth["stall_mean"]


def test_prefixes_in_common_are_computed_once() -> None:
    alone, shared = (
        Simulated(Load(20, about(600), about(20), shared_tokens=tokens), SMALL, "fcfs-conservative", 0).run()
        for tokens in (0, 512)
    )
    assert shared["ttft_mean"] < alone["ttft_mean"]
