"""The run record: one folder per run, appended while it goes on, never written again once it ended.

``runs/<id>/``: ``spec.json`` (resolved, so that a run resumes without its YAML), ``plan.json``, ``environment.json``,
``events.jsonl``, ``logs/<node>.log`` and, at the end, ``artifacts.json``. After Metaflow: an explicit resume of an
ended run is a new run that names its origin; a run whose driver died is continued under its own id.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, Protocol

from filelock import FileLock, Timeout

from moe.errors import BusyError, NotFoundError, RunFailed, nearest
from orchestrator.blobs import write_atomic
from orchestrator.events import Event, EventKind, append_event, read_events
from orchestrator.owner import alive, environment, process_start
from orchestrator.spec import PipelineSpec, spec_from_record
from orchestrator.store import Store

Status = Literal["running", "finished", "failed", "interrupted", "lost"]
ENDED = ("finished", "failed", "interrupted")
LATEST = ("latest", "last")  # names of the newest run
HEARTBEAT_S = 5.0


class Jsonable(Protocol):
    """A plan, as far as the record is concerned."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        ...


def _dump(value: Any) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"


def read_json(path: Path) -> Any:
    """The content of a small file; None when it is not there or not JSON."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


class Run:
    """One run: read by anybody, written by the process that holds :meth:`lock`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.id = path.name
        self._ended: bool | None = None

    # ---- reading ---------------------------------------------------------------------------------------------------

    def spec(self) -> PipelineSpec:
        """The resolved pipeline."""
        return spec_from_record((self.path / "spec.json").read_bytes())

    @property
    def pipeline(self) -> str:
        """Name of the pipeline, also of a record whose spec another version would refuse; empty without one."""
        return str((read_json(self.path / "spec.json") or {}).get("name", ""))

    @property
    def info(self) -> dict[str, Any]:
        """Of its making: ``id``, ``created`` (seconds since 1970), ``origin`` (or None), ``options``."""
        return read_json(self.path / "run.json") or {}

    @property
    def origin(self) -> str | None:
        """Id of the run that this one resumes, if any."""
        origin: str | None = self.info.get("origin")
        return origin

    def plan(self) -> dict[str, Any] | None:
        """The plan as it was at the start."""
        plan: dict[str, Any] | None = read_json(self.path / "plan.json")
        return plan

    def artifacts(self) -> dict[str, str]:
        """Node -> artifact digest, of an ended run."""
        return read_json(self.path / "artifacts.json") or {}

    def events(self, start: int = 0) -> Iterator[Event]:
        """All events in order."""
        for event, _ in read_events(self.path / "events.jsonl", start):
            yield event

    def follow(self, start: int = 0) -> Iterator[tuple[Event, int]]:
        """Events from byte ``start`` on, each with the position after it."""
        return read_events(self.path / "events.jsonl", start)

    @property
    def status(self) -> Status:
        """``lost`` means: not ended, and the process that drove it is gone; `moepipe resume` continues it."""
        ended = self._end()
        if ended is not None:
            status: Status = ended.data["status"]
            return status
        owner = read_json(self.path / "owner.json")
        with suppress(FileNotFoundError):
            if owner is not None and alive(owner, (self.path / "owner.json").stat().st_mtime):
                return "running"
        ended = self._end()  # meanwhile: it ends first, and gives up its lock after that
        return "lost" if ended is None else ended.data["status"]

    def _end(self) -> Event | None:
        last = None
        path = self.path / "events.jsonl"
        with suppress(FileNotFoundError):
            # The end is the last line; a few kilobytes are enough to find it.
            for event, _ in read_events(path, _last_line(path)):
                last = event
        return last if last is not None and last.kind == "run-finished" else None

    def log_path(self, node: str) -> Path:
        """Where the member's log lies: ``logs/<node>.log``."""
        return self.path / "logs" / f"{re.sub(r'[^A-Za-z0-9=._/-]', '_', node)}.log"

    # ---- writing ---------------------------------------------------------------------------------------------------

    def append(self, event: Event) -> None:
        """Append one event.

        Raises:
            RunFailed: the run has ended; ended runs are never written again.
        """
        if self._ended is None:
            self._ended = self._end() is not None
        if self._ended:
            raise RunFailed(f"Run {self.id} has ended and is not written again.", "`moepipe resume` starts a new one.")
        append_event(self.path / "events.jsonl", event)
        self._ended = event.kind == "run-finished"

    def record(self, kind: EventKind, node: str = "", **data: Any) -> Event:
        """Append an event that happens now, and return it."""
        event = Event(round(time.time(), 3), kind, node, data)
        self.append(event)
        return event

    def save_plan(self, plan: Jsonable) -> None:
        """Keep the plan (of the first start; a continued run keeps the plan it began with)."""
        if not (self.path / "plan.json").exists():
            write_atomic(self.path / "plan.json", _dump(plan.to_json()))

    def finish(self, status: Status, artifacts: Mapping[str, str], **data: Any) -> Event:
        """Write ``artifacts.json`` and the last event; nothing is written after it."""
        write_atomic(self.path / "artifacts.json", _dump(dict(artifacts)))
        return self.record("run-finished", status=status, artifacts=len(artifacts), **data)

    def request_stop(self) -> None:
        """Ask the process that drives the run to stop; it looks for this file."""
        (self.path / "cancel").touch()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Drive the run: one process at a time.

        Raises:
            BusyError: another live process does; the message says which.
        """
        lock = FileLock(str(self.path / "lock"), timeout=0.5)
        try:
            lock.acquire()
        except Timeout:
            owner = read_json(self.path / "owner.json") or {}
            who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"
            raise BusyError(
                f"Run {self.id} is being worked on by {who}.",
                f"Follow it with `moepipe status {self.id}`, or stop it with `moepipe cancel {self.id}`.",
            ) from None
        pid = os.getpid()
        owner = {"pid": pid, "host": socket.gethostname(), "start": process_start(pid), "since": time.time()}
        stop = threading.Event()
        try:
            write_atomic(self.path / "owner.json", _dump(owner))
            threading.Thread(target=self._beat, args=(stop,), name="moepipe-heartbeat", daemon=True).start()
            yield
        finally:
            stop.set()
            (self.path / "owner.json").unlink(missing_ok=True)
            lock.release()

    def _beat(self, stop: threading.Event) -> None:
        while not stop.wait(HEARTBEAT_S):
            with suppress(OSError):
                os.utime(self.path / "owner.json")


def _last_line(path: Path) -> int:
    """Byte position at which the last complete line begins."""
    end = path.stat().st_size
    span = 1 << 16
    with path.open("rb") as stream:
        while True:
            start = max(0, end - span)
            stream.seek(start)
            block = stream.read(end - start)
            complete = block.rfind(b"\n")
            before = block.rfind(b"\n", 0, max(complete, 0))
            if before >= 0:
                return start + before + 1
            if start == 0:
                return 0
            span *= 4


class RunStore:
    """The runs of a store."""

    def __init__(self, store: Store | Path) -> None:
        self.root = (store.folder if isinstance(store, Store) else store) / "runs"
        self._remote = store if isinstance(store, Store) and not store.is_local else None

    def _run(self, name: str) -> Run:
        if self._remote is None:
            return Run(self.root / name)
        from orchestrator.cluster_record import StoredRun

        return StoredRun(self.root / name, self._remote)

    def create(
        self,
        spec: PipelineSpec,
        plan: Jsonable | None = None,
        origin: str | None = None,
        options: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> Run:
        """Make a new run.

        Args:
            spec: the resolved pipeline.
            plan: the plan shown to the user, if any.
            origin: id of the ended run that this one resumes.
            options: how it was started (executor, address, data root), for ``resume``.
            name: its id; default one made of the pipeline's name and the time.
        """
        now = time.time()
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(now))
        path = self.root / (name or f"{spec.name}-{stamp}-{secrets.token_hex(2)}")
        write_atomic(path / "spec.json", spec.canonical().encode())
        write_atomic(path / "environment.json", _dump(environment()))
        info = {"id": path.name, "created": now, "origin": origin, "options": dict(options or {})}
        write_atomic(path / "run.json", _dump(info))
        (path / "logs").mkdir(exist_ok=True)
        run = self._run(path.name)
        if plan is not None:
            run.save_plan(plan)
        return run

    def open(self, name: str) -> Run:
        """The run with this id, or the one whose id begins so; ``latest`` (or ``last``) is the newest.

        Raises:
            NotFoundError: there is none, or several begin so.
        """
        ids = [run.id for run in self.list()]
        if name in LATEST and ids:
            return self._run(ids[0])
        if name in ids:
            return self._run(name)
        matches = [run for run in ids if run.startswith(name)] if name else []
        if len(matches) == 1:
            return self._run(matches[0])
        if matches:
            raise NotFoundError(f"{name!r} could be {len(matches)} runs.", f"Choose one of: {', '.join(matches[:5])}.")
        raise NotFoundError(f"There is no run {name!r} in {self.root}.", nearest(name, ids[:20]))

    def list(self) -> list[Run]:
        """All runs, newest first."""
        if self._remote is not None:
            from orchestrator.cluster_record import pull_index

            pull_index(self._remote, self.root)
        if not self.root.is_dir():
            return []
        runs = [self._run(path.name) for path in self.root.iterdir() if (path / "run.json").exists()]
        return sorted(runs, key=lambda run: (run.info.get("created", 0.0), run.id), reverse=True)

    def remove(self, name: str) -> None:
        """Remove a run's record."""
        shutil.rmtree(self.root / name, ignore_errors=True)
        if self._remote is not None:
            self._remote.blobs.remove(f"runs/{name}")

    def resume(self, name: str, options: Mapping[str, Any] | None = None) -> Run:
        """The run to execute when ``name`` is resumed: itself when it is lost, a new one when it ended.

        Raises:
            BusyError: it is running.
            NotFoundError: there is none.
        """
        run = self.open(name)
        if run.status == "running":
            with run.lock():
                pass  # raises BusyError with the owner; falls through when it just ended
        if run.status in ENDED:
            return self.create(
                run.spec(), origin=run.id, options=run.info.get("options") if options is None else options
            )
        return run
