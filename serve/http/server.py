"""uvicorn with what it lacks: a time-out for headers (slow-loris), and answers in our form where it sends plain text.

uvicorn limits how long an idle connection is kept after an answer, but not how long the first or next request may take
to arrive. What is not HTTP, and connections beyond the limit, get JSON with a code as any other refusal. Behind a
gateway or Ray Serve's proxy this is their affair.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADER_SECONDS = 10.0
KEEP_ALIVE_SECONDS = 30
MAX_CONNECTIONS = 2048


def _answer(status: str, code: str, message: str, fix: str, header: str = "") -> bytes:
    """A whole answer, after which the connection is closed. The form is the one of /v1: the path is not known yet."""
    body = json.dumps({"error": {"code": code, "message": message, "fix": fix}})
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n{header}"
    return f"{head}connection: close\r\n\r\n{body}".encode("ascii")


_LATE = _answer("408 Request Timeout", "too-slow", "The headers did not arrive in time.", "Send them faster.")
_FULL = _answer(
    "503 Service Unavailable", "overloaded", "Too many connections are open.", "Try again later.", "retry-after: 2\r\n"
)
_NOT_HTTP = _answer("400 Bad Request", "bad-request", "This is not HTTP/1.1.", "Use an HTTP client.")


def protocol_with(seconds: float, connections: int) -> type[HttpToolsProtocol]:
    """A protocol class that gives each request ``seconds`` for its headers, and holds so many ``connections``."""

    class TimedProtocol(HttpToolsProtocol):
        _timer: asyncio.TimerHandle | None = None
        _too_many = False

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._too_many = len(self.connections) > connections
            self._start()

        def data_received(self, data: bytes) -> None:
            if not self._too_many:
                super().data_received(data)
            elif not self.transport.is_closing():  # not before something was read: closing then would reset
                self.transport.write(_FULL)
                self.transport.close()

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

        def send_400_response(self, msg: str) -> None:
            self.transport.write(_NOT_HTTP)
            self.transport.close()

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
                self.transport.write(_LATE)
                self.transport.close()

    return TimedProtocol


def server_for(
    api: FastAPI,
    host: str = "127.0.0.1",
    port: int = 8000,
    header_seconds: float = HEADER_SECONDS,
    connections: int = MAX_CONNECTIONS,
) -> uvicorn.Server:
    """A server that is ready to ``run()`` (optionally with sockets of the caller's).

    Args:
        api: the application.
        host: address, unless sockets are given.
        port: port, unless sockets are given.
        header_seconds: time for the headers of a request.
        connections: open at one time; more are answered with 503.
    """
    config = uvicorn.Config(
        api,
        host=host,
        port=port,
        http=protocol_with(header_seconds, connections),
        loop="asyncio",
        ws="none",
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=30,
    )
    return uvicorn.Server(config)
