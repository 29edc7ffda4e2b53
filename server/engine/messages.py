"""All that crosses the boundary between the HTTP process and the engine process.

A frame is four bytes of length (big endian) and one msgpack body (msgspec structs, tagged by type). The first frame is
`Init`, from the parent; the engine answers `Progress` while it loads, then `Ready` or `Failed`. From then on the parent
sends `Submit`, `Abort` and `Shutdown`; the engine sends one `StepOutput` a step, and a `Heartbeat` every 200 ms.
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec

from server.engine.config import EngineConfig
from server.engine.identity import Identity
from server.engine.request import FinishReason, SamplingParams
from server.engine.scores import Details

MAX_FRAME_BYTES = 64 * 1024 * 1024
_LENGTH = struct.Struct(">I")


class Init(msgspec.Struct, frozen=True, tag="init"):
    config: EngineConfig


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    """A request, new or taken up again: `output_token_ids` are the tokens already delivered.

    dry_run: generate nothing; one Delta answers, whose `first` tells how much of the prompt is cached.
    """

    request_id: int
    prompt_token_ids: list[int]
    params: SamplingParams
    output_token_ids: list[int] = []
    choice: int = 0
    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""
    arrival: int = 0
    dry_run: bool = False


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    request_ids: list[int]


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Finish the step in flight and exit."""


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The engine is warm. The limits here are the engine's own; it validates against them again.

    `fallbacks`: how often each operator took its slower path, by operator, while the engine started.
    `receipt`: the quality receipt of what is served (server/engine/receipts.py), as JSON values; None if there is none.
    """

    identity: Identity
    max_model_len: int
    num_blocks: int
    block_size: int
    vocab_size: int
    eos_token_ids: list[int]
    max_running: int
    memory_bytes: dict[str, int]
    model_path: str
    startup_seconds: dict[str, float]
    fallbacks: dict[str, int] = {}
    receipt: dict[str, Any] | None = None


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """A phase of the start: "load" or "warmup"; `fraction` is None where it cannot be told."""

    phase: str
    message: str
    fraction: float | None = None


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The engine cannot start: one line for a person. `usage` errors (a bad model, a bad flag) are not retried."""

    message: str
    usage: bool


class FirstToken(msgspec.Struct, frozen=True):
    """Sent with a request's first tokens since its (re)submission. Seconds."""

    cached_tokens: int
    queue_seconds: float
    prefill_seconds: float


class Delta(msgspec.Struct, frozen=True):
    """New tokens of one request from one step, and its end if it ended.

    `stop_token_id` is set when an end-of-sequence or stop token ended it; that token is the last of `token_ids`.
    `refused`: it was not begun, and cannot be; `error` says why, for the client.
    """

    request_id: int
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None
    first: FirstToken | None = None
    details: Details | None = None
    refused: bool = False


class StepStats(msgspec.Struct, frozen=True):
    """One step in numbers. Counters are this step's own share; gauges are the state after it.

    Every position computed is a prompt position seen for the first time, a recomputed one, or the input of a decode
    row, which counts as the token it draws: step_tokens = prompt + recomputed + sampled.
    `pipeline_discarded_tokens` of the sampled ones were drawn for requests that had ended in the meantime.
    `fallbacks`: how often each operator took its slower path since the step before, by operator.
    """

    step_id: int
    duration_seconds: float
    prompt_tokens: int
    recomputed_tokens: int
    sampled_tokens: int
    pipeline_discarded_tokens: int
    cached_prompt_tokens: int
    prefix_queried_tokens: int
    prefix_hit_tokens: int
    preemptions: int
    num_running: int
    num_waiting: int
    blocks_free: int
    blocks_used: int
    blocks_cached: int
    fallbacks: dict[str, int] = {}


class StepOutput(msgspec.Struct, frozen=True, tag="step"):
    """All that one step brought. `stats` is None when only an abort or a refusal is reported between steps."""

    deltas: list[Delta]
    stats: StepStats | None = None


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat"):
    """Sent by a thread of its own, so that it arrives during a long step.

    phase: load, warmup, idle or step. `phase_seconds`: how long it has been in this phase (this step).
    `predicted_seconds`: what the step is expected to take, from the cost of earlier ones; 0 when unknown.
    Gauges as in StepStats, so that an idle engine's are fresh too.
    """

    phase: str
    step_id: int
    phase_seconds: float
    predicted_seconds: float
    num_running: int
    num_waiting: int
    blocks_free: int
    blocks_used: int
    blocks_cached: int


ToEngine = Init | Submit | Abort | Shutdown
FromEngine = Ready | Progress | Failed | StepOutput | Heartbeat

_encoder = msgspec.msgpack.Encoder()
_to_engine = msgspec.msgpack.Decoder(ToEngine)
_from_engine = msgspec.msgpack.Decoder(FromEngine)


class FrameError(Exception):
    """The peer sent something that is no frame of ours: the connection cannot be trusted any more."""


def encode(message: ToEngine | FromEngine) -> bytes:
    """One frame. Raises FrameError above MAX_FRAME_BYTES."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise FrameError(f"a {type(message).__name__} of {len(body)} bytes exceeds the frame limit")
    return _LENGTH.pack(len(body)) + body


def decode_to_engine(body: bytes) -> ToEngine:
    """The message in a frame's body. Raises FrameError."""
    try:
        message: ToEngine = _to_engine.decode(body)
    except msgspec.MsgspecError as error:
        raise FrameError(f"undecodable frame: {error}") from error
    return message


def decode_from_engine(body: bytes) -> FromEngine:
    """The message in a frame's body. Raises FrameError."""
    try:
        message: FromEngine = _from_engine.decode(body)
    except msgspec.MsgspecError as error:
        raise FrameError(f"undecodable frame: {error}") from error
    return message


class FrameBuffer:
    """Cuts a byte stream into frame bodies. Holds at most one incomplete frame."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes | memoryview) -> list[bytes]:
        """Bodies completed by these bytes, in order. Raises FrameError on a length above the limit."""
        self._data += data
        bodies: list[bytes] = []
        start = 0
        while len(self._data) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._data, start)
            if length > MAX_FRAME_BYTES:
                raise FrameError(f"a frame of {length} bytes exceeds the limit")
            stop = start + _LENGTH.size + length
            if len(self._data) < stop:
                break
            bodies.append(bytes(self._data[start + _LENGTH.size : stop]))
            start = stop
        del self._data[:start]
        return bodies
