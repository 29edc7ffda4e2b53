"""The parent's side of the engine process: start it, watch it, and start it again when it dies or hangs.

`spawn_engine` is synchronous and imports next to nothing, so that the command line can start the engine before it
imports the web stack. `Supervisor` then takes the process over, on an asyncio event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, cast

from server.engine.config import EngineConfig
from server.engine.messages import (
    Failed,
    FrameBuffer,
    FrameError,
    Heartbeat,
    Init,
    Progress,
    Ready,
    Shutdown,
    StepOutput,
    ToEngine,
    decode_from_engine,
    encode,
)
from server.watchdog import Limits as Limits
from server.watchdog import Watchdog

if TYPE_CHECKING:
    from server.metrics import Metrics

logger = logging.getLogger("stet.supervisor")

State = Literal["loading", "warmup", "ready", "restarting", "failed", "stopped"]

_SOCKET_BUFFER_BYTES = 1024 * 1024
_MAX_UNREAD_BYTES = 8 * 1024 * 1024


@dataclass(slots=True, eq=False)
class EngineProcess:
    """A child that was started, and the parent's end of its socket. Whoever holds it must `kill` or hand it on."""

    popen: subprocess.Popen[bytes]
    sock: socket.socket

    def kill(self) -> None:
        """End it at once, also when it is stopped or stuck. It stays to be reaped with `popen.wait`."""
        with contextlib.suppress(ProcessLookupError):
            self.popen.kill()

    def close(self) -> None:
        """Kill it, reap it and close the socket: for a start that is given up before a Supervisor exists."""
        self.kill()
        self.popen.wait()
        self.sock.close()


def spawn_engine(config: EngineConfig, command: Sequence[str] | None = None) -> EngineProcess:
    """Start an engine process and send it its Init. Does not wait for it.

    command  what to run instead of this project's engine; the number of the inherited socket is appended

    Raises OSError when no process can be started.
    """
    ours, theirs = socket.socketpair()
    try:
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
        fd = theirs.fileno()
        arguments = [*(command or (sys.executable, "-m", "server.engine.process")), str(fd)]
        # The child inherits the mask: a Ctrl-C goes to the whole group, and it is this process that acts on it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            popen = subprocess.Popen(arguments, pass_fds=(fd,), stdin=subprocess.DEVNULL, stdout=2)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    # A few hundred bytes into an empty buffer: cannot block. A child that is dead already is the watcher's to find.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        ours.sendall(encode(Init(config)))
    return EngineProcess(popen, ours)


class Listener(Protocol):
    """Who is told, on the event loop's thread, what becomes of the engine. None of these may block or raise."""

    def engine_ready(self, ready: Ready) -> None:
        """A fresh engine is warm and knows of no request."""
        ...

    def engine_output(self, output: StepOutput) -> None:
        """One step's tokens."""
        ...

    def engine_down(self) -> None:
        """The engine is gone, and all that it knew; another one may become ready."""
        ...

    def engine_failed(self, cause: str) -> None:
        """No other engine will become ready."""
        ...

    def engine_writable(self) -> None:
        """What was sent has been read, after `Supervisor.writable` was False."""
        ...

    def engine_idle(self) -> None:
        """A heartbeat says that the engine has nothing to do."""
        ...


class EngineFailed(Exception):
    """The engine cannot be started, or was given up. One line for a person.

    usage: the cause is what the person asked for (a model that is not there, a flag that cannot be).
    """

    def __init__(self, message: str, usage: bool) -> None:
        super().__init__(message)
        self.usage = usage


class Supervisor:
    """Owns the engine process: one at a time, from `start` to `stop`.

    All methods run on the event loop's thread. The state changes between awaits, never inside `send`:

        loading -> warmup -> ready -> restarting -> ready …      any -> failed, any -> stopped

    A crash is an end of the socket or of the process that nobody asked for; a hang is made a crash with SIGKILL. The
    engine is started again at once, unless its last `limits.crashes` crashes came within `limits.window` seconds, or
    none of its last so many processes became ready, however slowly they failed.
    """

    def __init__(
        self,
        config: EngineConfig,
        metrics: Metrics,
        *,
        command: Sequence[str] | None = None,
        first: EngineProcess | None = None,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """first: a process from `spawn_engine` with the same config, taken over instead of starting one."""
        self.state: State = "loading"
        self.failure: str | None = None
        self.failed_usage = False
        self.ready: Ready | None = None
        self.progress: Progress | None = None
        self.restarts = 0
        self.listener: Listener | None = None
        self._config = config
        self._metrics = metrics
        self._command = command
        self._process = first
        self._limits = limits or Limits()
        self._clock = clock
        self._connection: _Connection | None = None
        self._task: asyncio.Task[None] | None = None
        self._waiters: list[asyncio.Future[None]] = []
        self._stopping = False
        self._crash_times: deque[float] = deque(maxlen=self._limits.crashes)
        self._failed_starts = 0  # processes in a row, this one included, that have not been ready

    @property
    def config(self) -> EngineConfig:
        """What the engine is told."""
        return self._config

    @property
    def pid(self) -> int | None:
        """The engine's process id, while there is one."""
        return self._process.popen.pid if self._process is not None else None

    @property
    def writable(self) -> bool:
        """False while the engine leaves so much unread that new requests should wait."""
        return self._connection is not None and self._connection.writable

    async def start(self) -> None:
        """Begin to watch the engine, started if no first one was given. Does not wait for it to be ready.

        Raises OSError when no process can be started.
        """
        if self._process is None:
            self._process = spawn_engine(self._config, self._command)
        self._failed_starts = 1
        self._task = asyncio.create_task(self._run(self._process), name="engine-supervisor")

    async def wait_ready(self) -> Ready:
        """Wait until an engine is ready. Raises EngineFailed when none will be."""
        while self.state != "ready" or self.ready is None:
            if self.state in ("failed", "stopped"):
                raise EngineFailed(self.failure or "the engine was stopped", self.failed_usage)
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter
        return self.ready

    def send(self, message: ToEngine) -> bool:
        """Queue a frame for the engine. False if there is no connection; then the frame is gone. Raises FrameError."""
        return self._connection is not None and self._connection.send(encode(message))

    async def stop(self) -> None:
        """Ask the engine to finish its step and exit; kill it after `limits.stop` seconds. May be called twice."""
        self._stopping = True
        if self._task is None:
            if self._process is not None:
                self._process.close()
                self._process = None
        else:
            # An engine that still loads does not listen, and has nothing to finish.
            if self.state != "ready" or not self.send(Shutdown()):
                self._kill()
            done, _ = await asyncio.wait({self._task}, timeout=self._limits.stop)
            if not done:
                self._kill()
            await asyncio.wait({self._task})
        if self.state != "failed":
            self._enter("stopped")

    # The life of one process after the other

    async def _run(self, process: EngineProcess) -> None:
        try:
            while True:
                cause = await self._watch(process)
                if self._stopping:
                    break
                self._crash_times.append(self._clock())
                if self.failed_usage:
                    self._give_up(cause)
                    break
                if self._crashes_too_often():
                    times = self._limits.crashes
                    self._give_up(f"the engine ended {times} times in short order; the last time: {cause}")
                    break
                logger.error("%s; starting it again", cause)
                self.restarts += 1
                self._metrics.engine_restarted()
                self._failed_starts += 1
                process = self._process = spawn_engine(self._config, self._command)
        except OSError as error:
            self._give_up(f"the engine process cannot be started: {error.strerror or error}")
        except Exception as error:
            logger.exception("the supervisor failed")
            self._give_up(f"the supervisor failed: {type(error).__name__}")
        finally:
            self._kill()

    def _crashes_too_often(self) -> bool:
        times, limits = self._crash_times, self._limits
        in_short_order = len(times) == limits.crashes and times[-1] - times[0] < limits.window
        return in_short_order or self._failed_starts >= limits.crashes

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def _give_up(self, cause: str) -> None:
        self.failure = cause
        if self.ready is not None:  # else whoever waits for the start is told, by `wait_ready`
            logger.error("%s", cause)
        self._enter("failed")
        if self.listener is not None:
            self.listener.engine_failed(cause)

    async def _watch(self, process: EngineProcess) -> str:
        """Serve one process from its start to its end. Returns why it ended."""
        loop = asyncio.get_running_loop()
        watch = Watchdog(self._limits)
        connection = _Connection(lambda body: self._receive(watch, connection, body), self._writable_again)
        try:
            await loop.create_unix_connection(lambda: connection, sock=process.sock)
            self._connection = connection
            before = self._clock()
            while not connection.lost.done():
                await asyncio.wait({connection.lost}, timeout=self._limits.tick)
                now = self._clock()
                watch.advance(now - before)
                before = now
                if process.popen.poll() is not None:
                    break
                connection.fault = connection.fault or watch.hang()
                if connection.fault is not None:
                    break
        finally:
            # Everything that was still in the socket has been received once the end of it is seen.
            if not connection.lost.done() and connection.fault is None:
                await asyncio.wait({connection.lost}, timeout=1.0)
            if connection.fault is not None:
                process.kill()
            self._down()
            connection.close()
            await self._reap(process)
        return connection.fault or _ending(process.popen.returncode)

    def _down(self) -> None:
        """The connection is of no more use."""
        if self._connection is None:
            return
        self._connection = None
        if not self._stopping:
            self._enter("restarting" if self.ready is not None else "loading")
        self._metrics.engine_down()
        if self.listener is not None:
            self.listener.engine_down()

    async def _reap(self, process: EngineProcess) -> None:
        """Wait for a process that has ended, or whose socket has: then it has a moment to exit by itself."""
        deadline = self._clock() + self._limits.stop
        pause = 0.001
        while process.popen.poll() is None:
            if self._clock() > deadline:
                process.kill()
                deadline += self._limits.stop
            await asyncio.sleep(pause)
            pause = min(2 * pause, 0.05)
        if self._process is process:
            self._process = None

    def _receive(self, watch: Watchdog, connection: _Connection, body: bytes) -> None:
        message = decode_from_engine(body)
        watch.heard()
        if isinstance(message, StepOutput):
            if self.listener is not None:
                self.listener.engine_output(message)
            elif message.stats is not None:
                self._metrics.engine_step(message.stats)
        elif isinstance(message, Heartbeat):
            watch.beat(message)
            self._metrics.engine_heartbeat(message)
            if self.ready is None and message.phase == "warmup":
                self._enter("warmup")
            if message.phase == "idle" and self.listener is not None:
                self.listener.engine_idle()
        elif isinstance(message, Progress):
            watch.progress()
            self.progress = message
            if self.ready is None and message.phase == "warmup":
                self._enter("warmup")
        elif isinstance(message, Ready):
            watch.ready()
            self._become_ready(connection, message)
        elif isinstance(message, Failed):
            self.failed_usage = message.usage
            connection.fault = message.message

    def _become_ready(self, connection: _Connection, ready: Ready) -> None:
        if self.ready is not None and ready.identity != self.ready.identity:
            # Tokens are a function of the identity: going on would break off streams in one voice and end in another.
            self.failed_usage = True
            connection.fault = "the restarted engine is not the one before: model or machine have changed meanwhile"
            return
        self.ready = ready
        self._failed_starts = 0
        self._metrics.engine_ready(ready)
        self._enter("ready")
        if self.listener is not None:
            self.listener.engine_ready(ready)

    def _writable_again(self) -> None:
        if self.listener is not None:
            self.listener.engine_writable()

    def _enter(self, state: State) -> None:
        self.state = state
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


class _Connection(asyncio.Protocol):
    """The parent's end of the socket: bytes to frames. `lost` is done when the other end is closed.

    fault  why the process must not be listened to any more, once there is a reason
    """

    def __init__(self, receive: Callable[[bytes], None], writable_again: Callable[[], None]) -> None:
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.fault: str | None = None
        self.writable = True
        self._receive = receive
        self._writable_again = writable_again
        self._inbox = FrameBuffer()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's stream transports have the methods of asyncio.Transport without being any.
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=_MAX_UNREAD_BYTES)

    def send(self, frame: bytes) -> bool:
        if self._transport is None or self._transport.is_closing():
            return False
        self._transport.write(frame)
        return True

    def data_received(self, data: bytes) -> None:
        if self.fault is not None:
            return
        try:
            for body in self._inbox.feed(data):
                self._receive(body)
        except FrameError as error:
            self.fault = f"the engine sent what is no message: {error}"
            self.close()
        except Exception as error:
            logger.exception("a message of the engine could not be handled")
            self.fault = f"a message of the engine could not be handled: {type(error).__name__}"
            self.close()

    def pause_writing(self) -> None:
        self.writable = False

    def resume_writing(self) -> None:
        self.writable = True
        self._writable_again()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.lost.done():
            self.lost.set_result(None)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


def _ending(returncode: int | None) -> str:
    if returncode is None or returncode == 0:
        return "the engine process ended"
    if returncode > 0:
        return f"the engine process exited with code {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    hint = " (out of memory?)" if name == "SIGKILL" else ""
    return f"the engine process was ended by {name}{hint}"
