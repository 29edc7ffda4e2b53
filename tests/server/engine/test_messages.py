"""Frames survive any cut of the byte stream, and nothing else passes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.config import EngineConfig
from server.engine.messages import (
    MAX_FRAME_BYTES,
    Abort,
    Delta,
    FrameBuffer,
    FrameError,
    Init,
    Shutdown,
    StepOutput,
    Submit,
    decode_from_engine,
    decode_to_engine,
    encode,
)
from server.engine.request import FinishReason, SamplingParams

PARAMS = SamplingParams(
    max_new_tokens=5,
    temperature=0.7,
    seed=2**64 - 1,
    logit_bias=((3, -math.inf), (4, 0.1)),
    stop_token_ids=(7,),
    ignore_eos=True,
)
MESSAGES = [
    Init(EngineConfig(model="a model", threads=3)),
    Submit(1, [1, 2, 3], PARAMS, [4], 2, -5, "tenant", "salt", 9),
    Abort([1, 2]),
    Shutdown(),
]


@given(st.lists(st.sampled_from(MESSAGES), max_size=12), st.data())
def test_messages_survive_any_cut_of_the_stream(messages: list[Abort], data: st.DataObject) -> None:
    stream = b"".join(map(encode, messages))
    buffer, received, start = FrameBuffer(), [], 0
    while start < len(stream):
        stop = data.draw(st.integers(start + 1, len(stream)))
        received += [decode_to_engine(body) for body in buffer.feed(stream[start:stop])]
        start = stop
    assert received == messages


def test_what_the_engine_sends_comes_back_equal() -> None:
    output = StepOutput([Delta(1, [5], FinishReason.STOP, stop_token_id=5)])
    (body,) = FrameBuffer().feed(encode(output))
    assert decode_from_engine(body) == output


def test_a_length_above_the_limit_is_refused_before_its_body_arrives() -> None:
    with pytest.raises(FrameError, match="exceeds"):
        FrameBuffer().feed((MAX_FRAME_BYTES + 1).to_bytes(4, "big"))


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x80", encode(Shutdown())[4:-1], encode(StepOutput([]))[4:]])
def test_a_body_that_is_no_message_is_refused(body: bytes) -> None:
    with pytest.raises(FrameError):
        decode_to_engine(body)
