"""The only file that talks to MLflow: a projection of the run record, made by a process of its own.

Events become nested MLflow runs: pipeline, its stages, their members (tag ``mlflow.parentRunId``). The process follows
the event file, so importing MLflow (1.5 s) and migrating a new database (seconds) never delays the driver, and a server
that is down costs the run nothing: what is missing is written by ``moepipe track sync RUN`` from the same events.
Written twice means written once: runs are found again by tag, points keep the time of their event.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from moe.errors import EnvironmentProblem
from orchestrator.events import Event
from orchestrator.graph import Graph
from orchestrator.runs import Run
from orchestrator.store import Store
from orchestrator.tracking_state import (
    MAX_METRIC_KEYS,
    TrackingState,
    artifact_folder,
    clean_key,
    experiment_name,
    flatten,
    parse_node,
    state_path,
)

_BATCH = 1000
_REPORT_KIND = "report"
_DATA_KIND = "data"


def connect(uri: str) -> Any:
    """An ``MlflowClient`` for ``uri`` that gives up soon and sends no telemetry.

    Raises:
        EnvironmentProblem: the server does not answer.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    _probe(uri)
    import mlflow
    from mlflow.tracking import MlflowClient

    for noisy in ("alembic", "mlflow"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    mlflow.set_tracking_uri(uri)
    try:
        if uri.startswith("sqlite:///"):
            path = Path(uri.removeprefix("sqlite:///"))
            path.parent.mkdir(parents=True, exist_ok=True)
            # Two processes must not create the tables of a new file at the same time.
            with FileLock(f"{path}.lock"):
                client = MlflowClient(tracking_uri=uri)
                client.search_experiments(max_results=1)
                return client
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
        return client
    except Exception as error:
        raise EnvironmentProblem(
            f"MLflow at {uri} does not work: {_first_line(error)}", "See moepipe doctor."
        ) from error


def _probe(uri: str) -> None:
    """Ask whether anybody listens before MLflow's own long retries start."""
    if not uri.startswith(("http://", "https://")):
        return
    import socket
    from urllib.parse import urlsplit

    parts = urlsplit(uri)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=3).close()
    except OSError as error:
        raise EnvironmentProblem(
            f"MLflow at {uri} does not answer: {error.strerror or error}.", "Start it, or unset MLFLOW_TRACKING_URI."
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


class Projection:
    """Writes one run's events to MLflow.

    Args:
        run: the run.
        graph: the expanded pipeline: parameters and tags of the members.
        store: where the report's files are.
        client: from :func:`connect`.
        state: how far an earlier projection came.
    """

    def __init__(self, run: Run, graph: Graph, store: Store, client: Any, state: TrackingState) -> None:
        self.run, self.graph, self.store, self.client, self.state = run, graph, store, client, state
        self._path = state_path(store, run.id)
        self._metrics: dict[str, list[Any]] = defaultdict(list)
        self._names: dict[str, set[str]] = defaultdict(set)
        self._last: dict[str, dict[str, float]] = defaultdict(dict)
        self._open = {name: set(view.nodes) for name, view in graph.stages.items()}
        self._keys: dict[str, str] | None = None
        for event, position in run.follow():
            if position > state.position:
                break
            self._remember(event)

    def advance(self) -> None:
        """Write the events that are not written yet and remember the position after the last one."""
        position = None
        for event, after in self.run.follow(self.state.position):
            position = after
            self._remember(event)
            handler = getattr(self, "_on_" + event.kind.replace("-", "_"), None)
            if handler is not None:
                handler(event)
        if position is not None:
            self._flush()
            self.state.position = position
            self.state.save(self._path)

    def _remember(self, event: Event) -> None:
        """What later events need to know of earlier ones, also of those written by an earlier process."""
        if event.kind in ("member-hit", "member-finished", "member-failed") and event.data.get("decision") != "retry":
            self._open[self.graph.nodes[event.node].stage].discard(event.node)
        elif event.kind == "member-metrics":
            self._last[event.node].update(event.data.get("values") or {})

    # ---- events ----------------------------------------------------------------------------------------------------

    def _on_run_started(self, event: Event) -> None:
        self._pipeline(event.time)

    def _on_member_started(self, event: Event) -> None:
        self._member(event.node, event.time)

    def _on_member_progress(self, event: Event) -> None:
        values = event.data.get("values") or {}
        self._collect(event.node, values, int(event.data.get("done", 0)), event.time, "train/")

    def _on_member_metrics(self, event: Event) -> None:
        self._collect(event.node, event.data.get("values") or {}, int(event.data.get("step") or 0), event.time)

    def _on_member_hit(self, event: Event) -> None:
        earlier = self._earlier(str(event.data.get("key", "")))
        if earlier:
            self.state.reused[event.node] = earlier
        self._settle(event, "hit")

    def _on_member_finished(self, event: Event) -> None:
        name = self._member(event.node, event.time)
        tags = {"moepipe.key": event.data.get("key"), "moepipe.artifact": event.data.get("digest")}
        self._tag(name, {key: str(value) for key, value in tags.items() if value})
        self._settle(event, "finished")
        self._end(name, "FINISHED", event.time)

    def _on_member_failed(self, event: Event) -> None:
        if event.data.get("decision") in ("retry", "skip"):
            return
        name = self._member(event.node, event.time)
        self._tag(name, {"moepipe.error": str(event.data.get("error", ""))[:1000]})
        self._settle(event, "failed")
        self._end(name, "KILLED" if event.data.get("decision") == "stop" else "FAILED", event.time)

    def _on_run_finished(self, event: Event) -> None:
        status = {"finished": "FINISHED", "interrupted": "KILLED"}.get(str(event.data.get("status")), "FAILED")
        for name in [*self.state.runs]:
            if name not in self.state.ended and name:
                self._end(name, status, event.time)
        self._tag("", {"moepipe.hits": str(len(self.state.reused)), "moepipe.status": str(event.data.get("status"))})
        self._end("", status, event.time)
        self.state.complete = True

    # ---- runs ------------------------------------------------------------------------------------------------------

    def _experiment(self) -> str:
        if not self.state.experiment:
            name = experiment_name(self.graph.spec)
            found = self.client.get_experiment_by_name(name)
            local = self.state.uri.startswith("sqlite:")
            place = (artifact_folder(self.store) / clean_key(name)).as_uri() if local else None
            with suppress(Exception):  # another process may have made it in between; the next line finds out
                found = found or self.client.get_experiment(
                    self.client.create_experiment(name, artifact_location=place)
                )
            self.state.experiment = (found or self.client.get_experiment_by_name(name)).experiment_id
        return self.state.experiment

    def _start(self, name: str, title: str, parent: str | None, when: float, tags: Mapping[str, str]) -> bool:
        """Make the MLflow run ``name`` unless it exists; True when it is new."""
        if name in self.state.runs:
            if name in self.state.ended:  # a resumed run goes on
                self.client.update_run(self.state.runs[name], status="RUNNING")
                self.state.ended.remove(name)
            return False
        experiment = self._experiment()
        every = {"moepipe.run": self.run.id, "moepipe.name": name, "moepipe.scale": self.graph.spec.scale, **tags}
        if self.graph.spec.dataset:
            every["moepipe.dataset"] = self.graph.spec.dataset
        if parent is not None:
            every["mlflow.parentRunId"] = self.state.runs[parent]
        query = f"tags.`moepipe.run` = '{self.run.id}' and tags.`moepipe.name` = '{name}'"
        found = self.client.search_runs([experiment], query, max_results=1)
        made = found[0] if found else self.client.create_run(experiment, int(when * 1000), every, title)
        self.state.runs[name] = made.info.run_id
        self.state.save(self._path)
        return True

    def _pipeline(self, when: float) -> str:
        spec = self.graph.spec
        tags = {
            "moepipe.type": "pipeline",
            "moepipe.pipeline": spec.name,
            "moepipe.seeds": ",".join(map(str, spec.seeds)),
        }
        if self._start("", self.run.id, None, when, tags):
            self._params("", flatten(spec.model_dump(mode="json", exclude={"apiVersion", "tracking"})))
            self.client.log_dict(self.state.runs[""], spec.model_dump(mode="json"), "pipeline.json")
        return ""

    def _stage(self, stage: str, when: float) -> str:
        name = f"stage:{stage}"
        if name in self.state.runs and name not in self.state.ended:
            return name
        parent = self._pipeline(when)
        view = self.graph.stages[stage]
        tags = {"moepipe.type": "stage", "moepipe.stage": stage, "moepipe.kind": view.kind}
        if self._start(name, stage, parent, when, tags):
            self._params(name, flatten(view.config.model_dump(mode="json")))
        return name

    def _member(self, node_id: str, when: float) -> str:
        name = f"node:{node_id}"
        if name in self.state.runs and name not in self.state.ended:
            return name
        node, config = self.graph.nodes[node_id], self.graph.nodes[node_id].config.model_dump(mode="json")
        parent = self._stage(node.stage, when)
        _, seed, member = parse_node(node_id)
        tags = {
            "moepipe.type": "member",
            "moepipe.stage": node.stage,
            "moepipe.kind": node.kind,
            "moepipe.member": member,
            "moepipe.algorithm": str(config.get("algorithm") or node.kind),
        }
        if seed is not None:
            tags["moepipe.seed"] = str(seed)
        if self._start(name, node_id, parent, when, tags):
            own = {} if seed is None else {"seed": str(seed)}
            self._params(name, {**own, **flatten(node.member.params, "member."), **flatten(config)})
        return name

    def _settle(self, event: Event, how: str) -> None:
        """A member is done: pass on what the pipeline's own MLflow run shows, close the stage after its last member."""
        stage = self.graph.nodes[event.node].stage
        if how != "failed":
            self._attach(str(event.data["digest"]), stage, event.time)
        name = f"stage:{stage}"
        if not self._open[stage] and name in self.state.runs:
            self._average(stage, event.time)
            self._end(name, "FAILED" if how == "failed" else "FINISHED", event.time)

    def _average(self, stage: str, when: float) -> None:
        """The stage's numbers: means over its members that ran now."""
        table = [self._last[node] for node in self.graph.stages[stage].nodes if node in self._last]
        for key in sorted({key for row in table for key in row}):
            column = [row[key] for row in table if key in row]
            self._point(f"stage:{stage}", key, float(sum(column)) / len(column), 0, when)

    def _end(self, name: str, status: str, when: float) -> None:
        self._flush()
        self.client.set_terminated(self.state.runs[name], status, int(when * 1000))
        if name not in self.state.ended:
            self.state.ended.append(name)

    # ---- contents --------------------------------------------------------------------------------------------------

    def _collect(self, node: str, values: Mapping[str, Any], step: int, when: float, prefix: str = "") -> None:
        name = self._member(node, when)
        for key, value in values.items():
            self._point(name, key if "/" in key else f"{prefix}{key}", float(value), step, when)

    def _point(self, name: str, key: str, value: float, step: int, when: float) -> None:
        """Queue one point; of more than 60 names the later ones are left out, for MLflow's charts choke on them."""
        from mlflow.entities import Metric

        label, known = clean_key(key), self._names[name]
        if label in known or len(known) < MAX_METRIC_KEYS:
            known.add(label)
            self._metrics[name].append(Metric(label, value, int(when * 1000), step))

    def _flush(self) -> None:
        for name, points in self._metrics.items():
            for start in range(0, len(points), _BATCH):
                self.client.log_batch(self.state.runs[name], metrics=points[start : start + _BATCH])
        self._metrics.clear()

    def _params(self, name: str, values: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        self.client.log_batch(self.state.runs[name], params=[Param(key, value) for key, value in values.items()][:100])

    def _tag(self, name: str, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self.client.log_batch(self.state.runs[name], tags=[RunTag(key, value) for key, value in tags.items()])

    def _attach(self, digest: str, stage: str, when: float) -> None:
        """Reports become files of the pipeline's run, data becomes its dataset input."""
        output = type(self.graph.stages[stage].stage).output
        if output not in (_REPORT_KIND, _DATA_KIND):
            return
        run = self.state.runs[self._pipeline(when)]
        artifact = self.store.artifact(digest)
        if output == _REPORT_KIND:
            self.client.log_artifacts(run, str(self.store.local_path(artifact)), stage)
            return
        from mlflow.entities import Dataset, DatasetInput, InputTag

        name = str(artifact.meta.get("dataset") or self.graph.spec.dataset or stage)
        source = Dataset(name, digest[:36], "moepipe", f"artifact {digest}")
        self.client.log_inputs(run, [DatasetInput(source, [InputTag("mlflow.data.context", stage)])])

    def _earlier(self, key: str) -> str | None:
        """MLflow run of the member that made a hit's artifact, when there is one on this server."""
        if self._keys is None:
            found = self.client.search_runs([self._experiment()], "tags.`moepipe.type` = 'member'", max_results=5000)
            self._keys = {run.data.tags.get("moepipe.key", ""): run.info.run_id for run in reversed(found)}
        return self._keys.get(key) if key else None
