"""An engine without a model: it draws tokens as fast as it can write, or at a set pace, to measure what is above it.

Speaks the messages of the real engine process over the inherited socket. The tokens are a clock: each is the time at
which it was sent, in units of 100 µs on the monotonic clock that all processes of a machine share, so that a client
which asks for token ids can tell how long each took to reach it (modulo `WRAP_SECONDS`).

    STET_NULL_STEP_SECONDS   time from one step to the next; 0 (the default) is as fast as it can
"""

from __future__ import annotations

import os
import platform
import select
import socket
import sys
import time

from models.loader import load_config, resolve_model, weights_hash
from server.engine.identity import Identity
from server.engine.messages import (
    Abort,
    Delta,
    FirstToken,
    FrameBuffer,
    FromEngine,
    Heartbeat,
    Ready,
    Shutdown,
    StepOutput,
    StepStats,
    Submit,
    decode_to_engine,
    encode,
)
from server.engine.request import FinishReason

TICK_SECONDS = 1e-4
NUM_TICKS = 4000
FIRST_TICK_ID = 64
WRAP_SECONDS = TICK_SECONDS * NUM_TICKS
BEAT_SECONDS = 0.2


def tick_now() -> int:
    """The token id that stands for this moment."""
    return FIRST_TICK_ID + int(time.monotonic() / TICK_SECONDS) % NUM_TICKS


def seconds_since(tick: int, now: float) -> float:
    """How long ago a token was sent, at `now` on the monotonic clock; right for less than WRAP_SECONDS."""
    return (now - (tick - FIRST_TICK_ID) * TICK_SECONDS) % WRAP_SECONDS


class NullEngine:
    """One step gives every open request one token."""

    def __init__(self, sock: socket.socket, step_seconds: float) -> None:
        self.sock = sock
        self.step_seconds = step_seconds
        self.inbox = FrameBuffer()
        self.open: dict[int, list[int]] = {}  # request id -> [tokens left, whether it has had its first]
        self.step_id = 0

    def send(self, message: FromEngine) -> None:
        self.sock.sendall(encode(message))

    def run(self) -> None:
        """Until Shutdown or the end of the socket."""
        self.send(ready())
        next_step = last_beat = time.monotonic()
        while True:
            now = time.monotonic()
            if now - last_beat > BEAT_SECONDS:
                self.send(
                    Heartbeat("step" if self.open else "idle", self.step_id, 0.0, 0.0, len(self.open), 0, 1, 0, 0)
                )
                last_beat = now
            wait = max(0.0, next_step - now) if self.open else BEAT_SECONDS
            if select.select([self.sock], [], [], wait)[0]:
                data = self.sock.recv(1 << 20)
                if not data or not self.handle(data):
                    return
            if self.open and time.monotonic() >= next_step:
                next_step = time.monotonic() + self.step_seconds
                self.step()

    def handle(self, data: bytes) -> bool:
        """Take messages; False on Shutdown."""
        for body in self.inbox.feed(data):
            match decode_to_engine(body):
                case Submit() as submit:
                    self.open[submit.request_id] = [submit.params.max_new_tokens - len(submit.output_token_ids), 0]
                case Abort() as abort:
                    for request_id in abort.request_ids:
                        self.open.pop(request_id, None)
                case Shutdown():
                    return False
        return True

    def step(self) -> None:
        """One token for everybody."""
        tick = tick_now()
        deltas = []
        for request_id, state in list(self.open.items()):
            state[0] -= 1
            first = None if state[1] else FirstToken(0, 0.0, 0.0)
            state[1] = 1
            reason = FinishReason.LENGTH if state[0] == 0 else None
            if reason:
                del self.open[request_id]
            deltas.append(Delta(request_id, [tick], reason, first=first))
        self.step_id += 1
        count = len(deltas)
        self.send(StepOutput(deltas, StepStats(self.step_id, 0.0, 0, 0, count, 0, 0, 0, 0, 0, count, 0, 1, 0, 0)))


def ready() -> Ready:
    """What a real engine would say of the embedded model, whose tokenizer the server needs."""
    path = resolve_model("stet-tales")
    config = load_config(path)
    identity = Identity(
        model="null",
        architecture="null",
        weights_hash=weights_hash(path),
        num_parameters=0,
        dtype="none",
        kv_cache_dtype="none",
        quantization="none",
        device="none",
        instruction_set="none",
        threads=0,
        versions={"python": platform.python_version()},
    )
    return Ready(
        identity=identity,
        max_model_len=1 << 20,
        num_blocks=1 << 16,
        block_size=16,
        vocab_size=config.vocab_size,
        eos_token_ids=list(config.eos_token_ids),
        max_running=1 << 16,
        memory_bytes={},
        model_path=str(path),
        startup_seconds={},
    )


def main() -> None:
    sock = socket.socket(fileno=int(sys.argv[1]))
    sock.setblocking(True)
    NullEngine(sock, float(os.environ.get("STET_NULL_STEP_SECONDS", "0"))).run()


if __name__ == "__main__":
    main()
