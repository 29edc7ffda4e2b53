"""When an engine process must be taken for hung. Pure arithmetic on what its heartbeats say: no clock, no process."""

from __future__ import annotations

from dataclasses import dataclass

from server.engine.messages import Heartbeat


@dataclass(frozen=True, slots=True)
class Limits:
    """When an engine counts as hung, and how often it may crash. Seconds.

    step, step_factor  a step hangs after max(step, step_factor x its predicted duration)
    load, warmup       without any progress in that phase; a download of a large model reports progress
    silence            without a heartbeat, once it has beaten; start_silence until the first one
    crashes, window    so many crashes within so much time, and the engine is given up
    tick               how often all this is looked at
    stop               how long a stopping engine may take before it is killed
    """

    step: float = 10.0
    step_factor: float = 20.0
    load: float = 1800.0
    warmup: float = 1800.0
    silence: float = 10.0
    start_silence: float = 120.0
    crashes: int = 3
    window: float = 60.0
    tick: float = 0.1
    stop: float = 5.0


class Watchdog:
    """What is known of one process's health. Seconds are counted while this process itself was awake.

    A parent that was stopped or starved must not take its own absence for the child's silence: a tick that comes late
    counts as two ticks at most.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._phase = "load"
        self._phase_seconds = 0.0
        self._predicted_seconds = 0.0
        self._stalled = 0.0  # since the last sign of progress while loading or warming up
        self._has_beaten = False
        self._silence = 0.0
        self._step_id = 0

    def advance(self, seconds: float) -> None:
        """So much time has passed since the last call."""
        seconds = min(seconds, 2 * self._limits.tick)
        self._silence += seconds
        self._stalled += seconds
        self._phase_seconds += seconds

    def heard(self) -> None:
        """A message has come, of whatever kind."""
        self._silence = 0.0

    def beat(self, beat: Heartbeat) -> None:
        """A heartbeat has come."""
        if beat.phase != self._phase:
            self._stalled = 0.0
        self._has_beaten = True
        self._phase, self._step_id = beat.phase, beat.step_id
        self._phase_seconds, self._predicted_seconds = beat.phase_seconds, beat.predicted_seconds

    def progress(self) -> None:
        """The load or the warm-up has come further."""
        self._stalled = 0.0

    def ready(self) -> None:
        """The start is over."""
        self._has_beaten = True
        self._phase, self._phase_seconds = "idle", 0.0

    def hang(self) -> str | None:
        """Why this process must be taken for hung, or None."""
        limits = self._limits
        if self._silence > (limits.silence if self._has_beaten else limits.start_silence):
            return f"the engine has given no sign of life for {self._silence:.1f} s"
        if self._phase == "step":
            allowed = max(limits.step, limits.step_factor * self._predicted_seconds)
            if self._phase_seconds > allowed:
                return (
                    f"the engine hangs in step {self._step_id}: {self._phase_seconds:.1f} s, "
                    f"predicted {self._predicted_seconds:.2f} s, allowed {allowed:.1f} s"
                )
        elif self._phase in ("load", "warmup"):
            allowed = limits.load if self._phase == "load" else limits.warmup
            if self._stalled > allowed:
                return f"the engine has made no progress in its {self._phase} phase for {self._stalled:.0f} s"
        return None
