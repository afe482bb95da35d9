"""The run record as nested MLflow runs: which event writes what.

Pipeline, stages and members become runs (tag ``mlflow.parentRunId``), metrics become curves, reports become files of
the pipeline's run, data sets its inputs, and what a ``deploy`` stage names becomes a version in the model registry.
Applying the same events twice writes the same thing once.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from moe.errors import MoepipeError, NotFoundError
from orchestrator.events import Event
from orchestrator.graph import Graph
from orchestrator.registering import data_record, data_rows, register
from orchestrator.runs import Run
from orchestrator.store import Store
from orchestrator.tracking import Writer, connect
from orchestrator.tracking_state import (
    CANDIDATE,
    CHAMPION,
    TrackingState,
    artifact_folder,
    clean_key,
    experiment_name,
    flatten,
    parse_node,
    state_path,
)
from orchestrator.tracking_summary import description, summarise

_REPORT_KIND = "report"
_DATA_KIND = "data"
_DEPLOYMENT_KIND = "deployment"
_SETTLED = ("member-hit", "member-finished", "member-failed")
_STATUS = {"finished": "FINISHED", "interrupted": "KILLED"}


def open_projection(run: Run, graph: Graph, store: Store, state: TrackingState) -> Projection:
    """Connect to the state's server.

    Raises:
        EnvironmentProblem: it does not answer.
    """
    artifacts = artifact_folder(store) if state.uri.startswith("sqlite:") else None
    writer = Writer(connect(state.uri), experiment_name(graph.spec), artifacts)
    state.experiment = writer.experiment
    return Projection(run, graph, store, writer, state)


class Projection:
    """Writes one run's events.

    Args:
        run: the run.
        graph: the expanded pipeline: parameters and tags of the members.
        store: where the report's files are.
        writer: where to.
        state: how far an earlier projection came; kept up to date.
    """

    def __init__(self, run: Run, graph: Graph, store: Store, writer: Writer, state: TrackingState) -> None:
        self.run, self.graph, self.store, self.writer, self.state = run, graph, store, writer, state
        self._path = state_path(store, run.id)
        self._last: dict[str, dict[str, float]] = defaultdict(dict)
        self._open = {name: set(view.nodes) for name, view in graph.stages.items()}
        self._failed: set[str] = set()
        self._keys: dict[str, str] | None = None
        self._prepared: tuple[str, str] | None = None
        named = (getattr(view.config, "dataset", None) for view in graph.stages.values())
        self._dataset = graph.spec.dataset or next((str(name) for name in named if name), "")
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
            self.writer.flush()
            self.state.position = position
            self.state.save(self._path)

    def _remember(self, event: Event) -> None:
        """What later events need to know of earlier ones, also of those written by an earlier process."""
        if event.kind in _SETTLED and event.data.get("decision") != "retry":
            self._open[self.graph.nodes[event.node].stage].discard(event.node)
            if event.kind == "member-failed":
                self._failed.add(event.node)
        elif event.kind == "member-metrics":
            self._last[event.node].update(event.data.get("values") or {})

    # ---- events ----------------------------------------------------------------------------------------------------

    def _on_run_started(self, event: Event) -> None:
        self._pipeline(event.time)

    def _on_member_started(self, event: Event) -> None:
        self._member(event.node, event.time)

    def _on_member_progress(self, event: Event) -> None:
        values = {key if "/" in key else f"train/{key}": value for key, value in event.data["values"].items()}
        self._points(event, values, int(event.data["done"]))

    def _on_member_metrics(self, event: Event) -> None:
        self._points(event, event.data["values"], int(event.data.get("step") or 0))

    def _on_member_hit(self, event: Event) -> None:
        if self._keys is None:
            self._keys = self.writer.members_by_key()
        earlier = self._keys.get(str(event.data.get("key")))
        if earlier:
            self.state.reused[event.node] = earlier
        self._attach(event)
        self._close_stage(event)

    def _on_member_finished(self, event: Event) -> None:
        name = self._member(event.node, event.time)
        tags = {"moepipe.key": event.data.get("key"), "moepipe.artifact": event.data.get("digest")}
        self.writer.tags(self.state.runs[name], {key: str(value) for key, value in tags.items() if value})
        self._attach(event)
        self._end(name, "FINISHED", event.time)
        self._close_stage(event)

    def _on_member_failed(self, event: Event) -> None:
        decision = event.data.get("decision")
        if decision in ("retry", "skip"):
            return
        name = self._member(event.node, event.time)
        self.writer.tags(self.state.runs[name], {"moepipe.error": str(event.data.get("error", ""))})
        self._end(name, "KILLED" if decision == "stop" else "FAILED", event.time)
        self._close_stage(event)

    def _on_run_finished(self, event: Event) -> None:
        self._pipeline(event.time)
        status = _STATUS.get(str(event.data["status"]), "FAILED")
        for name in list(self.state.runs):
            if name and name not in self.state.ended:
                self._end(name, status, event.time)
        tags = {"moepipe.hits": str(event.data.get("hits", 0)), "moepipe.status": str(event.data["status"])}
        self.writer.tags(self.state.runs[""], {**tags, **self._summary(event.time)})
        self._end("", status, event.time)
        self.state.complete = True

    def _summary(self, when: float) -> dict[str, str]:
        """Write the run's selected scores and costs; returns tags with what was held out, and the description."""
        run = self.state.runs[""]
        try:
            summary = summarise(self.run, self.store)
        except MoepipeError as error:
            return {"mlflow.note.content": f"No summary: {error.message}"[:1000]}
        self.writer.values(run, {clean_key(name): value for name, value in summary.metrics.items()}, when)
        text = description(summary, self.run.id, run, self._pages(), self.graph.spec.description)
        return {**summary.tags, "mlflow.note.content": text}

    def _pages(self) -> list[str]:
        """HTML reports among the files of the pipeline's run."""
        found = []
        for node, digest in self.run.artifacts().items():
            stage = parse_node(node)[0]
            with suppress(NotFoundError):
                artifact = self.store.artifact(digest)
                if artifact.kind == _REPORT_KIND:
                    found += [f"{stage}/{name}" for name in artifact.files if name.endswith(".html")]
        return found

    # ---- runs ------------------------------------------------------------------------------------------------------

    def _pipeline(self, when: float) -> str:
        spec = self.graph.spec
        seeds = ",".join(map(str, spec.seeds))
        tags = {"moepipe.type": "pipeline", "moepipe.pipeline": spec.name, "moepipe.seeds": seeds}
        with suppress(OSError, ValueError):
            commit = json.loads((self.run.path / "environment.json").read_bytes()).get("commit")
            tags |= {"mlflow.source.git.commit": str(commit)} if commit else {}
        if self._start("", self.run.id, None, when, tags):
            document = spec.model_dump(mode="json")
            hidden = ("apiVersion", "tracking")
            self._params("", flatten({key: value for key, value in document.items() if key not in hidden}))
            self.writer.document(self.state.runs[""], "pipeline.json", document)
        return ""

    def _stage(self, stage: str, when: float) -> str:
        view, name = self.graph.stages[stage], f"stage:{stage}"
        tags = {"moepipe.type": "stage", "moepipe.stage": stage, "moepipe.kind": view.kind}
        if self._start(name, stage, self._pipeline(when), when, tags):
            self._params(name, flatten(view.config.model_dump(mode="json")))
        return name

    def _member(self, node_id: str, when: float) -> str:
        name = f"node:{node_id}"
        if name in self.state.runs and name not in self.state.ended:
            return name
        node = self.graph.nodes[node_id]
        config = node.config.model_dump(mode="json")
        _, seed, member = parse_node(node_id)
        tags = {
            "moepipe.type": "member",
            "moepipe.stage": node.stage,
            "moepipe.kind": node.kind,
            "moepipe.member": member,
            "moepipe.algorithm": _algorithm(config, node.kind),
            **({} if seed is None else {"moepipe.seed": str(seed)}),
        }
        if self._start(name, node_id, self._stage(node.stage, when), when, tags):
            own = {} if seed is None else {"seed": str(seed)}
            self._member_data(name, config)
            self._params(name, {**own, **flatten(node.member.params, "member."), **flatten(config)})
        return name

    def _start(self, name: str, title: str, parent: str | None, when: float, tags: Mapping[str, str]) -> bool:
        """Make the MLflow run ``name`` unless it exists, open it again when it was closed; True when it is new."""
        if name in self.state.runs:
            if name in self.state.ended:
                self.writer.reopen(self.state.runs[name])
                self.state.ended.remove(name)
            return False
        every = {"moepipe.run": self.run.id, "moepipe.name": name, "moepipe.scale": self.graph.spec.scale, **tags}
        if self._dataset:
            every["moepipe.dataset"] = self._dataset
        if parent is not None:
            every["mlflow.parentRunId"] = self.state.runs[parent]
        self.state.runs[name], new = self.writer.run(title, when, every)
        self.state.save(self._path)
        return new

    def _end(self, name: str, status: str, when: float) -> None:
        self.writer.flush()
        self.writer.end(self.state.runs[name], status, when)
        if name not in self.state.ended:
            self.state.ended.append(name)

    def _close_stage(self, event: Event) -> None:
        """After its last member: means over the members that ran, and the end."""
        stage = self.graph.nodes[event.node].stage
        name = f"stage:{stage}"
        if self._open[stage] or name not in self.state.runs:
            return
        rows = [self._last[node] for node in self.graph.stages[stage].nodes if node in self._last]
        for key in sorted({key for row in rows for key in row}):
            column = [row[key] for row in rows if key in row]
            self.writer.point(self.state.runs[name], key, float(sum(column)) / len(column), 0, event.time)
        failed = self._failed & set(self.graph.stages[stage].nodes)
        self._end(name, "FAILED" if failed else "FINISHED", event.time)

    # ---- contents --------------------------------------------------------------------------------------------------

    def _params(self, name: str, values: Mapping[str, str]) -> None:
        self.writer.params(self.state.runs[name], values)

    def _points(self, event: Event, values: Mapping[str, Any], step: int) -> None:
        run = self.state.runs[self._member(event.node, event.time)]
        for key, value in values.items():
            self.writer.point(run, key, float(value), step, event.time)

    def _attach(self, event: Event) -> None:
        """Reports become files of the pipeline's run, data its dataset input, deployments versions in the registry."""
        stage, digest = self.graph.nodes[event.node].stage, str(event.data["digest"])
        output = type(self.graph.stages[stage].stage).output
        if output not in (_REPORT_KIND, _DATA_KIND, _DEPLOYMENT_KIND):
            return
        run = self.state.runs[self._pipeline(event.time)]
        artifact = self.store.artifact(digest)
        if output == _DEPLOYMENT_KIND:
            self._register(event, run, artifact.meta)
        elif output == _REPORT_KIND:
            self.writer.files(run, self.store.local_path(artifact), stage)
        else:
            self._prepared = data_record(artifact, self._dataset or stage)
            self.writer.dataset(run, *self._prepared, stage, data_rows(artifact))

    def _member_data(self, name: str, config: Mapping[str, Any]) -> None:
        """The prepared data as an input of a member that says which splits it reads."""
        splits = config.get("splits") or config.get("split")
        if self._prepared is not None and splits:
            context = splits if isinstance(splits, str) else ",".join(map(str, splits))
            self.writer.dataset(self.state.runs[name], *self._prepared, context)

    def _register(self, event: Event, run: str, meta: Mapping[str, Any]) -> None:
        """A version for the model that is deployed, if it wants a name; the alias is for the pipeline's first seed.

        Where the pipeline declares a gate, only ``moepipe promote`` makes a champion.
        """
        wanted = meta.get("registry")
        if wanted is None:
            return
        _, seed, _ = parse_node(event.node)
        tags = {"moepipe.run": self.run.id, "moepipe.node": event.node, "moepipe.dataset": str(meta["dataset"])}
        version = register(self.writer, self.store, str(wanted["name"]), str(meta["model"]), run, event.time, tags)
        gated = self.graph.spec.promotion is not None and wanted["alias"] == CHAMPION
        if seed in (None, self.graph.spec.seeds[0]):
            self.writer.point_alias(wanted["name"], CANDIDATE if gated else wanted["alias"], version)


def _algorithm(config: Mapping[str, Any], kind: str) -> str:
    """Name of the algorithm in a member's config, or its stage's kind."""
    named = config.get("algorithm")
    if isinstance(named, Mapping):
        named = named.get("name")
    return str(named or kind)
