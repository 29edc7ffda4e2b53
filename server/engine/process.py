"""The engine process: `python -m server.engine.process FD`, started by the supervisor with one inherited socket.

The main thread reads messages, steps the core and sends what came of it; one more thread sends a heartbeat, so that it
is heard during a long step. When the socket ends, so does this process: it never outlives its parent.
"""

from __future__ import annotations

import gc
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from server.engine.block_pool import IntegrityError
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
    ToEngine,
    decode_to_engine,
    encode,
)
from server.engine.plan import DeviceFault
from server.engine.receipts import find_receipt
from server.engine.request import FinishReason, Request
from server.engine.scheduler import AdmissionError
from server.logs import configure_logging

if TYPE_CHECKING:
    from server.engine.build import Engine
    from server.engine.core import EngineCore, StepOutcome

logger = logging.getLogger("stet.engine")

# Above this the loop waits for the parent to read before it steps again.
MAX_OUTBOX_BYTES = 16 * 1024 * 1024
RECEIVE_BYTES = 256 * 1024


class ConnectionClosed(Exception):
    """The parent is gone."""


class Connection:
    """The child's end of the socket pair: whole frames in and out, never blocking in `send`.

    `send` may be called from any thread. `receive` belongs to one thread. Both raise ConnectionClosed.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        # One for all: a fresh one for each read, cut to what came, leaves holes in the heap, which grew by megabytes an
        # hour.
        self._received = memoryview(bytearray(RECEIVE_BYTES))
        self._inbox = FrameBuffer()
        self._outbox = bytearray()
        self._lock = threading.Lock()

    def send(self, message: FromEngine) -> None:
        """Append a frame and write what the socket takes; the rest goes out with the next call of either method."""
        frame = encode(message)
        with self._lock:
            self._outbox += frame
            self._flush()

    def receive(self, *, wait: bool) -> Iterator[ToEngine]:
        """Messages that have arrived. With `wait`, or with too much unsent, sleep until the socket has something."""
        while True:
            with self._lock:
                self._flush()
                unsent = len(self._outbox)
            full = unsent > MAX_OUTBOX_BYTES
            readable, _, _ = select.select(
                [self._sock], [self._sock] if unsent else [], [], None if wait or full else 0.0
            )
            if readable:
                yield from self._read()
                return
            if not full and not wait:
                return

    def _read(self) -> Iterator[ToEngine]:
        try:
            count = self._sock.recv_into(self._received)
        except BlockingIOError:
            return
        except OSError as error:
            raise ConnectionClosed from error
        if not count:
            raise ConnectionClosed
        for body in self._inbox.feed(self._received[:count]):
            yield decode_to_engine(body)

    def _flush(self) -> None:
        try:
            while self._outbox:
                sent = self._sock.send(self._outbox)
                del self._outbox[:sent]
        except BlockingIOError:
            pass
        except OSError as error:
            raise ConnectionClosed from error


@dataclass(frozen=True, slots=True)
class Phase:
    """What the engine is doing; replaced as a whole, so that the heartbeat's thread needs no lock."""

    name: str
    since: float
    step_id: int = 0
    predicted_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Gauges:
    """The state after the last step; replaced as a whole."""

    num_running: int = 0
    num_waiting: int = 0
    blocks_free: int = 0
    blocks_used: int = 0
    blocks_cached: int = 0


class Pulse:
    """The heartbeat: a thread that reports `phase` and `gauges` until the connection ends, and then the process."""

    def __init__(self, connection: Connection, interval_seconds: float) -> None:
        self.phase = Phase("load", time.monotonic())
        self.gauges = Gauges()
        self._connection = connection
        self._interval = interval_seconds
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def enter(self, name: str, step_id: int = 0, predicted_seconds: float = 0.0) -> None:
        """Begin a phase now."""
        self.phase = Phase(name, time.monotonic(), step_id, predicted_seconds)

    def _beat(self) -> None:
        while True:
            phase, gauges = self.phase, self.gauges
            try:
                self._connection.send(
                    Heartbeat(
                        phase=phase.name,
                        step_id=phase.step_id,
                        phase_seconds=time.monotonic() - phase.since,
                        predicted_seconds=phase.predicted_seconds,
                        num_running=gauges.num_running,
                        num_waiting=gauges.num_waiting,
                        blocks_free=gauges.blocks_free,
                        blocks_used=gauges.blocks_used,
                        blocks_cached=gauges.blocks_cached,
                    )
                )
            except ConnectionClosed:
                # Also during a load of minutes: nobody is left to load for.
                os._exit(0)
            time.sleep(self._interval)


def main(fd: int) -> int:
    """Run the engine over the inherited socket. Returns the exit code: 0 when the parent ended it, 2 on bad input."""
    # The parent decides when this process ends; a Ctrl-C or a SIGTERM to the whole group must not cut a drain short.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # A thread of a parallel region that has nothing to do spins for a moment only, then sleeps: where the HTTP process
    # or others need the cores too, spinning on made steps six times as long. Read when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    connection = Connection(socket.socket(fileno=fd))
    try:
        return _run(connection)
    except ConnectionClosed:
        return 0
    except DeviceFault as error:
        logger.critical("the device is lost to this process: %s", error)
        # At once: what else would run on the way out (destructors of the device's context) may hang on a dead device.
        logging.shutdown()
        os._exit(1)
    except IntegrityError as error:
        logger.critical("the engine's books do not balance: %s", error)
        return 1
    except Exception:
        logger.critical("the engine failed", exc_info=True)
        return 1


def _run(connection: Connection) -> int:
    messages: list[ToEngine] = []
    while not messages:
        messages += connection.receive(wait=True)
    init = messages.pop(0)
    if not isinstance(init, Init):
        raise TypeError(f"the first message must be Init, not {type(init).__name__}")
    configure_logging(init.config.log_format)
    pulse = Pulse(connection, init.config.heartbeat_seconds)

    # Imported here, so that the heart beats while torch loads.
    from server.engine.build import StartupError, build_engine

    def report(phase: str, message: str, fraction: float | None) -> None:
        if pulse.phase.name != phase:
            pulse.enter(phase)
        connection.send(Progress(phase, message, fraction))

    def step_starts(step_id: int, predicted_seconds: float) -> None:
        pulse.enter("step", step_id, predicted_seconds)

    began = time.perf_counter()
    try:
        engine = build_engine(init.config, report, step_starts)
    except StartupError as error:
        connection.send(Failed(str(error), usage=True))
        return 2
    fallbacks = Fallbacks(engine.fallbacks)
    connection.send(_ready(engine, time.perf_counter() - began, fallbacks.new()))
    _serve(connection, engine.core, pulse, fallbacks)
    return 0


class Fallbacks:
    """Tells what a growing counter has counted since it was last asked."""

    def __init__(self, counter: Counter[str]) -> None:
        self._counter = counter
        self._told: Counter[str] = Counter()

    def new(self) -> dict[str, int]:
        """Counts since the last call, by name."""
        if self._counter == self._told:
            return {}
        new = dict(self._counter - self._told)
        self._told = Counter(self._counter)
        return new


def _ready(engine: Engine, build_seconds: float, fallbacks: dict[str, int]) -> Ready:
    config = engine.scheduler_config
    return Ready(
        identity=engine.identity,
        max_model_len=config.max_model_len,
        num_blocks=config.num_blocks,
        block_size=config.block_size,
        vocab_size=engine.vocab_size,
        eos_token_ids=list(config.eos_token_ids),
        max_running=config.max_running,
        memory_bytes=engine.memory_bytes,
        model_path=str(engine.model_path),
        startup_seconds={**engine.startup_seconds, "import": build_seconds - sum(engine.startup_seconds.values())},
        fallbacks=fallbacks,
        receipt=find_receipt(engine.model_path, engine.identity),
    )


def _serve(connection: Connection, core: EngineCore, pulse: Pulse, fallbacks: Fallbacks) -> None:
    """Messages, then a step, and again, until the parent says Shutdown or is gone."""
    # What was loaded lives as long as the process: the collector need not look at it in the middle of a step.
    gc.collect()
    gc.freeze()
    while True:
        pulse.gauges = _gauges(core)
        if not core.has_work:
            pulse.enter("idle")
        for message in connection.receive(wait=not core.has_work):
            match message:
                case Submit():
                    _submit(connection, core, message)
                case Abort():
                    core.abort(message.request_ids)
                case Shutdown():
                    return
                case Init():
                    raise TypeError("Init came twice")
        for outcome in core.step():
            connection.send(_step_output(core, outcome, fallbacks.new()))


def _submit(connection: Connection, core: EngineCore, submit: Submit) -> None:
    request = Request(
        request_id=submit.request_id,
        prompt_token_ids=submit.prompt_token_ids,
        params=submit.params,
        output_token_ids=submit.output_token_ids,
        choice=submit.choice,
        priority=submit.priority,
        tenant=submit.tenant,
        cache_salt=submit.cache_salt,
        arrival=submit.arrival,
    )
    try:
        if submit.dry_run:
            first = FirstToken(core.cached_tokens(request), 0.0, 0.0)
            connection.send(StepOutput([Delta(submit.request_id, [], FinishReason.STOP, first=first)]))
        else:
            core.add(request)
    except AdmissionError as error:
        refused = Delta(submit.request_id, [], FinishReason.ERROR, error=str(error), refused=True)
        connection.send(StepOutput([refused]))


def _step_output(core: EngineCore, outcome: StepOutcome, fallbacks: dict[str, int]) -> StepOutput:
    deltas: list[Delta] = []
    for output in outcome.outputs:
        request = output.request
        timeline = outcome.first_tokens.get(request.request_id)
        first = None
        if timeline is not None and timeline.scheduled is not None and timeline.first_token is not None:
            first = FirstToken(
                cached_tokens=request.num_cached_tokens or 0,
                queue_seconds=timeline.scheduled - timeline.added,
                prefill_seconds=timeline.first_token - timeline.scheduled,
            )
        deltas.append(
            Delta(
                request.request_id,
                list(output.token_ids),
                output.finish_reason,
                output.stop_token_id,
                output.error,
                first,
                output.details,
            )
        )
    gauges = _gauges(core)
    counters = outcome.counters
    stats = StepStats(
        step_id=outcome.step_id,
        duration_seconds=outcome.duration_seconds,
        prompt_tokens=counters.prompt_tokens,
        recomputed_tokens=counters.recomputed_tokens,
        sampled_tokens=counters.sampled_tokens,
        pipeline_discarded_tokens=counters.pipeline_discarded_tokens,
        cached_prompt_tokens=counters.cached_prompt_tokens,
        prefix_queried_tokens=counters.prefix_queried_tokens,
        prefix_hit_tokens=counters.prefix_hit_tokens,
        preemptions=counters.preemptions,
        num_running=gauges.num_running,
        num_waiting=gauges.num_waiting,
        blocks_free=gauges.blocks_free,
        blocks_used=gauges.blocks_used,
        blocks_cached=gauges.blocks_cached,
        fallbacks=fallbacks,
    )
    return StepOutput(deltas, stats)


def _gauges(core: EngineCore) -> Gauges:
    scheduler = core.scheduler
    pool = scheduler.pool
    return Gauges(scheduler.num_running, scheduler.num_waiting, pool.num_free, pool.num_used, pool.num_cached)


if __name__ == "__main__":
    exit_code = main(int(sys.argv[1]))
    # Without the interpreter's own end: threads may still run then (the heartbeat's, the one that hands out the KV
    # cache's memory), and one end of several was seen to abort.
    logging.shutdown()
    sys.stderr.flush()
    os._exit(exit_code)
