"""What a request may cost, and the ASGI layer that holds it to that before anything reads the body.

The layer refuses by declared length, and work that has no place in the queue, before the first byte is read: what is
thrown away must cost next to nothing, or an overloaded server does nothing else. It counts what arrives, gives the
sender a time for the whole body and for each pause (slow-loris), and bounds the bytes of all bodies in flight together,
so that memory stays flat whatever is sent. Headers are the web server's affair: see :mod:`serve.http.server`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from pydantic import BaseModel, ConfigDict, Field
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.http.backend import Work
from serve.http.errors import internal_response, problem_response
from serve.http.problems import Refused, too_large

MIB = 1 << 20
CHARGE = "moepipe.charge"
Observe = Callable[[str, str, int, float], None]
CheckRoom = Callable[[Work], None]


class Limits(BaseModel):
    """Bounds of one request and of all together."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_body_bytes: int = Field(default=64 * MIB, ge=1024, description="Bytes of one body, as sent.")
    max_json_bytes: int = Field(
        default=16 * MIB, ge=1024, description="Bytes of one JSON document; it grows when read."
    )
    max_inflight_bytes: int = Field(
        default=1024 * MIB, ge=1024, description="Bytes of all bodies and decoded images held at one time."
    )
    max_requests: int = Field(default=512, ge=1, description="Requests in flight; more get 503.")
    max_rows: int = Field(default=256, ge=1, description="Images in one prediction.")
    max_support: int = Field(default=2048, ge=1, description="Images in one adaptation.")
    max_pixels: int = Field(default=50_000_000, ge=1, description="Pixels of one image; checked before decoding.")
    max_decoded_bytes: int = Field(default=512 * MIB, ge=1024, description="Bytes of all decoded images of a request.")
    body_seconds: float = Field(default=60.0, gt=0, description="Time to send a whole body.")
    idle_seconds: float = Field(default=10.0, gt=0, description="Longest pause between two pieces of a body.")
    async_support: int = Field(default=256, ge=1, description="Adaptations of more images than this become jobs.")


class Guard:
    """Outermost ASGI layer: limits, the last net under errors, and one observation per request.

    Args:
        app: what is guarded.
        limits: the bounds.
        observe: called with (method, route, status, seconds) after each answer.
        check_room: called before a body is read; raises Refused when there is no place for such work.
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, observe: Observe | None = None, check_room: CheckRoom | None = None
    ) -> None:
        self.app = app
        self.limits = limits
        self.observe = observe
        self.check_room = check_room
        self.held = 0
        self.running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status, path = time.perf_counter(), 0, scope["path"]
        body = _Body(self, receive)
        scope[CHARGE] = body.charge

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.running += 1
        try:
            body.admit(scope)
            await self.app(scope, body.receive, watched)
        except Refused as error:
            await problem_response(path, error)(scope, receive, watched)
        except Exception as error:  # the last net: whatever it is, the client gets JSON and no traceback
            if status:
                raise  # too late for another answer: the connection is dropped
            await internal_response(path, error)(scope, receive, watched)
        finally:
            self.running -= 1
            self.held -= body.charged
            if self.observe is not None:
                route = getattr(scope.get("route"), "path", "unknown")
                self.observe(scope["method"], route, status, time.perf_counter() - started)


class _Body:
    """The body of one request while it arrives."""

    def __init__(self, guard: Guard, receive: Receive) -> None:
        self.guard = guard
        self.inner = receive
        self.seen = 0
        self.charged = 0
        self.started: float | None = None
        self.complete = False

    def admit(self, scope: Scope) -> None:
        """Refuse by what is known before reading: concurrency, full queues and the declared length."""
        guard, limits = self.guard, self.guard.limits
        if guard.running > limits.max_requests:
            raise Refused(503, "overloaded", "Too many requests are in flight.", "Try again later.", retry_after=1)
        work = work_of(scope)
        if work is not None and guard.check_room is not None:
            guard.check_room(work)
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
        if not declared:
            return
        if not declared.isdigit() or len(declared) > 18:
            raise Refused(400, "bad-request", "The header Content-Length is not a number of bytes.")
        length = int(declared)
        if length > limits.max_body_bytes:
            raise too_large("A body", length, limits.max_body_bytes, "bytes")
        if guard.held + length > limits.max_inflight_bytes:
            raise _full()

    async def receive(self) -> Message:
        """The next message, within the limits."""
        if self.complete:
            return await self.inner()  # only a disconnect can come now, and waiting for it has no limit
        limits = self.guard.limits
        now = time.monotonic()
        self.started = self.started or now
        left = self.started + limits.body_seconds - now
        try:
            async with asyncio.timeout(max(0.0, min(limits.idle_seconds, left))):
                message = await self.inner()
        except TimeoutError:
            raise Refused(
                408,
                "too-slow",
                f"The body did not arrive within {limits.body_seconds:g} s, or paused for {limits.idle_seconds:g} s.",
                "Send it faster or in smaller requests.",
            ) from None
        if message["type"] == "http.request":
            size = len(message.get("body", b""))
            self.seen += size
            if self.seen > limits.max_body_bytes:
                raise too_large("A body", self.seen, limits.max_body_bytes, "bytes")
            self.charge(size)
            self.complete = not message.get("more_body", False)
        return message

    def charge(self, count: int) -> None:
        """Hold ``count`` more bytes until the request ends. Raises Refused (503) when all together hold too many."""
        if self.guard.held + count > self.guard.limits.max_inflight_bytes:
            raise _full()
        self.charged += count
        self.guard.held += count


def work_of(scope: Scope) -> Work | None:
    """What a request asks to compute; None for those that only read or write small files."""
    if scope["method"] != "POST":
        return None
    path: str = scope["path"]
    if path == "/v1/predict" or (path.startswith("/v2/") and path.endswith("/infer")):
        return "predict"
    if path.startswith("/v1/stream/") or (path.startswith("/v1/states/") and path.count("/") == 3):
        return "adapt"
    return None


def charge(scope: Scope, count: int) -> None:
    """Count ``count`` bytes of decoded data on the request of ``scope``, until it ends."""
    hold: Callable[[int], None] | None = scope.get(CHARGE)
    if hold is not None:
        hold(count)


def _full() -> Refused:
    return Refused(
        503, "overloaded", "The server holds as many bytes of requests as it may.", "Try again later.", retry_after=2
    )
