"""How shared segments are reused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from kvarn.serving.rounds.hints import ReuseMode

DEFAULT_SHARE: Final = 0.15
"""Of the tokens of shared segments, what CacheBlend found to be enough."""


@dataclass(frozen=True, slots=True)
class ReuseSettings:
    """See the fields."""

    mode: ReuseMode = "collective"
    share: float = DEFAULT_SHARE
    """Of the tokens of a prompt's shared segments, so many are computed anew in their places."""
    wait: float = 0.05
    """Seconds that a round waits for members that have not come."""
    source: Literal["joint", "isolated"] = "joint"
    """What a segment is encoded behind: "isolated", the sink alone; "joint", also the segments before it, where all
    members of a round read the same ones."""
    alone: bool = True
    """Whether segments that cannot be encoded together are reused too; a certificate for "joint" is not for them."""
    sink_tokens: int = 4
    """Leading tokens of the prompt that a segment is encoded behind: else its own first would get their attention.
    Segments that are encoded alone are shared where these are the same."""
    joint_sink: int = 16
    """The most of them behind which segments are encoded together, as far as all members begin alike."""
    shortest: int = 32
    """Tokens of a segment that is worth the trouble."""
    lego_blocks: int = 1
    """Blocks at the beginning of each segment that "lego" computes anew."""
    probes: int = 1
    """Members of a round in which "collective" looks for what deviates, more where one does not see all segments."""
    share_blocks: bool = True
    """Whether requests read segments in place rather than copy them, where the mode chooses whole blocks."""
    sharpness: Literal["mean", "max"] = "mean"
    """What counts of several members' deviations."""

    @property
    def is_dense(self) -> bool:
        """Whether each request gets copies of its own."""
        return not self.whole_blocks or not self.share_blocks

    @property
    def whole_blocks(self) -> bool:
        """Whether tokens are computed anew by whole blocks."""
        return self.mode in ("collective", "lego")
