"""Which ways of reusing segments a model has been certified for: a file beside the converted models.

`kvarn model certify-reuse` writes it; an engine with reuse "auto" reads it where it is built. A certificate holds for
one model in one form: other weights, another precision or another block size has another file, or none, and is served
exactly.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from kvarn.errors import KvarnError
from kvarn.models.sources import cache_dir
from kvarn.serving.quality.figures import Quality
from kvarn.serving.rounds.hints import ReuseMode
from kvarn.serving.rounds.settings import ReuseSettings

VERSION: Final = 1
PREFERRED: Final[tuple[ReuseMode, ...]] = ("collective", "lego", "batched")
"""The cheapest first: pages that a round shares, the same without looking, copies for each."""
_SAMPLE: Final = 2**16
"""Bytes of each weights file that are looked at, at its begin, middle and end."""
_log = logging.getLogger(__name__)


class Identity(msgspec.Struct, frozen=True):
    """What a certificate is for."""

    model: str
    precision: str
    kv_dtype: str
    block_size: int
    encoding: str
    """What segments are encoded behind: the source and its sinks; see kvarn.serving.rounds.settings."""
    weights: str
    """Digest of config.json and of samples of the weights; see `fingerprint`."""


class Limits(msgspec.Struct, frozen=True):
    """What a way of reuse must keep to be allowed."""

    mean_kl: float = 0.05
    """Nats at most."""
    top1: float = 0.95
    needle: float = 0.95

    def keeps(self, quality: Quality) -> bool:
        """Without a question that the exact engine answers, questions say nothing."""
        needle = 1.0 if quality.needle is None else quality.needle
        return quality.mean_kl <= self.mean_kl and quality.top1 >= self.top1 and needle >= self.needle

    def validate(self) -> None:
        for name, value, high in (("max-kl", self.mean_kl, 100.0), ("min-top1", self.top1, 1.0),
                                  ("min-needle", self.needle, 1.0)):  # fmt: skip
            if not 0 <= value <= high:
                raise KvarnError(f"--{name} is {value}; expected 0 to {high:g}")


class Measured(msgspec.Struct, frozen=True):
    """One way of reuse and what it does to answers."""

    mode: ReuseMode
    share: float
    """Of the tokens of shared segments, computed anew; with "lego", 0: `lego_blocks` blocks of each."""
    lego_blocks: int
    quality: Quality

    def settings(self, wait: float) -> ReuseSettings:
        return ReuseSettings(mode=self.mode, share=self.share, lego_blocks=self.lego_blocks, wait=wait)


class Certificate(msgspec.Struct, frozen=True):
    """See the module."""

    version: int
    identity: Identity
    limits: Limits
    measured: list[Measured]
    allowed: list[Measured]
    """Of each mode the way that computes the least anew and keeps the limits, the preferred mode first."""
    floor: Quality
    """Of computing everything anew, in another order: what no way of reuse is to blame for."""
    groups: int
    seed: int
    date: str

    def allows(self, settings: ReuseSettings) -> bool:
        """Whether these settings compute at least as much anew as has been found to be enough."""
        mode = "batched" if settings.mode == "serial" else settings.mode  # the same tokens, one request at a time
        return any(
            each.mode == mode and each.share <= settings.share and each.lego_blocks <= settings.lego_blocks
            for each in self.allowed
        )


def allowed(measured: Sequence[Measured], limits: Limits) -> list[Measured]:
    """Of each mode the way that computes the least anew of those that keep the limits, with all that compute more."""
    found = []
    for mode in PREFERRED:
        ways = sorted((each for each in measured if each.mode == mode), key=lambda each: (each.share, each.lego_blocks))
        while ways and limits.keeps(ways[-1].quality):
            least = ways.pop()
            if not ways or not limits.keeps(ways[-1].quality):
                found.append(least)
                break
    return found


def fingerprint(folder: Path) -> str:
    """Changes with the model's config and weights; reads little of large files."""
    digest = hashlib.blake2b((folder / "config.json").read_bytes(), digest_size=16)
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for start in (0, size // 2, max(0, size - _SAMPLE)):
                stream.seek(start)
                digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()


def path_of(identity: Identity) -> Path:
    """Where the certificate of a model lies, or would lie."""
    digest = hashlib.blake2b(msgspec.json.encode(identity), digest_size=6).hexdigest()
    name = re.sub(r"[^\w.-]+", "-", identity.model)
    return cache_dir() / "certificates" / f"{name}-{digest}.json"


def write(certificate: Certificate) -> Path:
    """KvarnError where that cannot be written."""
    path = path_of(certificate.identity)
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(certificate)) + b"\n")
        partial.replace(path)
    except OSError as error:
        raise KvarnError(
            f"cannot write the certificate to {path.parent}: {error.strerror}; set KVARN_CACHE to a writable folder"
        ) from error
    return path


def read(identity: Identity) -> Certificate | None:
    """None where there is none, or one that another version has written, or of something else."""
    path = path_of(identity)
    try:
        certificate = msgspec.json.decode(path.read_bytes(), type=Certificate)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        _log.warning("%s is not a readable certificate (%s): certify the model again", path, error)
        return None
    return certificate if (certificate.version, certificate.identity) == (VERSION, identity) else None
