"""GGUF files: converted exactly, refused clearly when they are broken, and never half there."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from kvarn.errors import ModelError
from kvarn.models.gguf import convert
from kvarn.models.loader import load_decoder
from kvarn.models.sources import ModelFiles, resolve
from kvarn.models.tokenizer import Tokenizer
from tests.models.paged import PagedRunner
from tests.models.tiny import SIZES, reference_logits, reference_model, save_model, write_gguf

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "llama_tied": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=16),
}


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_model(CONFIGS["llama"](), folder)
    return write_gguf(folder, folder / "tiny.gguf")


@pytest.mark.parametrize("family", CONFIGS)
def test_a_converted_model_is_the_model_it_was(family: str, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    save_model(CONFIGS[family](), source)
    convert(write_gguf(source, tmp_path / "m.gguf"), target)
    before, after = load_file(source / "model.safetensors"), load_file(target / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    tokens = list(range(3, 60))
    expected = reference_logits(reference_model(source), tokens)
    for logits in (
        reference_logits(reference_model(target), tokens),
        PagedRunner(load_decoder(ModelFiles(family, target, "gguf"), precision="float32")).step(
            {0: tokens}, every_row=True
        ),
    ):
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
    tokenizer = Tokenizer.load(target)
    assert tokenizer.encode("cab<eos>") == [5, 11, 2]
    assert tokenizer.eos_tokens == {2}


@pytest.mark.parametrize(("kind", "error"), [("F16", 2e-3), ("BF16", 2e-2), ("Q8_0", 3e-2), ("Q4_1", 0.3)])
def test_quantised_tensors_stay_within_their_quantisation_error(kind: str, error: float, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    save_model(CONFIGS["llama"](), source)
    convert(write_gguf(source, tmp_path / "m.gguf", gguf.GGMLQuantizationType[kind]), target)
    before, after = load_file(source / "model.safetensors"), load_file(target / "model.safetensors")
    for name, tensor in before.items():
        assert float((tensor - after[name].float()).abs().max() / tensor.abs().max()) < error


@given(share=st.floats(0, 1, exclude_max=True))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_truncated_file_is_a_model_error(
    tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory, share: float
) -> None:
    """Law: whatever is missing at the end, the error names the file."""
    folder = tmp_path_factory.mktemp("cut")
    data = tiny_gguf.read_bytes()
    (folder / "cut.gguf").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ModelError, match=r"cut\.gguf"):
        convert(folder / "cut.gguf", folder)


@given(at=st.integers(0, 6_000), value=st.integers(0, 255))
@settings(max_examples=60, deadline=None)
def test_a_flipped_byte_never_raises_anything_else(
    tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory, at: int, value: int
) -> None:
    """Law: a header with one wrong byte converts or is a ModelError."""
    folder = tmp_path_factory.mktemp("flip")
    data = bytearray(tiny_gguf.read_bytes())
    data[at] = value
    (folder / "flip.gguf").write_bytes(data)
    try:
        convert(folder / "flip.gguf", folder)
    except ModelError as error:
        assert "flip.gguf" in str(error)


def test_an_architecture_nobody_knows_is_named(tmp_path: Path, tiny_gguf: Path) -> None:
    path = tmp_path / "odd.gguf"
    path.write_bytes(tiny_gguf.read_bytes().replace(b"llama", b"lxyzx"))
    with pytest.raises(ModelError, match="lxyzx"):
        convert(path, tmp_path)


# ---- the cache -------------------------------------------------------------------------------------------


def converted(cache: Path) -> list[str]:
    """Folders of the cache; lock files may stay."""
    return sorted(path.name for path in (cache / "models").iterdir() if path.is_dir())


def test_a_file_is_converted_once_and_again_when_it_changes(
    tmp_path: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVARN_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny_gguf.read_bytes())
    first = resolve(str(path))
    assert (first.name, first.origin) == ("m", "gguf")
    stamp = (first.folder / "config.json").stat().st_mtime_ns
    assert resolve(str(path)) == first and (first.folder / "config.json").stat().st_mtime_ns == stamp
    os.utime(path, ns=(1, 1))
    assert resolve(str(path)).folder != first.folder


def _resolve_in_child(path: str, cache: str) -> str:
    os.environ["KVARN_CACHE"] = cache
    return str(resolve(path).folder)


def test_processes_that_convert_at_once_share_one_result(tmp_path: Path, tiny_gguf: Path) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        folders = pool.starmap(_resolve_in_child, [(str(tiny_gguf), str(tmp_path))] * 2)
    assert len(set(folders)) == 1
    assert converted(tmp_path) == [Path(folders[0]).name]


def test_a_killed_conversion_leaves_nothing_that_looks_whole(tmp_path: Path, tiny_gguf: Path) -> None:
    code = (
        "import sys, time, kvarn.models.sources as s\n"
        "def stop(stage, fraction):\n"
        "    if stage == 'converting the weights' and fraction > 0.5:\n"
        "        print('half', flush=True); time.sleep(60)\n"
        f"s.resolve({str(tiny_gguf)!r}, progress=stop)\n"
    )
    environment = {**os.environ, "KVARN_CACHE": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"half\n"
        child.send_signal(signal.SIGKILL)
    assert all(name.endswith(".partial") for name in converted(tmp_path))
    assert _resolve_and_load(tiny_gguf, tmp_path) == converted(tmp_path)


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(tmp_path: Path, tiny_gguf: Path) -> None:
    code = (
        "import resource, sys\n"
        "from kvarn.errors import ModelError\n"
        "from kvarn.models.sources import resolve\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({1 << 16}, {resource.RLIM_INFINITY}))\n"
        "try:\n"
        f"    resolve({str(tiny_gguf)!r})\n"
        "except ModelError as error:\n"
        "    assert 'KVARN_CACHE' in str(error), error\n"
        "    sys.exit(7)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], env={**os.environ, "KVARN_CACHE": str(tmp_path)})
    assert result.returncode == 7
    assert converted(tmp_path) == []


def _resolve_and_load(path: Path, cache: Path) -> list[str]:
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        folder = Path(pool.apply(_resolve_in_child, (str(path), str(cache))))
    load_decoder(ModelFiles("tiny", folder, "gguf"), precision="float32")
    return [folder.name]
