"""A stand-in for the engine process: speaks the real messages over the real socket, without a model and without torch.

    python tests/server/fake_engine.py [OPTIONS as JSON] FD

Tokens are a pure function of (prompt, seed, choice, index), so a request that is taken up again after a crash can be
checked token by token: `expected_tokens` computes them in the test. Options also come from the variable
STET_FAKE_ENGINE. It emits as fast as it can unless told otherwise, so it serves as the null engine of benchmarks too.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import signal
import socket
import sys
import threading
import time
import zlib
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from server.engine.identity import Identity
from server.engine.messages import (
    Abort,
    Delta,
    Failed,
    FirstToken,
    FrameBuffer,
    FromEngine,
    Heartbeat,
    Init,
    Progress,
    Ready,
    Shutdown,
    StepOutput,
    StepStats,
    Submit,
    decode_to_engine,
    encode,
)
from server.engine.request import FinishReason


@dataclass(frozen=True)
class Options:
    """What the engine pretends to be, and how it misbehaves.

    mode              "hash": tokens from a hash; "echo": the prompt again, then the end-of-sequence token
    step_seconds      pause in each step
    tokens_per_step   tokens of one stream in one step
    state_path        a file that counts starts; faults happen in the first `faulty_starts` starts only (None: always)
    crash_after       tokens after which it ends itself (crash_signal 0: exit code 3, else that signal)
    hang_after        tokens after which a step never ends, while the heart beats on
    stop_after        tokens after which it stops altogether (SIGSTOP)
    garbage_after     tokens after which it sends bytes that are no frame
    poison_token      a prompt with this token ends the process when its output reaches poison_position
    refuse            why every request is refused
    long_step_at      the step of this number takes long_step_seconds, and predicts predicted_seconds
    """

    mode: str = "hash"
    model_path: str = ""
    model: str = "fake"
    weights_hash: str = "0" * 64
    vocab_size: int = 1000
    eos_token_id: int = 0
    max_model_len: int = 4096
    max_running: int = 64
    num_blocks: int = 100_000
    block_size: int = 16
    step_seconds: float = 0.0
    tokens_per_step: int = 1
    load_seconds: float = 0.0
    fail: str | None = None
    fail_usage: bool = False
    crash_at_load: bool = False
    state_path: str | None = None
    faulty_starts: int | None = None
    crash_after: int | None = None
    crash_signal: int = 0
    hang_after: int | None = None
    stop_after: int | None = None
    garbage_after: int | None = None
    poison_token: int | None = None
    poison_position: int = 0
    refuse: str | None = None
    long_step_at: int | None = None
    long_step_seconds: float = 0.0
    predicted_seconds: float = 0.0


def _base(prompt: Sequence[int], seed: int, choice: int) -> int:
    return zlib.crc32(array("q", prompt).tobytes(), (seed ^ choice * 2654435761) & 0xFFFFFFFF)


def _hash_token(base: int, index: int, vocab_size: int) -> int:
    """Never the end-of-sequence token 0: such a request ends by its length."""
    return 1 + (base * (2 * index + 1) + index * 40503 >> 7) % (vocab_size - 1)


def expected_tokens(prompt: Sequence[int], seed: int, count: int, choice: int = 0, vocab_size: int = 1000) -> list[int]:
    """What a fake engine in "hash" mode draws for a request."""
    base = _base(prompt, seed, choice)
    return [_hash_token(base, index, vocab_size) for index in range(count)]


@dataclass(eq=False)
class Row:
    submit: Submit
    base: int
    added: float
    output: list[int]
    first_sent: bool = False
    poison: bool = field(default=False)


class FakeEngine:
    def __init__(self, sock: socket.socket, options: Options) -> None:
        self.sock = sock
        self.options = options
        self.inbox = FrameBuffer()
        self.outbox = bytearray()
        self.lock = threading.Lock()
        self.waiting: deque[Row] = deque()
        self.running: dict[int, Row] = {}
        self.phase = ("load", 0, time.monotonic(), 0.0)
        self.sampled = 0
        self.faulty = True

    def send(self, message: FromEngine) -> None:
        frame = encode(message)
        with self.lock:
            self.outbox += frame
            self.flush()

    def flush(self) -> None:
        try:
            while self.outbox:
                sent = self.sock.send(self.outbox)
                del self.outbox[:sent]
        except BlockingIOError:
            pass
        except OSError:
            os._exit(0)

    def beat(self, interval: float) -> None:
        while True:
            name, step_id, since, predicted = self.phase
            counts = (len(self.running), len(self.waiting))
            self.send(Heartbeat(name, step_id, time.monotonic() - since, predicted, *counts, 0, 0, 0))
            time.sleep(interval)

    def receive(self, wait: bool) -> None:
        with self.lock:
            unsent = bool(self.outbox)
        full = len(self.outbox) > 1 << 22
        readable, _, _ = select.select([self.sock], [self.sock] if unsent else [], [], None if wait or full else 0.0)
        with self.lock:
            self.flush()
        if not readable:
            return
        data = self.sock.recv(1 << 20)
        if not data:
            os._exit(0)
        for body in self.inbox.feed(data):
            self.handle(decode_to_engine(body))

    def handle(self, message: object) -> None:
        if isinstance(message, Submit) and message.dry_run:
            first = FirstToken(0, 0.0, 0.0)
            answer = Delta(message.request_id, [], FinishReason.STOP, first=first)
            frame = encode(StepOutput([answer]))
            self.outbox += frame  # the lock is held
            self.flush()
        elif isinstance(message, Submit) and self.options.refuse is not None:
            refused = Delta(message.request_id, [], FinishReason.ERROR, error=self.options.refuse, refused=True)
            self.outbox += encode(StepOutput([refused]))
            self.flush()
        elif isinstance(message, Submit):
            base = _base(message.prompt_token_ids, message.params.seed, message.choice)
            poison = self.options.poison_token in message.prompt_token_ids
            row = Row(message, base, time.monotonic(), list(message.output_token_ids), poison=poison)
            self.waiting.append(row)
        elif isinstance(message, Abort):
            for request_id in message.request_ids:
                self.running.pop(request_id, None)
            gone = set(message.request_ids)
            self.waiting = deque(row for row in self.waiting if row.submit.request_id not in gone)
        elif isinstance(message, Shutdown):
            os._exit(0)

    def run(self) -> None:
        init = None
        while init is None:
            select.select([self.sock], [], [])
            data = self.sock.recv(1 << 20)
            if not data:
                os._exit(0)
            for body in self.inbox.feed(data):
                message = decode_to_engine(body)
                if isinstance(message, Init):
                    init = message
                else:
                    self.handle(message)
        options = self.options
        self.sock.setblocking(False)
        self.count_start()
        threading.Thread(target=self.beat, args=(init.config.heartbeat_seconds,), daemon=True).start()
        self.send(Progress("load", "pretending to load", 0.5))
        time.sleep(options.load_seconds)
        if options.crash_at_load and self.faulty:
            os._exit(3)
        if options.fail is not None and self.faulty:
            self.send(Failed(options.fail, options.fail_usage))
            os._exit(2)
        self.send(self.ready())
        for step_id in itertools.count(1):
            self.phase = ("idle", step_id, time.monotonic(), 0.0)
            self.receive(wait=not self.running and not self.waiting)
            while not self.running and not self.waiting:
                self.receive(wait=True)
            self.step(step_id)

    def count_start(self) -> None:
        if self.options.state_path is not None:
            path = Path(self.options.state_path)
            starts = int(path.read_text()) if path.exists() else 0
            path.write_text(str(starts + 1))
            self.faulty = self.options.faulty_starts is None or starts < self.options.faulty_starts

    def ready(self) -> Ready:
        options = self.options
        identity = Identity(
            options.model, "Fake", options.weights_hash, 0, "none", "none", "none", "cpu", "", 1, {"fake": "1"}
        )
        return Ready(
            identity, options.max_model_len, options.num_blocks, options.block_size, options.vocab_size,
            [options.eos_token_id], options.max_running, {"weights": 0}, options.model_path, {"load": 0.0},
        )  # fmt: skip

    def misbehave(self) -> None:
        options, sampled = self.options, self.sampled
        if not self.faulty:
            return
        if options.crash_after is not None and sampled >= options.crash_after:
            self.die()
        if options.stop_after is not None and sampled >= options.stop_after:
            os.kill(os.getpid(), signal.SIGSTOP)
        if options.garbage_after is not None and sampled >= options.garbage_after:
            with self.lock:
                self.outbox += b"\x00\x00\x00\x04abcd"
                self.flush()
        while options.hang_after is not None and sampled >= options.hang_after:
            time.sleep(0.01)

    def die(self) -> None:
        if self.options.crash_signal:
            os.kill(os.getpid(), self.options.crash_signal)
            time.sleep(10)
        os._exit(3)

    def step(self, step_id: int) -> None:
        options = self.options
        began = time.monotonic()
        long = step_id == options.long_step_at
        self.phase = ("step", step_id, began, options.predicted_seconds if long else 0.0)
        while self.waiting and len(self.running) < options.max_running:
            row = self.waiting.popleft()
            self.running[row.submit.request_id] = row
        self.misbehave()
        if any(row.poison and len(row.output) >= options.poison_position for row in self.running.values()):
            self.die()
        if options.step_seconds or long:
            time.sleep(options.long_step_seconds if long else options.step_seconds)
        deltas: list[Delta] = []
        sampled = 0
        for row in list(self.running.values()):
            delta = self.advance(row, began)
            sampled += len(delta.token_ids)
            deltas.append(delta)
            if delta.finish_reason is not None:
                del self.running[row.submit.request_id]
        self.sampled += sampled
        counts = (len(self.running), len(self.waiting))
        seconds = time.monotonic() - began
        self.send(StepOutput(deltas, StepStats(step_id, seconds, 0, 0, sampled, 0, 0, 0, 0, 0, *counts, 0, 0, 0)))

    def advance(self, row: Row, began: float) -> Delta:
        options, submit, output = self.options, row.submit, row.output
        params = submit.params
        limit = min(params.max_new_tokens, options.max_model_len - len(submit.prompt_token_ids))
        tokens: list[int] = []
        reason: FinishReason | None = None
        ending: int | None = None
        while len(tokens) < options.tokens_per_step and reason is None:
            index = len(output)
            if options.mode == "hash":
                token = _hash_token(row.base, index, options.vocab_size)
            elif index < len(submit.prompt_token_ids):
                token = submit.prompt_token_ids[index]
            else:
                token = options.eos_token_id
            tokens.append(token)
            output.append(token)
            ends = (token == options.eos_token_id and not params.ignore_eos) or token in params.stop_token_ids
            if ends and len(output) > params.min_new_tokens:
                reason, ending = FinishReason.STOP, token
            elif len(output) >= limit:
                reason = FinishReason.LENGTH
        first = None
        if not row.first_sent:
            row.first_sent = True
            first = FirstToken(0, began - row.added, time.monotonic() - began)
        return Delta(submit.request_id, tokens, reason, ending, None, first)


def main(arguments: list[str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    given = json.loads(os.environ.get("STET_FAKE_ENGINE", "{}"))
    if len(arguments) > 1:
        given.update(json.loads(arguments[0]))
    FakeEngine(socket.socket(fileno=int(arguments[-1])), Options(**given)).run()


if __name__ == "__main__":
    main(sys.argv[1:])
