"""A TCP proxy on loopback that can refuse, or fall silent, for a while: the network between a program and a server."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress


class Proxy:
    """Forwards connections to ``port`` on loopback.

    Args:
        port: of the server.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._open: set[socket.socket] = set()
        self._flows = threading.Event()
        self._flows.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._refuses = False
        threading.Thread(target=self._accept, daemon=True).start()

    def refuse(self, yes: bool) -> None:
        """Break all connections and take no new one; or work again."""
        self._refuses = yes
        if yes:
            for connection in list(self._open):
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def stall(self, yes: bool) -> None:
        """Keep all connections and pass nothing on; or go on where it stopped."""
        if yes:
            self._flows.clear()
        else:
            self._flows.set()

    def close(self) -> None:
        """End."""
        self.stall(False)
        self.refuse(True)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                caller, _ = self._listener.accept()
                if self._refuses:
                    caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    caller.close()  # a reset, as of a port where nobody listens
                    continue
                server = socket.create_connection(("127.0.0.1", self._target))
                self._open |= {caller, server}
                for pair in ((caller, server), (server, caller)):
                    threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                self._flows.wait()
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            self._open.discard(end)
            end.close()
