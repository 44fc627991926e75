"""Whether to bring a waiting request's KV back from the host or to compute it again, for policies that need no more
of the tiers than that."""

from __future__ import annotations

from kvarn.serving.policies.protocol import RequestView, Snapshot


def worth_loading(snapshot: Snapshot, request: RequestView, cached_tokens: int) -> int:
    """Tokens to load rather than compute, beyond the `cached_tokens` that the device holds; 0 for none.

    Loading keeps one request waiting, computing all that run: so much sooner it has to be done (the published rule
    compares the seconds alone, and computes again while the link is busy, which makes everybody late).
    What the tiers refused to load, or failed to, they no longer report, so a request that is not worth loading now is
    computed: asking for a load can never keep it waiting.
    """
    tiers = snapshot.tiers
    if tiers is None:
        return 0
    gained = tiers.loadable_tokens(request.id) - cached_tokens
    if gained <= 0:
        return 0
    seconds = tiers.load_seconds(request.id, gained // snapshot.block_size)
    return gained if seconds < snapshot.costs.prefill_seconds(gained) * max(1, len(snapshot.running)) else 0
