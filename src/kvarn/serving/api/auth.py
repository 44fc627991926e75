"""API keys: which bearer token may ask, and which tenant it stands for."""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Mapping
from hashlib import sha256

from kvarn.errors import RequestError


class ApiKeys:
    """The accepted keys. Only their hashes are kept; comparing takes the same time whatever was sent."""

    def __init__(self, keys: Iterable[str], stream_rates: Mapping[str, float] | None = None) -> None:
        """`stream_rates`: the fastest that readers with a key are believed to be, in tokens per second."""
        self._hashes = [sha256(key.encode()).digest() for key in keys]
        self._rates = {_name(sha256(key.encode()).digest()): rate for key, rate in (stream_rates or {}).items()}

    def fastest(self, tenant: str, otherwise: float) -> float:
        """The fastest that a tenant's readers are believed to be."""
        return self._rates.get(tenant, otherwise)

    def tenant(self, authorization: str | None) -> str:
        """The tenant of a request with this Authorization header: it salts the prefix cache, so that no tenant can
        learn from timing what another one asked. Empty where no keys are set. Raises RequestError (401)."""
        if not self._hashes:
            return ""
        scheme, _, key = (authorization or "").partition(" ")
        sent = sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        # Every key is compared, so time does not tell which one was near.
        known = [hmac.compare_digest(sent, own) for own in self._hashes]
        if scheme.lower() != "bearer" or not any(known):
            raise RequestError(
                "missing or wrong API key; send it as 'Authorization: Bearer KEY'", code="invalid_api_key", status=401
            )
        return _name(sent)


def _name(hashed: bytes) -> str:
    return hashed.hex()[:16]
