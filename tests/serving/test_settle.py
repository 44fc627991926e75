"""What a process does once it has loaded: measured from outside, in a process of its own."""

import subprocess
import sys

import pytest

_SCRIPT = """
from pathlib import Path
from kvarn.serving.settle import settle

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

pieces = [bytes(60_000) for _ in range(2000)]  # too small for mappings of their own
del pieces[:-1]  # the last one keeps the heap from shrinking by itself
before = resident()
settle()
print(before - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_that_loading_freed_goes_back_to_the_system() -> None:
    answer = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True)
    assert int(answer.stdout) > 60e6
