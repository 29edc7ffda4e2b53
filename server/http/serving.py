"""The HTTP server around the application: uvicorn, without its signals and with our bounds."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp

from server.http.limits import Limits
from server.http.protocol import BoundedProtocol
from server.metrics import Metrics

# Idle connections are kept this long; clients with pools reuse them, silent ones go.
_KEEP_ALIVE_SECONDS = 30
# At the end: time for answers that are complete to be read.
_FLUSH_SECONDS = 3


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn would close the listening socket first; a drain must answer /readyz until its end.
        yield


class HttpServer:
    """Answers on an open, listening socket from `start` to `stop`, which closes it."""

    def __init__(self, app: ASGIApp, metrics: Metrics, sock: socket.socket, limits: Limits | None = None) -> None:
        def count_rejected(status: int) -> None:
            metrics.http_request("other", "other", status, 0.0)

        protocol = partial(BoundedProtocol, limits=limits or Limits(), on_reject=count_rejected)
        config = uvicorn.Config(
            app,
            # uvicorn calls it like the class that it wraps.
            http=cast("Any", protocol),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=_FLUSH_SECONDS,
        )
        self._server = _Server(config)
        self._sock = sock
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> asyncio.Task[None]:
        """Begin to answer. The task ends when the server does."""
        self._task = asyncio.create_task(self._server.serve(sockets=[self._sock]), name="http-server")
        return self._task

    async def stop(self) -> None:
        """Close the socket and idle connections; answers that are being sent have a few seconds to leave."""
        self._server.should_exit = True
        if self._task is not None:
            await asyncio.wait({self._task})
