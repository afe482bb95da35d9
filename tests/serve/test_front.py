"""The web server inside a replica: two share a port, answers are not delayed, a taken port is said."""

from __future__ import annotations

import socket
import statistics
import time

import httpx
import pytest
from fastapi import FastAPI

from moe.errors import EnvironmentProblem
from serve.front import Front
from tests.support.ports import free_port


def api(name):
    app = FastAPI()

    @app.get("/")
    async def who() -> str:
        return name

    return app


@pytest.fixture
def port():
    return free_port()


def ask(url):
    return httpx.get(url, trust_env=False, timeout=60).json()


def test_two_share_a_port_and_one_goes_on_when_the_other_ends(port):
    url = f"http://127.0.0.1:{port}/"
    first, second = Front(api("first"), "127.0.0.1", port), Front(api("second"), "127.0.0.1", port)
    try:
        assert {ask(url) for _ in range(60)} == {"first", "second"}
        first.close()
        with pytest.raises(EnvironmentProblem):
            first.check()
        assert {ask(url) for _ in range(10)} == {"second"}
        second.check()
    finally:
        second.close()


def test_answers_on_a_kept_connection_are_not_held_back(port):
    """Without TCP_NODELAY every answer in two pieces waits for a delayed acknowledgement: 40 ms."""
    front = Front(api("one"), "127.0.0.1", port)
    times = []
    try:
        with httpx.Client(trust_env=False, timeout=60) as client:
            for _ in range(200):
                begin = time.perf_counter()
                client.get(f"http://127.0.0.1:{port}/")
                times.append(time.perf_counter() - begin)
    finally:
        front.close()
    # It waits with every answer after the first few; on a busy machine many are late, but not all of them.
    assert statistics.quantiles(times[40:], n=10)[0] < 0.03


def test_a_port_of_somebody_else_is_said(port):
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(EnvironmentProblem, match=str(port)):
            Front(api("x"), "127.0.0.1", port)
