"""Answers taken apart byte by byte, by h11 as the oracle; events; plots; what is sent and when."""

from __future__ import annotations

import math
import random
import statistics
import xml.etree.ElementTree as ElementTree
from itertools import islice, pairwise

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.bench import svg
from server.bench.client import parse_url
from server.bench.command import _duration, _lengths
from server.bench.dialect import Usage, read_event
from server.bench.wire import EventReader, ResponseReader, WireError
from server.bench.workload import SHAREGPT_OUTPUT, SHAREGPT_PROMPT, Lengths, Workload, arrivals

EVENTS = [b"data: {}\n\n", b": keep-alive\n\n", b"id: 7\ndata: a\ndata:b\n\n", b"data: c\r\n\r\n", b"event: x\n\n"]
VALUES = st.one_of(st.just(0.0), st.floats(1e-6, 1e6))
DATA = {0: b"{}", 2: b"a\nb", 3: b"c"}


def cut(data: bytes, at: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(place % (len(data) + 1) for place in at)})
    return [data[begin:end] for begin, end in pairwise(places)]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 4), max_size=8),
    st.lists(st.integers(0, 400), max_size=12),
    st.lists(st.integers(0, 900), max_size=12),
    st.sampled_from(["chunked", "length", "end"]),
)
def test_any_cuts_give_the_same(numbers: list[int], chunks: list[int], packets: list[int], framing: str) -> None:
    body = b"".join(EVENTS[number] for number in numbers)
    headers = {"chunked": [("Transfer-Encoding", "chunked")], "length": [("Content-Length", str(len(body)))], "end": []}
    there = h11.Connection(h11.SERVER)
    # To a client of HTTP/1.0 a body without a length ends with the connection.
    there.receive_data(b"GET / HTTP/1.%d\r\nHost: a\r\nConnection: close\r\n\r\n" % (framing != "end"))
    there.next_event()
    head = h11.Response(status_code=200, headers=[*headers[framing], ("X-Two", "a: b")])
    parts = [there.send(head), *(there.send(h11.Data(data=piece)) for piece in cut(body, chunks) if piece)]
    wire = b"".join(part or b"" for part in [*parts, there.send(h11.EndOfMessage())])

    reader, events, found = ResponseReader(), EventReader(), []
    for packet in cut(b"HTTP/1.1 100 Continue\r\n\r\n" + wire, packets):
        found += events.feed(reader.feed(packet))
    assert reader.done == (framing != "end")
    reader.end()
    assert (reader.status, reader.headers["x-two"], reader.done) == (200, "a: b", True)
    assert found == [DATA[number] for number in numbers if number in DATA]


def test_an_answer_that_is_cut_off_is_no_answer() -> None:
    for wire in (
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
    ):
        reader = ResponseReader()
        reader.feed(wire)
        with pytest.raises(WireError):
            reader.end()
    for wire in (b"SSH-2.0-x\r\n\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"x" * 70_000):
        with pytest.raises(WireError):
            ResponseReader().feed(wire)


def test_events_of_all_dialects() -> None:
    assert read_event(b'{"id":"a","index":0,"text":" b"}').has_text
    assert read_event(b'{"choices":[{"delta":{"content":"b"}}]}').has_text
    assert not read_event(b'{"choices":[{"delta":{"role":"assistant","content":""}}]}').has_text
    assert read_event(b'{"choices":[{"text":"","finish_reason":"length"}]}').finish_reason == "length"
    openai = (
        b'{"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":4}}}'
    )
    native = b'{"usage":{"prompt_tokens":5,"completion_tokens":3,"cached_tokens":4}}'
    assert read_event(openai).usage == read_event(native).usage == Usage(5, 3, 4)
    assert read_event(b'{"error":{"message":"a\\nb"}}').error == "a b"
    assert read_event(b"[DONE]").done
    with pytest.raises(ValueError, match="object"):
        read_event(b"[]")


def test_arrivals_have_their_rate_and_their_law() -> None:
    constant = list(arrivals("constant", 20.0, 2.0, random.Random(1)))
    assert constant == pytest.approx([0.025 + 0.05 * n for n in range(40)])
    times = list(arrivals("poisson", 50.0, 200.0, random.Random(1)))
    gaps = [after - before for before, after in pairwise(times)]
    assert len(times) == pytest.approx(10_000, rel=0.03)
    # Of an exponential distribution the deviation is the mean, and 1/e of all are above it.
    assert statistics.stdev(gaps) == pytest.approx(0.02, rel=0.05)
    assert sum(gap > 0.02 for gap in gaps) / len(gaps) == pytest.approx(1 / math.e, abs=0.02)
    assert times == list(arrivals("poisson", 50.0, 200.0, random.Random(1)))
    firsts = [next(iter(arrivals("poisson", 50.0, 200.0, random.Random(seed)))) for seed in range(1_000)]
    assert statistics.mean(firsts) == pytest.approx(0.02, rel=0.15)
    assert statistics.stdev(firsts) == pytest.approx(0.02, rel=0.15)


def test_lengths_are_those_that_the_help_promises() -> None:
    rng = random.Random(3)
    for lengths, mean in ((SHAREGPT_PROMPT, 161), (SHAREGPT_OUTPUT, 338)):
        assert lengths.mean == pytest.approx(mean, rel=0.005)
        drawn = [lengths.draw(rng) for _ in range(20_000)]
        assert statistics.median(drawn) == pytest.approx(lengths.median, rel=0.03)
        # The upper bound takes a little away.
        assert statistics.mean(drawn) == pytest.approx(mean, rel=0.04)
        assert statistics.stdev(map(math.log, drawn)) == pytest.approx(lengths.sigma, rel=0.05)
    work = Workload(SHAREGPT_PROMPT, SHAREGPT_OUTPUT, 1.5, max_total=256)
    found = list(islice(work.jobs(7), 2_000))
    assert found == list(islice(work.jobs(7), 2_000))
    assert len({job.prompt for job in found}) > 1_990
    assert all(job.max_tokens >= 1 and 1.5 * len(job.prompt.split()) + job.max_tokens <= 256 for job in found)
    other = Workload(SHAREGPT_PROMPT, SHAREGPT_OUTPUT, 2.5, max_total=256)  # another tokenizer, the same lengths
    assert [job.max_tokens for job in islice(other.jobs(7), 200)] == [job.max_tokens for job in found[:200]]
    assert {job.max_tokens for job in islice(Workload(Lengths(9), Lengths(64), 1.0).jobs(1), 50)} == {64}


def test_flags_say_what_is_allowed() -> None:
    assert [_duration(text) for text in ("200ms", "1.5s", "2", "5m", "1h")] == [0.2, 1.5, 2.0, 300.0, 3600.0]
    assert _lengths("200:0.8") == Lengths(200.0, 0.8)
    assert parse_url("localhost:8000/v1") == ("localhost", 8000, "", False)
    assert parse_url("https://example.org/a/v1/") == ("example.org", 443, "/a", True)
    for parse, text in ((_duration, "soon"), (_duration, "-1s"), (_lengths, "0"), (_lengths, "5:9"), (_lengths, "a:1")):
        with pytest.raises(ValueError, match=r"such as|above 0"):
            parse(text)
    for url in ("ftp://a", "http://", "http://a:99999", "http://u:p@a", "http://a?b=1"):
        with pytest.raises(ValueError, match="address"):
            parse_url(url)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=20),
    st.booleans(),
    st.booleans(),
)
def test_every_point_of_a_plot_is_inside_its_panel(points: list[tuple[float, float]], log_x: bool, log_y: bool) -> None:
    panel = svg.Panel("a < b", svg.Axis("x", log_x), svg.Axis("y", log_y, low=0), [svg.Series("one", points)])
    root = ElementTree.fromstring(svg.figure([panel, panel], "t & t", 2, ["a note"]))
    circles = list(root.iter("{http://www.w3.org/2000/svg}circle"))
    shown = [(x, y) for x, y in points if (x > 0 or not log_x) and (y > 0 or not log_y)]
    assert len(circles) == 2 * len(shown)
    for circle in circles:
        assert svg.LEFT - 0.1 <= float(circle.attrib["cx"]) <= svg.WIDTH - svg.RIGHT + 0.1
        assert svg.TOP - 0.1 <= float(circle.attrib["cy"]) <= svg.HEIGHT - svg.BOTTOM + 0.1


def test_ticks_cover_what_is_shown() -> None:
    assert svg.log_ticks(0.3, 7.0) == pytest.approx([0.2, 0.5, 1, 2, 5, 10])
    assert svg.log_ticks(3.0, 3.0) == [2, 5]
    assert svg.linear_ticks(0, 23) == [0, 5, 10, 15, 20, 25]
    assert svg.linear_ticks(4, 4) == pytest.approx([4, 5])
