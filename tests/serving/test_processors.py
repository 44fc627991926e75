"""Counting processors: affinity by a real process, quotas by the files that containers show."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvarn.serving.processors import usable_processors

UNIFIED = "31 23 0:28 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
SPLIT = (
    "32 31 0:29 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
    "33 31 0:30 {root} /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
)


@pytest.fixture(autouse=True)
def many_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 64: what is smaller in these tests is by quota."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))


def machine(root: Path, mounts: str, groups: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/mountinfo": mounts, "proc/self/cgroup": groups, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        ("max 100000", 64),
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("5000 100000", 1),
        ("9900000 100000", 64),
        ("", 64),
    ],
)
def test_version_2_quota_rounds_up_and_never_below_one(tmp_path: Path, quota: str, expected: int) -> None:
    root = machine(tmp_path, UNIFIED, "0::/\n", {"sys/fs/cgroup/cpu.max": quota + "\n"})
    assert usable_processors(root) == expected


def test_the_tightest_of_the_groups_around_the_process_counts(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/pod/cpu.max": "300000 100000\n",
        "sys/fs/cgroup/pod/app/cpu.max": "max 100000\n",
        "sys/fs/cgroup/other/cpu.max": "100000 100000\n",
    }
    assert usable_processors(machine(tmp_path, UNIFIED, "0::/pod/app\n", files)) == 3


@pytest.mark.parametrize("quota", ["-1", "250000"])
def test_version_1_quota_of_the_cpu_controller(tmp_path: Path, quota: str) -> None:
    """The mount shows the container's own group as its root, while the process's path is the host's."""
    folder = "sys/fs/cgroup/cpu,cpuacct"
    files = {f"{folder}/cpu.cfs_quota_us": quota, f"{folder}/cpu.cfs_period_us": "100000"}
    groups = "3:cpuset:/\n2:cpu,cpuacct:/docker/abc\n1:name=systemd:/x\n0::/\n"
    root = machine(tmp_path, SPLIT.format(root="/docker/abc"), groups, files)
    assert usable_processors(root) == (64 if quota == "-1" else 3)


def test_without_control_groups_the_affinity_mask_counts(tmp_path: Path) -> None:
    assert usable_processors(tmp_path) == 64


def test_a_process_that_may_use_one_processor_counts_one() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from kvarn.serving.processors import usable_processors\n"
        "print(usable_processors())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "1\n"
