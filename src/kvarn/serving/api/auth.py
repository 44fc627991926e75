"""API keys: which bearer token may ask, and which tenant it stands for."""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from hashlib import sha256

from kvarn.errors import RequestError


class ApiKeys:
    """The accepted keys. Only their hashes are kept; comparing takes the same time whatever was sent."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._hashes = [sha256(key.encode()).digest() for key in keys]

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
        return sent.hex()[:16]
