"""What having a request on the device for the next tick is worth. Arrays in, arrays out.

The published utility subtracts a penalty that grows as the buffer empties, so that whoever has nothing to read would
come last; serving a request *removes* that penalty, so here it is added. And e^-b falls below 1 % at five tokens, a
quarter of a second: the scale here is seconds of slack, set by how long a detour off the device takes.

Source: TokenFlow (arXiv 2510.02758), Eq. 1 and 3.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvarn.serving.policies.streaming.settings import StreamingSettings

Column = NDArray[np.float64]

_FULL_SHARE, _NO_SHARE = 0.1, 0.2
"""Share of the text unread up to which a further token counts fully, and from which it counts nothing."""


def token_value(unread: Column, length: Column) -> Column:
    """Worth of one more token (0 to 1) when so many are unread of a text expected to have `length`; shape (n,)."""
    return np.clip((_NO_SHARE - unread / length) / (_NO_SHARE - _FULL_SHARE), 0.0, 1.0)


def gains(
    slack: Column, unread: Column, length: Column, overhead: Column, delay: float, scale: float, set: StreamingSettings
) -> Column:
    """Shape (n,). slack, unread: seconds and tokens a reader has left when his request can run, in `overhead` seconds.

    delay   seconds that newcomers have lately waited, at most a tick
    scale   seconds of slack over which urgency falls to 1/e
    """
    value = token_value(unread, length)
    if set.gain == "published":
        return value * (delay - overhead) - set.urgency * delay * np.exp(-unread)
    useful = np.minimum(delay, np.maximum(0.0, set.tick - overhead))
    return value * useful + set.urgency * delay * np.exp(-slack / scale)
