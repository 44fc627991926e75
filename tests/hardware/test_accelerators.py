"""Accelerators as data: every table is whole, profiles come back equal, errors name the field."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kvarn.errors import KvarnError
from kvarn.hardware.accelerators import known_accelerators, load_accelerator, save_accelerator

NAMES = ["rtx4090", "a6000", "a100-80", "h100", "h200", "cpu"]


def test_known_accelerators_are_whole_and_found_in_any_case() -> None:
    assert list(known_accelerators()) == NAMES
    assert load_accelerator("H200") == known_accelerators()["h200"]


def test_memory_is_what_the_name_says() -> None:
    gigabytes = {name: one.memory_bytes / 2**30 for name, one in known_accelerators().items()}
    assert gigabytes == pytest.approx(
        {"rtx4090": 24, "a6000": 48, "a100-80": 80, "h100": 80, "h200": 140, "cpu": 8}, rel=0.01
    )


def test_a_profile_comes_back_equal(tmp_path: Path) -> None:
    device = replace(load_accelerator("cpu"), name="my machine", title='two "cores"', step_seconds=1.25e-3)
    save_accelerator(device, tmp_path / "deep" / "profile.toml", ["measured"])
    assert load_accelerator(str(tmp_path / "deep" / "profile.toml")) == device


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(KvarnError, match="rtx4090, a6000, a100-80, h100, h200, cpu, or name a profile"):
        load_accelerator("tpu")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("flops = ", "# flops = ", r"\[cpu\] has no flops"),
        ("duplex = false", "duplex = 1", "duplex of .* expected bool"),
        ("duplex = false", "duplex = false\ncolour = 3", "unknown field colour"),
        ("kv_share = 0.6", "kv_share = 0.0", "kv_share of cpu is 0.0; expected a number above 0"),
        ("step_seconds = 0.0005", "step_seconds = -1.0", "step_seconds of cpu is -1.0"),
        ("max_running = 128", "max_running = 12.5", "expected int"),
        ("[", "x = 1\n[", "is not a profile"),
        ("]", "", "cannot read"),
    ],
)
def test_a_broken_profile_is_refused_in_words(tmp_path: Path, old: str, new: str, message: str) -> None:
    file = tmp_path / "profile.toml"
    save_accelerator(load_accelerator("cpu"), file, [])
    text = file.read_text().replace('["cpu"]', "[cpu]")
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(KvarnError, match=message):
        load_accelerator(str(file))


def test_a_missing_profile_is_an_error_in_words(tmp_path: Path) -> None:
    with pytest.raises(KvarnError, match="cannot read"):
        load_accelerator(str(tmp_path / "none.toml"))
