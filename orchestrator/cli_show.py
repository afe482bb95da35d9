"""What ``moepipe show`` says about a run and about a member."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from moe.errors import DataError, NotFoundError, nearest
from orchestrator import console
from orchestrator.runs import Run
from orchestrator.runview import NodeView, RunView
from orchestrator.store import Store
from orchestrator.tracking_state import TrackingState, parse_node, state_path


def find_members(view: RunView, node: str) -> list[NodeView]:
    """The member with this id, or all members of the stage with this name.

    Raises:
        NotFoundError: neither exists.
    """
    if node in view.nodes:
        return [view.nodes[node]]
    members = [item for name, item in view.nodes.items() if parse_node(name)[0] == node or name.startswith(f"{node}/")]
    if not members:
        stages = [stage.name for stage in view.stages]
        raise NotFoundError(f"The run has no stage or member {node!r}.", nearest(node, [*stages, *view.nodes][:60]))
    return members


def verify(store: Store, members: Sequence[NodeView]) -> int:
    """Hash every file of the members' artifacts; returns how many artifacts were looked at.

    Raises:
        DataError: bytes have changed or files are gone; all of it is listed.
    """
    digests = {member.artifact: member.node for member in members if member.artifact}
    problems = [f"{node}: {problem}" for digest, node in digests.items() for problem in _problems(store, digest)]
    if problems:
        raise DataError("\n  ".join(["Damaged artifacts:", *problems]), "Submit again: what is damaged is made anew.")
    return len(digests)


def _problems(store: Store, digest: str) -> list[str]:
    try:
        return store.verify(store.artifact(digest))
    except NotFoundError as error:
        return [error.message]


def describe_run(run: Run, view: RunView, store: Store) -> dict[str, Any]:
    """Everything about a run that fits a page."""
    state = TrackingState.load(state_path(store, run.id))
    return {
        "path": str(run.path),
        "options": run.info.get("options") or {},
        "environment": _environment(run),
        "tracking": {"uri": state.uri, "run": state.runs.get("", ""), "complete": state.complete, "error": state.error},
        "reports": reports(run, store),
        "stages": [
            {
                "stage": stage.name,
                "state": stage.state,
                "members": [{"node": m.node, "state": m.state, "artifact": m.artifact} for m in stage.members],
            }
            for stage in view.stages
        ],
        "failures": {item.node: item.error for item in view.nodes.values() if item.state == "failed"},
    }


def _environment(run: Run) -> dict[str, Any]:
    import json

    with suppress(OSError, ValueError):
        found: dict[str, Any] = json.loads((run.path / "environment.json").read_text(encoding="utf-8"))
        return found
    return {}


def reports(run: Run, store: Store) -> list[dict[str, Any]]:
    """Report artifacts of a run: node, folder, files. In the order of the stages."""
    found = []
    for node, digest in run.artifacts().items():
        with suppress(NotFoundError):
            artifact = store.artifact(digest)
            if artifact.kind == "report":
                found.append({"node": node, "path": str(store.local_path(artifact)), "files": sorted(artifact.files)})
    return found


def print_run(document: dict[str, Any]) -> None:
    """For people."""
    head = f"{document['run']}: {document['status']}, {console.seconds(document['seconds'])}"
    console.say(head, f"  record {document['path']}")
    if document["origin"]:
        console.say(f"  resumes {document['origin']}")
    packages = document["environment"].get("packages") or {}
    if packages:
        console.say("  with " + ", ".join(f"{name} {version}" for name, version in packages.items()))
    tracking = document["tracking"]
    if tracking["run"]:
        console.say(f"  MLflow run {tracking['run']} at {tracking['uri']}")
    rows = [
        (stage["stage"], member["node"], member["state"], member["artifact"][:12])
        for stage in document["stages"]
        for member in stage["members"]
    ]
    console.show_table(("stage", "member", "state", "artifact"), rows)
    for report in document["reports"]:
        console.say(f"  report {report['path']}")
    for node, error in document["failures"].items():
        console.say(f"  {node}: {error}")


def describe_member(run: Run, member: NodeView, store: Store) -> dict[str, Any]:
    """Everything about a member: its state, numbers, key and files."""
    stage, seed, name = parse_node(member.node)
    document: dict[str, Any] = {
        "node": member.node,
        "stage": stage,
        "seed": seed,
        "member": name,
        "state": member.state,
        "attempts": member.attempts,
        "seconds": member.seconds(member.ended or member.started or 0.0),
        "metrics": member.metrics,
        "error": member.error,
        "log": str(run.log_path(member.node)) if run.log_path(member.node).exists() else None,
        "key": _key(run, member.node),
        "artifact": None,
    }
    if member.artifact:
        with suppress(NotFoundError):
            artifact = store.artifact(member.artifact)
            document["artifact"] = {
                "digest": artifact.digest,
                "kind": artifact.kind,
                "path": str(store.local_path(artifact)),
                "bytes": artifact.bytes,
                "files": {file: entry.size for file, entry in artifact.files.items()},
                "meta": dict(artifact.meta),
            }
    return document


def _key(run: Run, node: str) -> str:
    """Key under which the member's result is kept; empty when it never got so far."""
    keys = [str(event.data["key"]) for event in run.events() if event.node == node and "key" in event.data]
    return keys[-1] if keys else ""


def print_member(document: dict[str, Any]) -> None:
    """For people."""
    console.say(f"{document['node']}: {document['state']}")
    lines: Sequence[tuple[str, Any]] = (
        ("error", document["error"]),
        ("time", console.seconds(document["seconds"]) if document["seconds"] is not None else ""),
        ("attempts", document["attempts"] if document["attempts"] > 1 else ""),
        ("key", document["key"]),
        ("log", document["log"]),
    )
    for name, value in lines:
        if value:
            console.say(f"  {name:9} {value}")
    for name, value in document["metrics"].items():
        console.say(f"  {name:40} {value:.6g}")
    artifact = document["artifact"]
    if artifact:
        console.say(f"  artifact  {artifact['kind']} {artifact['digest']}", f"            {artifact['path']}")
        for file, size in artifact["files"].items():
            console.say(f"            {file}  {console.size(size)}")


def print_why(run: Run, store: Store, node: str | None, json: bool) -> None:
    """What a member, a stage or (None) the final stages were made from."""
    from orchestrator.lineage import Lineage, to_json, tree

    lineage = Lineage(run, store)
    roots = lineage.roots(node)
    if json:
        console.emit_json(console.finite(to_json(lineage, run.id, roots)))
    else:
        console.say(*tree(lineage, roots))
