"""The operators as torch sees them: schemas, fake tensors, compilation; and which kernels run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import kvarn.kernels
from kvarn.kernels import ops
from tests.kernels.paged import Sequence, make_case
from tests.kernels.shared import make_shared_case


def samples() -> dict[str, tuple[Any, ...]]:
    """Arguments for each op."""
    case = make_case(
        [Sequence(20, 1), Sequence(30, 5)],
        dtype=torch.float32, kv_heads=2, group=2, head_dim=16, block_size=16, holes=0.1, permuted=True, fused=True,
        seed=1, options={},
    )  # fmt: skip
    shared = make_shared_case(
        [Sequence(20, 1), Sequence(30, 5)], [40],
        most_viewers=9, rotary=16, factor=1.0, dtype=torch.float32, kv_heads=2, group=2, head_dim=16, block_size=16,
        holes=0.1, permuted=True, fused=True, seed=1, options={},
    )  # fmt: skip
    key, slots = torch.randn(6, 2, 16), torch.arange(6, dtype=torch.int32)
    kv, cos_sin = torch.randn(4, 3, 2, 2, 16, 16)[:, 1], torch.randn(50, 16)
    x, weight, ones = torch.randn(6, 32), torch.randn(32), torch.ones(6, dtype=torch.float64)
    return {
        "paged_attention": (*case.tensors.values(), case.scale),
        "shared_attention": (*shared.tensors.values(), shared.scale),
        "rms_norm": (x, weight, 1e-5),
        "add_rms_norm": (x, torch.randn(6, 32), weight, 1e-5),
        "rope_and_cache": (torch.randn(6, 4, 16), key, key.clone(), cos_sin, slots, kv, slots),
        "write_cache": (key, key.clone(), kv, slots),
        "restore_blocks": (
            kv[:2, None],
            kv[2:, None],
            torch.tensor([1, -2], dtype=torch.int32),
            torch.tensor([30, -1], dtype=torch.int32),
            slots[:2],
            cos_sin,
            torch.zeros(4, 1, 2, 2, 16, 16),
        ),
        "silu_mul": (x,),
        "pack_linear": (torch.randn(40, 32),),
        "largest": (x,),
        "sample": (x, ones, ones.long(), ones, ones, ones * 0.5),
        "token_logprobs": (x, torch.arange(6), 3),
        "packed_linear": (x.bfloat16(), ops.pack_linear(torch.randn(40, 32).bfloat16()), None, 40),
    }


@pytest.mark.parametrize("name", samples())
def test_schema_and_fake_tensors_tell_the_truth(name: str) -> None:
    torch.library.opcheck(
        getattr(torch.ops.kvarn, name).default, samples()[name], test_utils=("test_schema", "test_faketensor")
    )


def test_ops_are_traced_without_graph_breaks() -> None:
    def block(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return ops.silu_mul(ops.add_rms_norm(x, residual, weight, 1e-5))

    x, residual, weight = torch.randn(3, 64), torch.randn(3, 64), torch.randn(64)
    again = residual.clone()
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, residual, weight), block(x, again, weight))
    assert torch.equal(residual, again)


def in_new_process(code: str, package_root: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(package_root)} | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


SHOW = """
import torch
from kvarn.kernels import ops
print(ops.native_kernels(), round(ops.silu_mul(torch.ones(1, 2)).item(), 4))
"""
SOURCE = Path(kvarn.kernels.__file__).parents[2]


@pytest.mark.parametrize("wanted", ["reference", "portable", "native"])
def test_environment_chooses_the_kernels(wanted: str) -> None:
    result = in_new_process(SHOW, SOURCE, KVARN_KERNELS=wanted)
    expected = {"reference": None, "native": ops.native_variants()[0]}.get(wanted, wanted)
    assert result.stdout.split() == [str(expected), "0.7311"]
    assert result.stderr == ""


def test_unknown_kernels_are_refused_with_the_choices() -> None:
    result = in_new_process(SHOW, SOURCE, KVARN_KERNELS="quantum")
    assert result.returncode == 1
    assert "KVARN_KERNELS=quantum" in result.stderr
    assert "portable" in result.stderr


def test_without_the_library_the_reference_runs_and_says_so_once(tmp_path: Path) -> None:
    shutil.copytree(SOURCE / "kvarn" / "kernels", tmp_path / "kvarn" / "kernels", ignore=shutil.ignore_patterns("*.so"))
    (tmp_path / "kvarn" / "__init__.py").touch()
    result = in_new_process(SHOW + "from kvarn.kernels import ops", tmp_path, KVARN_KERNELS="native")
    assert result.stdout.split()[0] == "None"
    assert result.stderr.count("without its native CPU kernels") == 1
    assert "install g++" in result.stderr
