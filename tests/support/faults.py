"""Makers of trouble for tests: a full disk, a taken port, damaged files; and the command line run as users run it."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Said:
    """What a command answered: exit code, stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err

    @property
    def words(self) -> str:
        """All text with line breaks and runs of spaces as one space, so that wrapping does not matter."""
        return " ".join(self.text.replace("│", " ").split())


def environment(store: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """A clean environment in which ``store`` is the store and nothing else is set."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("MOEPIPE_", "MLFLOW_", "RAY_"))}
    env |= {"MOEPIPE_STORE": str(store), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    return env | dict(extra or {})


def moepipe(
    *arguments: str | Path,
    store: Path,
    extra: Mapping[str, str] | None = None,
    before: Callable[[], None] | None = None,
    timeout: float = 240,
) -> Said:
    """Run one command to its end in a process of its own.

    Args:
        arguments: of the command line.
        store: folder of the store.
        extra: further environment variables.
        before: called in the new process before it becomes the command (limits).
        timeout: seconds after which the test fails.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.launch", *map(str, arguments)],
        cwd=ROOT,
        env=environment(store, extra),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        preexec_fn=before,
        timeout=timeout,
        check=False,
    )
    return Said(done.returncode, done.stdout, done.stderr)


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[bool]:
    """``folder`` on a disk of its own of that size when we may mount one (root on Linux); says whether."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if (
        os.geteuid() != 0
        or not sys.platform.startswith("linux")
        or subprocess.run(mount, capture_output=True).returncode
    ):
        yield False
        return
    try:
        yield True
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, capture_output=True)


def file_size_limit(kilobytes: int) -> Callable[[], None]:
    """For ``before=``: files may not grow beyond this, which fails as a quota does (EFBIG)."""

    def limit() -> None:
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # otherwise the process ends without a word
        resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, kilobytes * 1024))

    return limit


@contextmanager
def taken_port() -> Iterator[int]:
    """A port on loopback that somebody else listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


_KEPT: list[socket.socket] = []


def closed_port() -> int:
    """A port on loopback that nobody listens on, and nobody will: it stays ours as long as this process lives."""
    _KEPT.append(socket.socket())
    _KEPT[-1].bind(("127.0.0.1", 0))
    return int(_KEPT[-1].getsockname()[1])


def truncate(path: Path, share: float = 0.5) -> None:
    """Cut a file, in a new inode (hard links keep the whole one)."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: int(len(content) * share)])


def files_below(folder: Path) -> set[str]:
    """Names of all files below ``folder``, for before and after."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} if folder.exists() else set()
