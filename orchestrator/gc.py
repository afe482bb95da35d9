"""Frees space: results and records that no run worth keeping refers to.

Kept are the newest runs of every pipeline and whatever can still be resumed among them. Everything else goes, keys
first: a run that starts meanwhile sees a miss and never a damaged hit.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from moe.errors import BusyError, NotFoundError
from orchestrator.runs import Run, RunStore
from orchestrator.store import Store
from orchestrator.tracking_state import state_path


@dataclass
class Garbage:
    """What would go.

    Attributes:
        runs: run records.
        artifacts: digest -> bytes.
        damaged: artifacts whose bytes have changed, with what is wrong (only when asked to verify).
        keys: key records that point to nothing worth keeping.
        scratch: checkpoints of members that no kept run will continue, and half-written files of crashes.
        copies: names of checkpoints in a store that is not a folder, as ``scratch``.
        bytes: of artifacts and scratch together.
        busy: runs that are running now; nothing is removed while there are any.
    """

    runs: list[str] = field(default_factory=list)
    artifacts: dict[str, int] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)
    scratch: list[Path] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)
    bytes: int = 0
    busy: list[str] = field(default_factory=list)


def survey(store: Store, keep_last: int, verify: bool = False) -> Garbage:
    """Find what is not needed by the newest ``keep_last`` runs of every pipeline; removes nothing.

    Args:
        store: the store.
        keep_last: runs of each pipeline to keep.
        verify: hash every artifact, and count the damaged ones in.
    """
    garbage = Garbage()
    used: set[str] = set()
    unfinished: set[str] = set()
    seen: dict[str, int] = defaultdict(int)
    for run in RunStore(store).list():
        running = run.status == "running"
        name = run.pipeline
        seen[name] += 1
        if running:
            garbage.busy.append(run.id)
        if seen[name] > keep_last and not running:
            garbage.runs.append(run.id)
            continue
        digests, keys = _needs(run)
        used |= digests
        unfinished |= keys
    used |= _trials(store, used)
    for digest in store.digests():
        problem = _damage(store, digest) if verify else ""
        if problem:
            garbage.damaged[digest] = problem
        if problem or digest not in used:
            garbage.artifacts[digest] = _size(store, digest)
    there = used - set(garbage.damaged)
    garbage.keys = sorted(record.key for record in store.records() if record.artifact not in there)
    garbage.scratch = sorted(_leftovers(store, unfinished))
    if not store.is_local:
        garbage.copies = [name for name in store.blobs.names("scratch") if name.split(".")[0] not in unfinished]
    garbage.bytes = sum(garbage.artifacts.values()) + sum(_folder_size(path) for path in garbage.scratch)
    return garbage


def _needs(run: Run) -> tuple[set[str], set[str]]:
    """Artifacts that a run made or used, and keys of members that it began and did not finish."""
    digests: set[str] = set(run.artifacts().values())
    begun: dict[str, str] = {}
    for event in run.events():
        if event.kind in ("member-hit", "member-finished"):
            digests.add(str(event.data["digest"]))
            begun.pop(event.node, None)
        elif event.kind == "member-started" and "key" in event.data:
            begun[event.node] = str(event.data["key"])
    return digests, set(begun.values())


def _trials(store: Store, digests: set[str]) -> set[str]:
    """Trials of the searches among some artifacts: a search with another space takes them over."""
    found: set[str] = set()
    for digest in digests:
        with suppress(NotFoundError):
            found.update(store.artifact(digest).meta.get("search", {}).get("artifacts", ()))
    return found


def _size(store: Store, digest: str) -> int:
    try:
        return store.artifact(digest).bytes
    except NotFoundError:
        return 0


def _damage(store: Store, digest: str) -> str:
    try:
        return "; ".join(store.verify(store.artifact(digest)))
    except NotFoundError as error:
        return error.message


def _leftovers(store: Store, unfinished: set[str]) -> Iterator[Path]:
    for path in (store.folder / "scratch").glob("*"):
        if path.name.split(".")[0][:64] not in unfinished:
            yield path
    yield from (store.folder / "staging").glob("*")


def _folder_size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def collect(store: Store, garbage: Garbage) -> None:
    """Remove what :func:`survey` found.

    Raises:
        BusyError: a run is running in this store.
    """
    if garbage.busy:
        raise BusyError(
            f"Run {garbage.busy[0]} is running in this store, nothing was removed.",
            "Wait for it or cancel it; --dry-run works meanwhile.",
        )
    for key in garbage.keys:
        store.forget(key)
    for digest in garbage.artifacts:
        store.remove(digest)
    if not store.is_local:
        store.claims().sweep()
    for key in garbage.copies:
        store.blobs.remove(f"scratch/{key}")
    for path in garbage.scratch:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    for run in garbage.runs:
        RunStore(store).remove(run)
        for suffix in (".json", ".log", ".json.lock"):
            state_path(store, run).with_suffix(suffix).unlink(missing_ok=True)
