"""A real ``moepipe serve`` in processes of its own, for tests that load it or kill parts of it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from serve.client import Client
from tests.chaos.killer import Family
from tests.support.ports import free_port

ROOT = Path(__file__).resolve().parents[2]


class Serving:
    """The server and everything below it.

    Args:
        model: folder of the bundle.
        folder: of states, store and output.
        options: further ones of the command.
    """

    def __init__(self, model: Path, folder: Path, *options: str) -> None:
        self.folder, self.port = folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [sys.executable, "-m", "orchestrator.cli", "serve", str(model), "--port", str(self.port)]
        self._command += ["--store", str(folder / "store"), "--states", str(self.states), *options]
        self.family = Family()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def states(self) -> Path:
        return self.folder / "states"

    def __enter__(self) -> Serving:
        self.start()
        self.ready()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start without waiting."""
        env = {key: value for key, value in os.environ.items() if not key.startswith(("MOEPIPE_", "RAY_"))}
        env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "output.txt").open("ab") as output:
            self.process = subprocess.Popen(
                self._command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )

    def ready(self, seconds: float = 180.0) -> None:
        """Wait until predictions are answered."""
        with Client(self.url, timeout=20) as client:
            try:
                client.wait_until_ready(seconds, lambda: self.process is None or self.process.poll() is not None)
            except Exception as error:
                raise AssertionError(self.tail()) from error
        self.look()

    def stop(self) -> None:
        """Ctrl-C; who outlives it is a finding, and killed."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(90)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        left = self.family.orphans(120)
        self.family.clear()
        assert not left, left

    def look(self) -> None:
        """Remember who belongs to the server now."""
        assert self.process is not None
        self.family.look(self.process.pid)

    def actors(self, title: str) -> list[psutil.Process]:
        """Ray's actors below the server whose title begins so."""
        assert self.process is not None
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if " ".join(process.cmdline()).startswith(f"ray::{title}"):
                        found.append(process)
        return found

    def replicas(self, deployment: str) -> list[psutil.Process]:
        """Processes of a deployment."""
        return self.actors(f"ServeReplica:moepipe:{deployment}")

    def memory(self) -> int:
        """Resident bytes of all replicas."""
        return sum(process.memory_info().rss for name in ("inference", "adaptation") for process in self.replicas(name))

    def busy(self) -> float:
        """Processor seconds that all replicas have used."""
        names = ("inference", "adaptation")
        return sum(sum(process.cpu_times()[:2]) for name in names for process in self.replicas(name))

    def tail(self) -> str:
        """What the server said last."""
        return (self.folder / "output.txt").read_text(errors="replace")[-3000:]
