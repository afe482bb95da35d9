"""A web server inside a replica: uvicorn in a thread, on a port that several replicas of one machine share.

SO_REUSEPORT lets every replica listen on the same address; the kernel gives each new connection to one of them, and a
replica that dies takes only its own connections along. The port must have been seen to be free before the first replica
starts, since a stranger's socket of the same user could share it, too.
"""

from __future__ import annotations

import socket
import threading
import time
from typing import TYPE_CHECKING

from moe.errors import EnvironmentProblem
from serve.http.server import MAX_CONNECTIONS, server_for

if TYPE_CHECKING:
    from fastapi import FastAPI

_BACKLOG = 512
_START_S = 60.0


class Front:
    """Serves ``api`` until :meth:`close`.

    Args:
        api: the application.
        host: address to listen on.
        port: port to listen on.
        connections: open at one time; more are answered with 503.

    Raises:
        EnvironmentProblem: the address cannot be used, or the application does not start.
    """

    def __init__(self, api: FastAPI, host: str, port: int, connections: int = MAX_CONNECTIONS) -> None:
        self._socket = _listen(host, port)
        self._server = server_for(api, connections=connections)
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), name="moepipe-front", daemon=True
        )
        self._thread.start()
        deadline = time.monotonic() + _START_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                self._socket.close()
                raise EnvironmentProblem(f"The web server on {host}:{port} did not start.", "See the replica's log.")
            time.sleep(0.01)

    def check(self) -> None:
        """Raises EnvironmentProblem when the server has ended."""
        if not self._thread.is_alive():
            raise EnvironmentProblem("The web server of this replica has ended.")

    def close(self, timeout: float = 30.0) -> None:
        """Take no new connections, finish what is being answered, and end."""
        self._server.should_exit = True
        self._thread.join(timeout)
        self._socket.close()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named because asyncio sets TCP_NODELAY only where it stands: without it answers wait 40 ms.
    found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        found.bind((host, port))
        found.listen(_BACKLOG)
    except OSError as error:
        found.close()
        raise EnvironmentProblem(
            f"Cannot listen on {host}:{port}: {error.strerror or error}.", "Take another port with --port."
        ) from None
    found.set_inheritable(False)
    return found
