"""A small HTTP client for the tests: asyncio streams, so that every byte and every disconnect is ours to decide."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

from loadtests.processes import RunningServer


@dataclass(slots=True)
class Answer:
    """What came back: the status, the JSON body, or the events of a stream in order (without [DONE])."""

    status: int
    body: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    event_ids: list[int] = field(default_factory=list)
    done: bool = False
    cut: bool = False

    @property
    def text(self) -> str:
        """The joined text of a stream of one choice, or the text of an answer that was not streamed."""
        if self.body:
            text: str = self.body["outputs"][0]["text"]
            return text
        return "".join(event.get("text", "") for event in self.events)

    @property
    def token_ids(self) -> list[int]:
        """The token ids, when they were asked for."""
        if self.body:
            ids: list[int] = self.body["outputs"][0]["token_ids"]
            return ids
        return [token for event in self.events for token in event.get("token_ids", [])]

    @property
    def finish_reasons(self) -> list[str]:
        """The reasons of all terminal events."""
        parts = self.body["outputs"] if self.body else self.events
        return [part["finish_reason"] for part in parts if part.get("finish_reason")]

    @property
    def usage(self) -> dict[str, int]:
        """The usage that was reported last."""
        if self.body:
            usage: dict[str, int] = self.body["usage"]
            return usage
        return next(event["usage"] for event in reversed(self.events) if "usage" in event)


async def post(
    server: RunningServer, request: dict[str, Any], *, path: str = "/generate", leave_after: int | None = None
) -> Answer:
    """POST /generate, or another path. With `leave_after`, close the connection after so many events of the stream
    (0: at once)."""
    reader, writer = await asyncio.open_connection(server.host, server.port)
    try:
        body = json.dumps(request).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {server.host}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        writer.write(head.encode() + body)
        await writer.drain()
        if leave_after == 0:
            return Answer(0, cut=True)
        status = int((await reader.readline()).split()[1])
        headers: dict[str, str] = {}
        while (line := (await reader.readline()).strip()) != b"":
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        if not headers.get("content-type", "").startswith("text/event-stream"):
            return Answer(status, json.loads(await reader.read()))
        return await _read_events(reader, Answer(status), leave_after)
    finally:
        writer.close()


async def _read_events(reader: asyncio.StreamReader, answer: Answer, leave_after: int | None) -> Answer:
    while line := await reader.readline():
        if line.startswith(b"id:"):
            answer.event_ids.append(int(line[3:]))
        if line.strip() == b"data: [DONE]":
            answer.done = True
        elif line.startswith(b"data: "):
            answer.events.append(json.loads(line[6:]))
            if leave_after is not None and len(answer.events) >= leave_after:
                answer.cut = True
                return answer
    return answer


def metrics(server: RunningServer) -> dict[str, float]:
    """Every sample of /metrics: "name{labels}" -> value."""
    status, body = server.get("/metrics")
    if status != 200:
        raise RuntimeError(f"/metrics answered {status}")
    samples = (line.rsplit(" ", 1) for line in body.decode().splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in samples}


async def until(condition: Any, seconds: float, what: str) -> None:
    """Wait for a condition that is checked every 20 ms. Raises TimeoutError that names it."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not await asyncio.to_thread(condition):
        if asyncio.get_running_loop().time() > deadline:
            raise TimeoutError(f"{what}: not within {seconds} s")
        await asyncio.sleep(0.02)
