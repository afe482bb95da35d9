"""uvicorn with the time-out it lacks: a connection that does not finish its headers in time is closed (slow-loris).

uvicorn limits how long an idle connection is kept after an answer, but not how long the first or next request may take
to arrive. Behind a gateway or Ray Serve's proxy this is their affair.
"""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADER_SECONDS = 10.0
KEEP_ALIVE_SECONDS = 30
MAX_CONNECTIONS = 2048
_HEAD = b"HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\nconnection: close\r\n"
_BODY = b'{"error":{"code":"too-slow","message":"The headers did not arrive in time.","fix":"Send them faster."}}'


def protocol_with(seconds: float) -> type[HttpToolsProtocol]:
    """A protocol class that gives each request ``seconds`` for its headers."""

    class TimedProtocol(HttpToolsProtocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._start()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            if self._timer is None:  # the next request of a kept connection begins
                self._start()

        def on_headers_complete(self) -> None:
            self._stop()
            super().on_headers_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            super().connection_lost(exc)

        def _start(self) -> None:
            self._timer = self.loop.call_later(seconds, self._late)

        def _stop(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _late(self) -> None:
            self._timer = None
            if self.cycle is not None and not self.cycle.response_complete:
                self._start()  # the request before is still being answered
            elif not self.transport.is_closing():
                self.transport.write(_HEAD + b"content-length: %d\r\n\r\n" % len(_BODY) + _BODY)
                self.transport.close()

    return TimedProtocol


def server_for(
    api: FastAPI, host: str = "127.0.0.1", port: int = 8000, header_seconds: float = HEADER_SECONDS
) -> uvicorn.Server:
    """A server that is ready to ``run()`` (optionally with sockets of the caller's).

    Args:
        api: the application.
        host: address, unless sockets are given.
        port: port, unless sockets are given.
        header_seconds: time for the headers of a request.
    """
    config = uvicorn.Config(
        api,
        host=host,
        port=port,
        http=protocol_with(header_seconds),
        loop="asyncio",
        ws="none",
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=30,
    )
    return uvicorn.Server(config)
