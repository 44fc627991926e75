"""Stop strings: cut the text at the first one, and never let out a piece that may be the start of one."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Text goes in piece by piece; what is certainly not part of a stop string comes out."""

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = [stop for stop in stops if stop]
        self._include = include
        self._held = ""
        self.hit: str | None = None
        """The stop string that was found; nothing comes out after it."""

    def push(self, text: str) -> str:
        """Text that may be shown now: up to the first stop string, without any tail that may begin one."""
        if not self._stops or self.hit is not None:
            return "" if self.hit is not None else text
        self._held += text
        found = min(((at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0), default=None)
        if found is not None:
            at, self.hit = found
            return self._held[: at + len(self.hit) if self._include else at]
        keep = self._undecided()
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        """The text held back, once no more can follow."""
        held, self._held = self._held, ""
        return "" if self.hit is not None else held

    def _undecided(self) -> int:
        """Length of the longest tail that is the start of a stop string."""
        longest = min(len(self._held), max(map(len, self._stops)) - 1)
        for length in range(longest, 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
