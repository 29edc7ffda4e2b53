"""What all bodies together may take of the memory while they arrive."""

from __future__ import annotations

from starlette.types import Message, Receive

from server.generation import Problem
from server.http.errors import HttpError


class Intake:
    """Counts the bytes of bodies that have begun to arrive and are not complete.

    One body has its own bound; without this one, a thousand clients that each send most of a body and then wait hold a
    thousand times as much for as long as a body may take.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.held_bytes = 0

    def watch(self, receive: Receive) -> Share:
        """One request's part of it: to be received through, and to be closed at the request's end."""
        return Share(self, receive)

    def take(self, size: int) -> None:
        """Count bytes that have arrived. Raises HttpError (429) if they are too many; then they are not counted."""
        if self.held_bytes + size > self._max_bytes:
            text = f"The server holds {self._max_bytes} bytes of bodies that are still arriving: come back in a second."
            raise HttpError("queue_full", [Problem(None, text)], {"connection": "close"})
        self.held_bytes += size


class Share:
    """One request's body on its way."""

    __slots__ = ("_held", "_intake", "_receive")

    def __init__(self, intake: Intake, receive: Receive) -> None:
        self._intake = intake
        self._receive = receive
        self._held = 0

    async def receive(self) -> Message:
        """The next message. Raises HttpError where there is no room for it."""
        message = await self._receive()
        if message["type"] == "http.request" and message.get("more_body", False):
            size = len(message.get("body", b""))
            self._intake.take(size)
            self._held += size
        else:
            self.close()  # complete, or broken off
        return message

    def close(self) -> None:
        """Nothing is held any more."""
        self._intake.held_bytes -= self._held
        self._held = 0
