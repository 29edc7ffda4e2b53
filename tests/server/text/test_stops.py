"""Stop strings: the result depends on the text alone, never on how it was cut into pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.text.stops import StopMatcher


def run(pieces: list[str], stops: list[str], include_stop: bool = False) -> tuple[str, str | None]:
    matcher = StopMatcher(stops, include_stop)
    text = ""
    for piece in pieces:
        text += matcher.push(piece)
        if matcher.matched is not None:
            return text, matcher.matched
    return text + matcher.flush(), None


def expected(text: str, stops: list[str], include_stop: bool) -> tuple[str, str | None]:
    """The stop that is complete first; of several that end there, the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include_stop else end - len(stop)], stop
    return text, None


@st.composite
def cut(draw: st.DrawFn) -> tuple[list[str], list[str]]:
    pieces = draw(st.lists(st.text("aab\u00e9", max_size=6), max_size=10))
    stops = draw(st.lists(st.text("aab\u00e9", min_size=1, max_size=5), min_size=1, max_size=4))
    return pieces, stops


@given(cut(), st.booleans())
def test_any_chunking_gives_the_same(case: tuple[list[str], list[str]], include_stop: bool) -> None:
    pieces, stops = case
    assert run(pieces, stops, include_stop) == expected("".join(pieces), stops, include_stop)


@given(cut())
def test_no_more_is_held_back_than_may_become_a_stop(case: tuple[list[str], list[str]]) -> None:
    pieces, stops = case
    matcher = StopMatcher(stops)
    given_text, out = "", ""
    for piece in pieces:
        given_text += piece
        out += matcher.push(piece)
        if matcher.matched is not None:
            return
        held = given_text[len(out) :]
        assert given_text == out + held
        longest = max(
            (n for stop in stops for n in range(len(stop)) if given_text.endswith(stop[:n])),
            default=0,
        )
        assert len(held) == longest


@given(cut(), st.integers(0, 10))
def test_an_unarmed_stop_passes_and_an_armed_one_may_begin_before(
    case: tuple[list[str], list[str]], armed_from: int
) -> None:
    pieces, stops = case
    matcher = StopMatcher(stops)
    out = ""
    for position, piece in enumerate(pieces):
        out += matcher.push(piece, position >= armed_from)
        if matcher.matched is not None:
            break
    else:
        out += matcher.flush()
    text = "".join(pieces)
    unarmed = len("".join(pieces[:armed_from]))
    ends = [end for end in range(unarmed + 1, len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    if not ends:
        assert (out, matcher.matched) == (text, None)
    else:
        stop = max((stop for stop in stops if text[: ends[0]].endswith(stop)), key=len)
        assert (out, matcher.matched) == (text[: ends[0] - len(stop)], stop)


def test_the_first_complete_stop_wins_over_an_earlier_begin() -> None:
    assert run(["xabc", "d"], ["abcd", "bc"]) == ("xa", "bc")


def test_ties_go_to_the_longest() -> None:
    assert run(["xabc"], ["bc", "abc"]) == ("x", "abc")


def test_include_stop_keeps_it() -> None:
    assert run(["one ST", "OP two"], ["STOP"], include_stop=True) == ("one STOP", "STOP")


def test_an_empty_stop_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopMatcher(["a", ""])


def test_a_fresh_matcher_begins_anew_and_alone() -> None:
    matcher = StopMatcher(["abc"])
    assert matcher.push("ab") == ""
    other = matcher.fresh()
    assert other.push("c") == "c"
    assert other.push("ab") == ""
    assert matcher.push("c") == ""
    assert (matcher.matched, other.matched) == ("abc", None)
    assert matcher.fresh().matched is None
    assert other.flush() == "ab"
