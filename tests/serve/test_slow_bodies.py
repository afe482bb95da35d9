"""Bodies and headers that are too long, too slow or never end: refused before and while they are read."""

from __future__ import annotations

import asyncio
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from starlette.requests import Request

from serve.front import Front
from serve.http.api import make_api
from serve.http.errors import Json
from serve.http.limits import Guard, Limits
from tests.serve.http_support import make_backend, server_at
from tests.support.ports import free_port

SMALL = Limits(max_body_bytes=200_000)


def guarded(limits, messages, headers=()):
    """(status, pieces that were read) of a request whose body is ``messages``: (delay, bytes) pairs."""
    read, sent = [], []

    async def app(scope, receive, send):
        body = await Request(scope, receive).body()
        await Json({"bytes": len(body)})(scope, receive, send)

    async def receive():
        delay, body = messages[len(read)] if len(read) < len(messages) else (60, b"")
        read.append(len(body))
        await asyncio.sleep(delay)
        return {"type": "http.request", "body": body, "more_body": True}

    async def send(message):
        sent.append(message)

    guard = Guard(app, limits)
    scope = {"type": "http", "method": "POST", "path": "/v1/x", "headers": list(headers), "query_string": b""}
    asyncio.run(guard(scope, receive, send))
    assert (guard.held, guard.running) == (0, 0)
    return sent[0]["status"], read


def test_a_declared_length_is_refused_before_anything_is_read():
    assert guarded(SMALL, [(0, b"x")], [(b"content-length", b"200001")]) == (413, [])
    assert guarded(SMALL, [(0, b"x")], [(b"content-length", b"-1")]) == (400, [])
    assert guarded(SMALL, [(0, b"x")], [(b"content-length", b"9" * 400)]) == (400, [])


def test_an_undeclared_length_is_counted():
    status, read = guarded(SMALL, [(0, bytes(50_000))] * 100)
    assert (status, len(read)) == (413, 5)


def test_a_pause_and_a_trickle_end_in_time():
    limits = Limits(idle_seconds=0.1, body_seconds=0.5)
    begin = time.monotonic()
    assert guarded(limits, [(0, b"x")])[0] == 408
    assert time.monotonic() - begin < 30  # of the 60 s that the pause would last
    begin = time.monotonic()
    status, read = guarded(limits, [(0.05, b"x")] * 1000)
    assert status == 408 and len(read) < 15
    assert time.monotonic() - begin < 30  # of 50


def test_all_bodies_together_are_bounded():
    limits = Limits(max_body_bytes=10_000, max_inflight_bytes=15_000)
    answers = []

    async def app(scope, receive, send):
        await Request(scope, receive).body()
        async with asyncio.timeout(60):
            while len(answers) < 3:  # until all others were refused
                await asyncio.sleep(0.01)
        await Json({})(scope, receive, send)

    guard = Guard(app, limits)

    async def one():
        async def receive():
            await asyncio.sleep(0)
            return {"type": "http.request", "body": bytes(9000), "more_body": False}

        async def send(message):
            if message["type"] == "http.response.start":
                answers.append((message["status"], dict(message["headers"]).get(b"retry-after")))

        await guard({"type": "http", "method": "POST", "path": "/", "headers": [], "query_string": b""}, receive, send)

    async def main():
        await asyncio.gather(*(one() for _ in range(4)))

    asyncio.run(main())
    assert sorted(status for status, _ in answers) == [200, 503, 503, 503]
    assert all(wait is not None for status, wait in answers if status == 503)
    assert guard.held == 0


def test_an_unforeseen_error_is_json_without_a_traceback():
    async def app(scope, receive, send):
        raise RuntimeError("secret of /tmp/x")

    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request"}

    scope = {"type": "http", "method": "GET", "path": "/v1/x", "headers": [], "query_string": b""}
    asyncio.run(Guard(app, Limits())(scope, receive, send))
    assert sent[0]["status"] == 500
    assert b"secret" not in sent[1]["body"] and b'"internal"' in sent[1]["body"]


# ---- over a socket --------------------------------------------------------------------------------------------------


def talk(port, data, wait=60.0):
    """Send ``data``, and return everything that comes back until the server closes or ``wait`` is over."""
    with socket.create_connection(("127.0.0.1", port), timeout=wait) as found:
        found.sendall(data)
        received = b""
        try:
            while piece := found.recv(65536):
                received += piece
        except TimeoutError:
            received += b"<still open>"
        return received


def test_slow_loris_in_headers_and_body_is_cut_off(tmp_path):
    limits = Limits(idle_seconds=0.3, body_seconds=1.0)
    asked = [
        b"GET /v2 HTTP/1.1\r\nHost: x\r\nX-Slow: ",
        b"",  # a connection that says nothing at all
        b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",
        b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\nGET /v2 HT",  # the second request of a connection
    ]
    # Time enough for the headers of a client that is held up, and an end before the server's own ten seconds.
    with server_at(tmp_path, limits=limits, header_seconds=3.0) as (port, _), ThreadPoolExecutor(len(asked)) as pool:
        cut, silent, slow, kept = pool.map(lambda data: talk(port, data, 9.5), asked)
    assert b"408" in cut and b"408" in silent
    assert slow.startswith(b"HTTP/1.1 408") and b"too-slow" in slow and b"paused for 0.3 s" in slow
    assert kept.startswith(b"HTTP/1.1 200") and b"408" in kept


def test_an_oversize_body_is_refused_without_being_sent(tmp_path):
    with server_at(tmp_path) as (port, _):
        head = b"POST /v1/states/x HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-npy\r\n"
        answer = talk(port, head + b"Content-Length: 99999999999\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 413") and answer.lower().count(b"connection: close") == 1


def test_connections_beyond_the_limit_are_told_when_to_return(tmp_path):
    backend = make_backend(tmp_path)
    with ExitStack() as stack:
        front = Front(make_api(backend), "127.0.0.1", port := free_port(), connections=3)
        stack.callback(front.close)
        for _ in range(3):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        answer = talk(port, b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 503") and b"retry-after: " in answer and b'"overloaded"' in answer
