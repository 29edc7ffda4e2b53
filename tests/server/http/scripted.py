"""A service that does what a test tells it, behind the real application and the real HTTP server."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop

from models.hub import BUILT_IN_MODELS
from server.engine.config import EngineConfig
from server.engine.request import FinishReason
from server.generation import (
    ChoiceFinished,
    Completed,
    Event,
    GenerationRequest,
    Problem,
    Refusal,
    Started,
    TextDelta,
    Timings,
    Usage,
)
from server.http.app import create_app
from server.http.auth import KeyRing
from server.http.limits import Limits
from server.http.serving import HttpServer
from server.metrics import Metrics

Script = Callable[[GenerationRequest], AsyncIterator[Event]]


def completed(prompt: int = 3, generated: int = 2) -> Completed:
    return Completed(7, Usage(prompt, generated, 0), Timings(0.1, 9.0, 80.25, 89.35))


async def two_words(request: GenerationRequest) -> AsyncIterator[Event]:
    """The default script: two deltas and an end."""
    yield Started(request.request_id or "gen-1", "tiny", 7)
    yield TextDelta(0, "a", (5,))
    yield TextDelta(0, " tale\n", (6,))
    yield ChoiceFinished(0, FinishReason.LENGTH)
    yield completed()


def endless(request: GenerationRequest) -> AsyncIterator[Event]:
    """Text until it is closed."""

    async def run() -> AsyncIterator[Event]:
        yield Started("gen-1", "tiny", 7)
        while True:
            yield TextDelta(0, "word ", (5,))
            await asyncio.sleep(0.01)

    return run()


async def never(request: GenerationRequest) -> AsyncIterator[Event]:
    """Waits for its first token for ever."""
    await asyncio.Event().wait()
    yield Started("gen-1", "tiny", 7)


@dataclass
class ScriptedService:
    """Counts the generators that are open; a test sees that each was closed."""

    script: Script = two_words
    state: str = "ready"
    found: list[Problem] = field(default_factory=list)
    seen: list[GenerationRequest] = field(default_factory=list)
    num_open: int = 0
    refusal: Refusal | None = None

    def problems(self, request: GenerationRequest) -> list[Problem]:
        return self.found

    async def generate(self, request: GenerationRequest, endpoint: str = "/generate") -> AsyncIterator[Event]:
        self.seen.append(request)
        self.num_open += 1
        try:
            async for event in self.script(request):
                yield event
        finally:
            self.num_open -= 1

    model: str = "tiny"
    fingerprint: str = "fp_0"
    context_length: int = 100
    model_folder: Path | None = BUILT_IN_MODELS["stet-tales"]
    engine_config: EngineConfig = field(default_factory=lambda: EngineConfig(device="cpu"))

    async def generate_together(
        self, requests: Sequence[GenerationRequest], endpoint: str = "/generate"
    ) -> AsyncIterator[Event]:
        self.seen += requests[1:]
        async for event in self.generate(requests[0], endpoint):
            yield event

    async def tokenize(self, request: GenerationRequest) -> list[int]:
        self.seen.append(request)
        return [5, 6]

    def detokenize(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        return f"{list(token_ids)} {skip_special_tokens}"

    def refusal_of(self, tenant: str) -> Refusal | None:
        return self.refusal

    def info(self) -> dict[str, Any]:
        return {"model": "tiny"}


class ServerThread:
    """The HTTP server on a free port, on an event loop in a thread of its own."""

    def __init__(self, limits: Limits, keys: Path | None = None, docs: bool = False) -> None:
        self.service = ScriptedService()
        self.metrics = Metrics()
        self.keys = None if keys is None else KeyRing(keys, self.metrics)
        self._docs = docs
        self._limits = limits
        self._sock = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._sock.getsockname()[1]
        self._loop = uvloop.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        app = create_app(self.service, self.metrics, self._limits, self.keys, self._docs)
        server = HttpServer(app, self.metrics, self._sock, self._limits)
        await server.start()
        await self._stop.wait()
        await server.stop()

    def call(self, function: Callable[[], Awaitable[Any]]) -> Any:
        """Run a coroutine function on the server's loop."""

        async def run() -> Any:
            return await function()

        future: Future[Any] = asyncio.run_coroutine_threadsafe(run(), self._loop)
        return future.result(10)

    def reset(self) -> None:
        """Back to the default service, with nothing open."""
        self.service.script = two_words
        self.service.state = "ready"
        self.service.found = []
        self.service.seen = []

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        if self._thread.is_alive():
            raise RuntimeError("the server thread does not end")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"
