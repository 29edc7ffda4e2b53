"""The engine process over a real socket pair: ready, tokens, aborts, refusals, and its end."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from server.engine.config import EngineConfig
from server.engine.messages import (
    Abort,
    Failed,
    FrameBuffer,
    FromEngine,
    Heartbeat,
    Init,
    Ready,
    Shutdown,
    StepOutput,
    Submit,
    ToEngine,
    decode_from_engine,
    encode,
)
from server.engine.process import Connection
from server.engine.request import FinishReason, SamplingParams


class Child:
    """The parent's side, without asyncio."""

    def __init__(self, config: EngineConfig, program: Sequence[str] = ("-m", "server.engine.process")) -> None:
        self.sock, theirs = socket.socketpair()
        command = [sys.executable, *program, str(theirs.fileno())]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()
        self.buffer = FrameBuffer()
        self.pending: list[FromEngine] = []
        self.send(Init(config))

    def send(self, message: ToEngine) -> None:
        self.sock.sendall(encode(message))

    def receive(self, timeout: float = 30.0) -> FromEngine:
        """The next message but heartbeats and progress. Raises EOFError when the child is gone."""
        deadline = time.monotonic() + timeout
        while True:
            while self.pending:
                message = self.pending.pop(0)
                if isinstance(message, (Ready, Failed, StepOutput)):
                    return message
            if not select.select([self.sock], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError("the engine said nothing")
            data = self.sock.recv(1 << 16)
            if not data:
                raise EOFError
            self.pending += map(decode_from_engine, self.buffer.feed(data))

    def outputs(self, request_id: int) -> tuple[list[int], FinishReason]:
        """Tokens of one request until it ends."""
        tokens: list[int] = []
        while True:
            message = self.receive()
            assert isinstance(message, StepOutput)
            for delta in message.deltas:
                if delta.request_id == request_id:
                    tokens += delta.token_ids
                    if delta.finish_reason is not None:
                        return tokens, delta.finish_reason


@contextmanager
def engine(
    config: EngineConfig = EngineConfig(),  # noqa: B008 - frozen
    program: Sequence[str] = ("-m", "server.engine.process"),
) -> Iterator[Child]:
    child = Child(config, program)
    try:
        yield child
    finally:
        child.sock.close()
        child.process.wait(10)


def test_a_life_of_an_engine() -> None:
    with engine() as child:
        ready = child.receive()
        assert isinstance(ready, Ready)
        assert ready.vocab_size > 1000
        assert ready.num_blocks * ready.block_size >= ready.max_model_len

        params = SamplingParams(8, temperature=0.0, ignore_eos=True)
        child.send(Submit(1, [5, 6, 7], params))
        tokens, reason = child.outputs(1)
        assert (len(tokens), reason) == (8, FinishReason.LENGTH)

        # The same request taken up again after three tokens goes on to the same end.
        child.send(Submit(2, [5, 6, 7], params, output_token_ids=tokens[:3]))
        assert child.outputs(2)[0] == tokens[3:]

        child.send(Submit(3, [5] * (ready.max_model_len + 1), params))
        assert child.outputs(3) == ([], FinishReason.ERROR)

        # An abort is heard between two steps, and what follows is served at once.
        child.send(Submit(4, [5], SamplingParams(ready.max_model_len - 1, temperature=0.0, ignore_eos=True)))
        child.send(Abort([4]))
        child.send(Submit(5, [5, 6, 7], params))
        assert child.outputs(5)[0] == tokens

        # Signals to the whole group are the parent's business.
        os.kill(child.process.pid, signal.SIGINT)
        os.kill(child.process.pid, signal.SIGTERM)
        child.send(Submit(6, [5, 6, 7], params))
        assert child.outputs(6)[0] == tokens

        child.send(Shutdown())
        assert child.process.wait(10) == 0


def test_a_small_message_takes_little_memory() -> None:
    """Large blocks that are cut to what came leave holes: the engine's heap grew by 5 MB an hour."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        connection = Connection(theirs)
        tracemalloc.start()
        try:
            for request_id in range(3):
                ours.sendall(encode(Abort([request_id])))
                tracemalloc.reset_peak()
                before, _ = tracemalloc.get_traced_memory()
                assert list(connection.receive(wait=True)) == [Abort([request_id])]
                assert tracemalloc.get_traced_memory()[1] - before < 16 * 1024
        finally:
            tracemalloc.stop()


def test_it_does_not_outlive_its_parent() -> None:
    with engine() as child:
        child.receive()
        child.sock.close()
        assert child.process.wait(5) == 0


def test_it_does_not_outlive_its_parent_while_it_loads() -> None:
    with engine() as child:
        time.sleep(0.3)
        child.sock.close()
        assert child.process.wait(5) == 0


def test_a_model_that_is_not_there_is_told_in_one_line(tmp_path: Path) -> None:
    with engine(EngineConfig(model=str(tmp_path / "nothing"), offline=True)) as child:
        failed = child.receive()
        assert isinstance(failed, Failed)
        assert failed.usage
        assert "nothing" in failed.message
        assert "\n" not in failed.message
        assert child.process.wait(10) == 2


def test_the_heart_beats_while_torch_loads() -> None:
    with engine() as child:
        beats: list[Heartbeat] = []
        while not any(isinstance(message, Ready) for message in child.pending):
            assert select.select([child.sock], [], [], 10)[0]
            child.pending += map(decode_from_engine, child.buffer.feed(child.sock.recv(1 << 16)))
        beats = [message for message in child.pending if isinstance(message, Heartbeat)]
        assert len(beats) > 3
        assert beats[0].phase == "load"


LOST_DEVICE = """
import sys
import server.engine.build as build
from server.engine.plan import DeviceFault
from server.engine.process import main

build_engine = build.build_engine

def build_and_break(*arguments):
    engine = build_engine(*arguments)
    def launch(plan):
        raise DeviceFault("planted")
    engine.core._runner.launch = launch
    return engine

build.build_engine = build_and_break
sys.exit(main(int(sys.argv[1])))
"""


def test_a_lost_device_ends_the_process_so_that_a_new_one_can_start(capfd: pytest.CaptureFixture[str]) -> None:
    with engine(program=("-c", LOST_DEVICE)) as child:
        assert isinstance(child.receive(), Ready)
        child.send(Submit(1, [5, 6, 7], SamplingParams(8)))
        assert child.process.wait(10) == 1
    assert "the device is lost to this process: planted" in capfd.readouterr().err
