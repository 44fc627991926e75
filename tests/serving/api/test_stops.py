"""Stop strings over text in pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvarn.serving.api.stops import StopStrings

letters = st.text("ab", max_size=12)


@given(st.lists(letters, max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.booleans())
def test_pieces_give_what_the_whole_gives(pieces: list[str], stops: list[str], include: bool) -> None:
    """The shown text is the whole text up to the stop string that is complete first, however it was cut in pieces."""
    checker = StopStrings(stops, include=include)
    shown = ""
    for piece in pieces:
        if checker.hit is None:
            shown += checker.push(piece)
            assert not any(stop in shown for stop in stops if not include)
    shown += checker.flush()
    whole = "".join(pieces)
    if not any(stop in whole for stop in stops):
        assert shown == whole and checker.hit is None
        return
    assert checker.hit is not None
    cut = shown if include else shown + checker.hit
    assert whole.startswith(cut) and cut.endswith(checker.hit)
    assert not any(stop in cut[: -len(checker.hit)] for stop in stops)


def test_nothing_is_held_back_without_stop_strings() -> None:
    assert StopStrings([]).push("text") == "text"


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    checker = StopStrings(["END"])
    assert [checker.push("some E"), checker.push("N"), checker.push("t")] == ["some ", "", "ENt"]
