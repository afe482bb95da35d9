"""A port for a server that has to be told one."""

from __future__ import annotations

import random
import socket
from contextlib import suppress


def free_port() -> int:
    """A port of loopback that is free, and that nobody gets by chance before its server listens there.

    It lies below those that the kernel gives to connections and to servers that ask for any, and above Ray's.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
