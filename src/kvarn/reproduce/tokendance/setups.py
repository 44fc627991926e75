"""What experiments have in common, and what the paper leaves open and is chosen here: see `CONDITIONS`."""

from __future__ import annotations

from kvarn.reproduce.contract import Scope
from kvarn.reproduce.tokendance.players import Arm

SHARE = 0.05
"""Of shared tokens, what is computed anew: in the regime in which mirrors can be 11 times smaller (h + r <= 9 %)."""
USUAL_SHARE = 0.15
"""CacheBlend's."""
EXACT = Arm("exact")
COLLECTIVE = Arm("collective", SHARE)
COPIES = Arm("collective", SHARE, share_blocks=False)
BATCHED = Arm("batched", USUAL_SHARE)
SERIAL = Arm("serial", USUAL_SHARE)
LEGO = Arm("lego", SHARE)
SLO_SECONDS = 1.5


def seeds(scope: Scope) -> tuple[int, ...]:
    """One repeat but in a full run: most of this is computed by a real model."""
    return tuple(scope.seeds[: {"quick": 1, "default": 1, "full": 3}[scope.level]])


CONDITIONS = {
    "model": "SmolLM2-135M-Instruct in bfloat16 where kind is real; the paper: Qwen2.5-7B and 14B on an A100",
    "recomputed": (
        f"unless a row says otherwise, {SHARE:.0%} of blocks in collective reuse and {USUAL_SHARE:.0%} of tokens in "
        "serial and batched reuse (CacheBlend's; the paper does not say): X7 has what each diverges by, and collective "
        "reuse, whose segments are encoded together, diverges less"
    ),
    "texts": (
        "scenario: English made here, histories of 192 tokens, and what the model itself answers (64 to 96 tokens); "
        "seeded: random token ids. GenerativeAgents-like: histories of 128 to 512 tokens; AgentSociety-like: 1,024 to "
        "4,096; answers of 32 to 64 tokens where rounds are timed against 1.5 s, since 128 tokens take longer than that"
    ),
    "round latency": (
        "from the last answer of the round before to the last answer of this one; first rounds, which compute the "
        "histories, load the device and do not count"
    ),
    "agents": (
        "the most agents of a society whose rounds keep 1.5 s, while societies come as fast as makes so many rounds a "
        "second. The paper's 2.7 times more agents and its 4 agents against 1 contradict each other"
    ),
    "baseline": "prefix caching: exact, with all of a private history found in the cache",
    "step times": "roofline of the maker's figures with assumed shares (src/kvarn/hardware/accelerators.toml)",
    "intervals": "95 %, Student's t over seeds, where there is more than one",
}
