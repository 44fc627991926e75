"""Certificates: what is allowed, what they are for, and what an engine makes of them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvarn.cli.main import app
from kvarn.errors import KvarnError
from kvarn.serving.assemble import LoadedEngine, load_engine
from kvarn.serving.assemble_rounds import identity_of
from kvarn.serving.config import EngineConfig
from kvarn.serving.quality.certificate import VERSION, Certificate, Limits, Measured, allowed, path_of, read, write
from kvarn.serving.quality.figures import Quality
from kvarn.serving.rounds.hints import ReuseMode

GOOD = Quality(
    mean_kl=0.01,
    p95_kl=0.1,
    top1=0.99,
    first=1.0,
    perplexity_ratio=1.0,
    needle=1.0,
    questions=20,
    tokens=500,
    refreshed=0.1,
)
LIMITS = Limits()


def way(mode: ReuseMode, share: float, *, good: bool = True) -> Measured:
    return Measured(mode, share, 1 if mode == "lego" else 0, GOOD if good else replace(GOOD, top1=0.5))


@pytest.mark.parametrize(
    ("changed", "keeps"),
    [
        ({}, True),
        ({"mean_kl": 0.05}, True),
        ({"mean_kl": 0.051}, False),
        ({"top1": 0.949}, False),
        ({"needle": 0.94}, False),
        ({"needle": None}, True),
        ({"mean_kl": float("nan")}, False),
    ],
)
def test_all_limits_are_kept_or_nothing_is_allowed(changed: dict[str, float], keeps: bool) -> None:
    quality = replace(GOOD, **changed)
    assert LIMITS.keeps(quality) is keeps
    measured = [Measured("collective", 0.1, 0, quality)]
    assert allowed(measured, LIMITS) == (measured if keeps else [])


def test_the_smallest_share_above_which_all_keep_the_limits_is_allowed_cheapest_mode_first() -> None:
    measured = [
        way("batched", 0.1), way("batched", 0.3), way("lego", 0.0, good=False),
        way("collective", 0.05), way("collective", 0.1, good=False), way("collective", 0.3), way("collective", 0.5),
    ]  # fmt: skip
    assert [(each.mode, each.share) for each in allowed(measured, LIMITS)] == [("collective", 0.3), ("batched", 0.1)]
    assert allowed([way("batched", 0.1), way("batched", 0.5, good=False)], LIMITS) == []


def load(model: Path, **settings: object) -> LoadedEngine:
    usual = {"precision": "float32", "kv_memory_bytes": 2**23}
    loaded = load_engine(EngineConfig(model=str(model), **{**usual, **settings}))  # type: ignore[arg-type]
    loaded.engine.close()
    return loaded


def certificate_for(loaded: LoadedEngine, *ways: Measured) -> Certificate:
    identity = identity_of(loaded.spec, loaded.kv_dtype, 16, loaded.folder)
    return Certificate(VERSION, identity, LIMITS, list(ways), list(ways), GOOD, 3, 0, "2026-01-01")


def test_auto_is_exact_until_the_model_is_certified_and_then_as_certified(small_model: Path, cache: Path) -> None:
    loaded = load(small_model)
    assert loaded.engine.rounds is None
    certificate = certificate_for(loaded, way("collective", 0.3), way("batched", 0.1))
    assert write(certificate).is_relative_to(cache)
    assert read(certificate.identity) == certificate
    rounds = load(small_model, round_wait=0.5).engine.rounds
    assert rounds is not None
    assert (rounds.settings.mode, rounds.settings.share, rounds.settings.wait) == ("collective", 0.3, 0.5)
    more = load(small_model, reuse_share=0.6).engine.rounds
    assert more is not None and more.settings.share == 0.6
    assert load(small_model, reuse="exact").engine.rounds is None
    assert load(small_model, share_prefixes=False).engine.rounds is None


def test_a_certificate_holds_for_nothing_else(small_model: Path, cache: Path, tmp_path: Path) -> None:
    loaded = load(small_model)
    certificate = certificate_for(loaded, way("collective", 0.3))
    write(certificate)
    assert load(small_model).engine.rounds is not None
    assert load(small_model, precision="bfloat16").engine.rounds is None
    assert load(small_model, kv_dtype="int8").engine.rounds is None
    assert load(small_model, block_size=32).engine.rounds is None
    other = shutil.copytree(small_model, tmp_path / small_model.name)
    weights = other / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert load(other).engine.rounds is None


def test_what_is_no_certificate_is_as_none(small_model: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    certificate = certificate_for(load(small_model), way("collective", 0.3))
    path = write(certificate)
    path.write_text(path.read_text()[:50])
    assert load(small_model).engine.rounds is None
    assert "not a readable certificate" in caplog.text
    foreign = json.loads(write(certificate).read_text()) | {"version": VERSION + 1}
    path_of(certificate.identity).write_text(json.dumps(foreign))
    assert load(small_model).engine.rounds is None


def test_a_mode_that_was_asked_for_is_served_with_a_warning_unless_certified(
    small_model: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load(small_model, reuse="lego")
    assert loaded.engine.rounds is not None
    assert "not certified for reuse 'lego'" in caplog.text
    write(certificate_for(loaded, way("lego", 0.0), way("batched", 0.1)))
    cases = (
        ("lego", 0.0, False), ("batched", 0.2, False), ("serial", 0.1, False), ("batched", 1.0, False),
        ("batched", 0.05, True), ("collective", 0.5, True),
    )  # fmt: skip
    for mode, share, warned in cases:
        caplog.clear()
        assert load(small_model, reuse=mode, reuse_share=share).engine.rounds is not None
        assert ("not certified" in caplog.text) is warned, (mode, share)


def test_a_certificate_that_cannot_be_written_is_said_so(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(small_model)
    (tmp_path / "file").touch()
    monkeypatch.setenv("KVARN_CACHE", str(tmp_path / "file"))
    with pytest.raises(KvarnError, match="set KVARN_CACHE"):
        write(certificate_for(loaded, way("lego", 0.0)))


def test_the_command_measures_and_certifies(small_model: Path, cache: Path) -> None:
    loose = ["--max-kl", "100", "--min-top1", "0", "--min-needle", "0", "--share", "0.05", "--groups", "1"]
    asked = ["model", "certify-reuse", str(small_model), "--precision", "float32", *loose, "--json"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert [each["mode"] for each in report["allowed"]] == ["collective", "lego", "batched"]
    assert all(each["quality"]["mean_kl"] > 1e-3 for each in report["measured"])
    assert report["floor"]["mean_kl"] < 1e-4
    assert Path(report["certificate"]).is_file()
    rounds = load(small_model).engine.rounds
    assert rounds is not None and (rounds.settings.mode, rounds.settings.share) == ("collective", 0.05)
    write(certificate_for(load(small_model)))  # measured again, and nothing kept the limits
    assert load(small_model).engine.rounds is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["smollm2", "--share", "0"], "--share is 0"),
        (["smollm2", "--share", "1.5"], "--share is 1.5"),
        (["smollm2", "--min-top1", "2"], "--min-top1 is 2"),
        (["smollm2", "--max-kl", "-1"], "--max-kl is -1"),
        (["smollm2", "--groups", "-2"], "--groups is -2"),
        (["smollm2", "--block-size", "0"], "block_size is 0"),
        (["no-such-model"], "unknown model"),
    ],
)
def test_nonsense_is_refused(arguments: list[str], said: str, cache: Path) -> None:
    done = CliRunner().invoke(app, ["model", "certify-reuse", *arguments])
    assert isinstance(done.exception, KvarnError)
    assert said in str(done.exception)
