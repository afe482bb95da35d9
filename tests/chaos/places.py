"""Where rounds of the campaign take place: a machine, a small disk, a bucket behind a bad network, a cluster."""

from __future__ import annotations

import atexit
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import psutil
from filelock import FileLock, Timeout

from orchestrator import gc
from orchestrator.store import Store
from tests.chaos.disturb import ROOT, Arena
from tests.chaos.killer import Family, Victim
from tests.chaos.proxy import Proxy

PIPELINE = ROOT / "tests" / "chaos" / "campaign.yaml"
CHECKPOINT_EVERY, EXPERT_STEPS = 20, 480  # in the pipeline
STALL_S = 20.0
_BUCKET = "chaos"


class Machine(Arena):
    """An embedded Ray and a store in a folder."""

    kinds: ClassVar[tuple[str, ...]] = (
        *("worker", "rank", "actor", "raylet", "gcs", "driver", "object", "pause", "freeze", "damage"),
    )

    def __init__(self, folder: Path) -> None:
        super().__init__(PIPELINE, folder)
        self.family = Family()
        self.process: subprocess.Popen[bytes] | None = None
        self.name = f"run-{folder.name}"
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def environment(self) -> dict[str, str]:
        """Of the driver and all below it."""
        return {
            **super().environment,
            "MOEPIPE_STALL_S": str(STALL_S),
            "MOEPIPE_TEST_ORDERS": str(self.folder / "orders"),
            "MOEPIPE_SYNC_S": "1",
        }

    def open(self) -> None:
        """Whatever has to be there before the driver."""

    def close(self) -> None:
        """End what was started."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def where(self) -> list[str]:
        """Options of ``submit``."""
        return []

    def begin(self) -> None:
        """Start the pipeline under its name; when it was started before, that continues it."""
        self.process = self.start("submit", str(self.pipeline), "--run", self.name, *self.where())

    def again(self, rng: random.Random) -> None:
        """Continue after the driver is gone: by ``resume``, or by submitting the name once more."""
        runs = self.runs()
        if runs and rng.random() < 0.5:
            self.process = self.start("resume", runs[-1].name, *self.where())
        else:
            self.begin()

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """See the base class; with the campaign's own command line."""
        with (self.folder / "output.txt").open("ab") as output:
            command = [sys.executable, "-m", "tests.chaos.drive", *arguments]
            quiet = subprocess.DEVNULL
            return subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stdin=quiet, stdout=output, stderr=subprocess.STDOUT
            )

    # ---- who is there ----------------------------------------------------------------------------------------------

    def look(self) -> list[Victim]:
        """All processes of this round."""
        return self.family.look(self.process.pid) if self.process is not None else []

    def pick(self, kind: str, rng: random.Random) -> Victim | None:
        """A process of this kind that is at work."""
        found = [victim for victim in self.look() if victim.kind == kind]
        if kind == "member":
            found = [victim for victim in found if "MemberRunner.run" in victim.title]
        return rng.choice(sorted(found, key=lambda victim: victim.pid)) if found else None

    def at_work(self) -> dict[str, int]:
        """Member -> its process, for those that have made progress since they were started last."""
        found: dict[str, int] = {}
        moved: set[str] = set()
        for event in self.events():
            if event.kind == "member-started":
                found[event.node] = int(event.data["pid"])
                moved.discard(event.node)
            elif event.kind == "member-progress":
                moved.add(event.node)
            elif event.kind in ("member-finished", "member-failed"):
                found.pop(event.node, None)
            elif event.kind == "run-started":
                found, moved = {}, set()
        return {node: pid for node, pid in found.items() if node in moved}

    # ---- afterwards ------------------------------------------------------------------------------------------------

    def opened(self) -> Store:
        """The store."""
        return Store.open(self.environment["MOEPIPE_STORE"], self.folder / "cache")

    def left_over(self) -> list[str]:
        """What the round left behind that it should not have, in words."""
        wrong = [f"orphan: {victim.title}" for victim in self.family.orphans(60)]
        store = self.opened()
        wrong += [f"scratch: {path.name}" for path in _names(store.folder / "scratch")]
        for path in _names(store.folder / "locks"):
            lock = FileLock(str(path), timeout=0)
            try:
                lock.acquire()
                lock.release()
            except Timeout:
                wrong.append(f"held lock: {path.name}")
        garbage = gc.survey(store, keep_last=1)
        self.staged = len(garbage.scratch)
        gc.collect(store, garbage)
        wrong += [f"after gc: {path.name}" for path in _names(store.folder / "staging")]
        damaged = [d for run in self.runs()[-1:] for d in _damaged(store, run)]
        return wrong + [f"damaged artifact: {digest}" for digest in damaged]

    staged = 0


class Disk(Machine):
    """The store is a file system of 24 MB."""

    kinds: ClassVar[tuple[str, ...]] = ("disk full",)

    def open(self) -> None:
        """See the base class. Needs the right to mount."""
        self.store.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(self.store)], check=True)

    def close(self) -> None:
        """See the base class."""
        super().close()
        for _ in range(50):
            if subprocess.run(["umount", str(self.store)], capture_output=True, check=False).returncode == 0:
                return
            time.sleep(0.2)


class Remote(Machine):
    """The store is a bucket; its server is reached through a proxy."""

    kinds: ClassVar[tuple[str, ...]] = ("store away", "store silent")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.proxy = _server()

    def open(self) -> None:
        """See the base class."""
        os.environ.update({name: value for name, value in self.environment.items() if name.startswith("AWS_")})
        import boto3

        boto3.client("s3").create_bucket(Bucket=_BUCKET)

    @property
    def environment(self) -> dict[str, str]:
        """See the base class."""
        return {
            **super().environment,
            "MOEPIPE_STORE": f"s3://{_BUCKET}/{self.folder.name}",
            "MOEPIPE_CACHE": str(self.folder / "cache"),
            "AWS_ACCESS_KEY_ID": "tester",
            "AWS_SECRET_ACCESS_KEY": "tester",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.proxy.port}",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def runs(self) -> list[Path]:
        """See the base class."""
        found = self.folder.glob("cache/*/runs/*/run.json")
        return [path.parent for path in sorted(found, key=lambda path: path.stat().st_mtime_ns)]

    def left_over(self) -> list[str]:
        """See the base class; also in the bucket."""
        wrong = super().left_over()
        store = self.opened()
        wrong += [f"in the bucket: scratch/{name}" for name in store.blobs.names("scratch")]
        own = store.claims().holder
        wrong += [f"in the bucket: claims/{n}" for n in store.blobs.names("claims") if n != "holders" and own not in n]
        return wrong


class Cluster(Machine):
    """Three small fake nodes, one of them the head, and a store in a folder that all see."""

    kinds: ClassVar[tuple[str, ...]] = ("node", "spot notice", "cut", "head")
    nodes = 2

    def open(self) -> None:
        """See the base class."""
        clean = {name: value for name, value in self.environment.items() if not name.startswith("RAY_")}
        with (self.folder / "cluster.txt").open("ab") as errors:
            self.fakes = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.fakes", str(self.nodes)],
                cwd=ROOT,
                env=clean | {"RAY_AUTH_MODE": "disabled"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.family.look(self.fakes.pid)
        self.state = self._answer()
        self.family.look(self.fakes.pid)

    @property
    def environment(self) -> dict[str, str]:
        """See the base class."""
        fixed = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        trains = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", "RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}
        return {**super().environment, **fixed, **trains}

    def tell(self, do: str, *values: Any) -> Any:
        """Give an order to the cluster and wait for its answer."""
        assert self.fakes.stdin is not None
        self.fakes.stdin.write(json.dumps({"do": do, "with": values}) + "\n")
        self.fakes.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.fakes.stdout is not None
        for line in self.fakes.stdout:
            if line.startswith("{"):
                answer = json.loads(line)
                if "error" in answer:
                    raise RuntimeError(answer["error"])
                return answer
        raise RuntimeError(f"The cluster ended: {(self.folder / 'cluster.txt').read_text()[-2000:]}")

    def where(self) -> list[str]:
        """See the base class."""
        return ["--on", self.state["address"]]

    def look(self) -> list[Victim]:
        """See the base class."""
        return [*super().look(), *self.family.look(self.fakes.pid)]

    def busy_nodes(self) -> dict[str, list[psutil.Process]]:
        """Nodes on which members run, with the processes of each."""
        found = {}
        for name, pid in self.state["nodes"].items():
            with suppress(psutil.NoSuchProcess):
                raylet = psutil.Process(pid)
                below = raylet.children(recursive=True)
                titles = [" ".join(_command(process)) for process in below]
                if any("MemberRunner.run" in title or "TrainWorker" in title for title in titles):
                    found[name] = [raylet, *below]
        return found

    def end_cluster(self) -> None:
        """Everything of the cluster goes at once, the driver (it runs on the head) too."""
        self.look()
        victims = self.family.look(self.fakes.pid)
        self.fakes.kill()
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        for victim in victims:
            victim.kill()
        self.fakes.wait()

    def left_over(self) -> list[str]:
        """See the base class; also in Ray."""
        leaks = self.tell("leaks")
        wrong = [f"placement group: {group}" for group in leaks["groups"]]
        wrong += [f"actor: {name}" for name in leaks["actors"]]
        self.end_cluster()
        return wrong + super().left_over()

    def close(self) -> None:
        """See the base class."""
        super().close()
        if self.fakes.poll() is None:
            self.end_cluster()


def _command(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return process.cmdline()
    return []


def _names(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.glob("*")) if folder.is_dir() else ()


def _damaged(store: Store, run: Path) -> list[str]:
    digests = json.loads((run / "artifacts.json").read_text()).values()
    return [digest for digest in digests if store.verify(store.artifact(digest))]


@lru_cache(maxsize=1)
def _server() -> Proxy:
    """One S3 server for all rounds of this process, and the proxy before it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("moto_server")
    quiet = subprocess.DEVNULL
    server = subprocess.Popen([str(program), "-p", str(port)], stdout=quiet, stderr=quiet)
    atexit.register(server.kill)
    _wait_for(port)
    return Proxy(port)


def _wait_for(port: int) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.2)
    raise RuntimeError("moto_server does not start.")
