"""Is every node of a cluster fit to run pipelines? The checks of ``moepipe doctor``, run as a Ray task on each node.

On top of them, what only shows between machines: the same code everywhere, one store that all of them see, clocks that
agree. What a node says is compared with the head, where this runs.
"""

from __future__ import annotations

import hashlib
import json
import platform
import secrets
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moe.errors import EnvironmentProblem, MoepipeError
from orchestrator.doctor import OUR_PACKAGES, Check, examine

_ANSWER_S = 90.0
_SKEW_S = 5.0
_LOCAL = {"port 8265", "port 5000"}  # Ray itself uses the first; the second matters where the user sits


@dataclass(frozen=True)
class NodeReport:
    """What one node said.

    Attributes:
        node: its address; ``head`` says whether it is the head.
        resources: what Ray may give out there.
        checks: as :func:`orchestrator.doctor.examine`, and those between machines.
    """

    node: str
    head: bool
    resources: Mapping[str, float]
    checks: tuple[Check, ...]

    @property
    def failed(self) -> list[Check]:
        """Checks that stop pipelines from running there."""
        return [check for check in self.checks if check.status == "failed"]


def code_digest() -> str:
    """One digest over all source files of the four packages, as installed here."""
    home = Path(__file__).resolve().parent.parent
    total = hashlib.sha256()
    for package in OUR_PACKAGES:
        for path in sorted((home / package).rglob("*.py")):
            total.update(path.relative_to(home).as_posix().encode())
            total.update(path.read_bytes())
    return total.hexdigest()[:12]


def look_here(store: str, data_root: str, tracking: str, probe: str) -> dict[str, Any]:
    """What a node is asked: plain data. Runs in a task on it."""
    from orchestrator.store import Store

    checks = [check for check in examine(store, Path(data_root), tracking) if check.name not in _LOCAL]
    seen, problem = None, ""
    try:
        place = Store.open(store)
        seen = place.blobs.read(f"scratch/doctor-{probe}/head")
        place.blobs.write(f"scratch/doctor-{probe}/{socket.gethostname()}-{secrets.token_hex(2)}", b"x")
    except (MoepipeError, OSError) as error:
        problem = str(error)
    return {
        "checks": [asdict(check) for check in checks],
        "store_seen": seen is not None,
        "store_problem": problem,
        "code": code_digest(),
        "python": platform.python_version(),
        "time": time.time(),
    }


def examine_cluster(address: str, store: str, data_root: str, tracking: str) -> list[NodeReport]:
    """Ask every live node.

    Args:
        address: of Ray, e.g. ``auto``; this process must be on a node of the cluster.
        store: URL or folder, as the nodes are to see it.
        data_root: folder with prepared data sets on the nodes.
        tracking: where MLflow writes.

    Raises:
        EnvironmentProblem: no Ray there.
    """
    from orchestrator.executors.ray_env import prepare_environment

    prepare_environment()
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", ignore_reinit_error=True)
    except Exception as error:  # Ray raises several kinds
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise EnvironmentProblem(f"No Ray at {address}: {said}.", "Is the cluster up? ray status") from None
    from orchestrator.store import Store

    probe, place = secrets.token_hex(4), Store.open(store)
    place.blobs.write(f"scratch/doctor-{probe}/head", b"x")
    ask: Any = ray.remote(num_cpus=0, max_retries=0)(look_here)
    try:
        asked, nodes = [], [node for node in ray.nodes() if node["Alive"]]
        for node in nodes:
            where = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
            asked.append(ask.options(scheduling_strategy=where).remote(store, data_root, tracking, probe))
        reports, deadline = [], time.monotonic() + _ANSWER_S
        for node, ref in zip(nodes, asked, strict=True):
            try:
                answer: dict[str, Any] | None = ray.get(ref, timeout=max(1.0, deadline - time.monotonic()))
                said = ""
            except Exception as error:  # a node that died, a missing package there, no answer in time
                answer, said = None, (str(error).strip().splitlines() or [type(error).__name__])[-1]
            reports.append(_report(node, answer, said))
        return reports
    finally:
        with suppress(MoepipeError):
            place.blobs.remove(f"scratch/doctor-{probe}")


def _report(node: Mapping[str, Any], answer: Mapping[str, Any] | None, said: str) -> NodeReport:
    resources = {name: value for name, value in node["Resources"].items() if ":" not in name}
    head = "node:__internal_head__" in node["Resources"]
    if answer is None:
        fix = "Is moepipe installed there, in the environment that `ray start` used? Ray's log there says more."
        checks: tuple[Check, ...] = (Check("answers", "failed", said[:200] or "no answer", fix),)
    else:
        checks = (*(Check(**check) for check in answer["checks"]), *_between(answer))
    return NodeReport(str(node["NodeManagerAddress"]), head, resources, checks)


def _between(answer: Mapping[str, Any]) -> list[Check]:
    """What only shows between machines."""
    skew = abs(time.time() - answer["time"])
    same = answer["code"] == code_digest()
    python = answer["python"].rpartition(".")[0] == platform.python_version().rpartition(".")[0]
    return [
        Check("same code", "ok", answer["code"])
        if same
        else Check(
            "same code",
            "failed",
            f"{answer['code']}, the head has {code_digest()}",
            "Install the same wheel on all nodes (ray up cluster.yaml does), then start Ray there again.",
        ),
        Check("same Python", "ok" if python else "failed", answer["python"], "" if python else "One Python for all."),
        Check("shared store", "ok", "sees what the head wrote")
        if answer["store_seen"] and not answer["store_problem"]
        else Check(
            "shared store",
            "failed",
            answer["store_problem"] or "does not see what the head wrote",
            "Mount the same folder on all nodes, or use an object store: MOEPIPE_STORE in deploy/env.sh.",
        ),
        # Its answer waited for slower nodes: only a clock that runs ahead, or lags by minutes, is told.
        Check("clock", "ok", f"within {_ANSWER_S:g} s")
        if skew < _ANSWER_S and answer["time"] < time.time() + _SKEW_S
        else Check("clock", "warning", f"{skew:.0f} s off", "Switch on NTP (timedatectl set-ntp true)."),
    ]


def to_json(reports: list[NodeReport]) -> dict[str, Any]:
    """The document of ``moepipe doctor --cluster --json``."""
    return {
        "healthy": not any(report.failed for report in reports),
        "nodes": [asdict(report) for report in reports],
    }


def from_json(text: str) -> list[NodeReport]:
    """Back from what a job printed: the last such document in it.

    Raises:
        EnvironmentProblem: there is none.
    """
    lines = text.splitlines()
    for start in (index for index in range(len(lines) - 1, -1, -1) if lines[index] == "{"):
        with suppress(ValueError, KeyError, TypeError):
            nodes = json.JSONDecoder().raw_decode("\n".join(lines[start:]))[0]["nodes"]
            reports = [NodeReport(**node) for node in nodes]
            return [replace(item, checks=tuple(Check(**check) for check in item.checks)) for item in reports]  # type: ignore[arg-type]
    last = [line for line in lines if line.strip()][-1:]
    raise EnvironmentProblem(f"The cluster's answer cannot be read: {last[0][:200] if last else 'empty'}.")
