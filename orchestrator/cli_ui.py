"""``moepipe ui``: links to the comparisons that people look for, and the server that shows them."""

from __future__ import annotations

import json
import os
import signal
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from moe.errors import MoepipeError
from orchestrator import console
from orchestrator.blobs import write_atomic
from orchestrator.graph import build_graph
from orchestrator.runs import Run, RunStore
from orchestrator.store import Store
from orchestrator.tracking_state import TrackingState, artifact_folder, parse_node, state_path, tracking_uri
from orchestrator.ui import Server, comparison_link, curves_link, is_server, run_link
from orchestrator.ui_views import view_link

_RUNS_LOOKED_AT = 20
_LINKS_PER_RUN = 4
_COMPARED_RUNS = 5
# Kinds of artifacts whose makers people compare across seeds, best first.
_WORTH = ("metrics", "student", "aggregator", "model")


@dataclass(frozen=True)
class Link:
    """A page and what is on it."""

    title: str
    url: str


def links(store: Store, base: str, uri: str) -> list[Link]:
    """Links for the newest run tracked at ``uri``.

    Itself, the saved view, its seeds side by side by stage, earlier runs beside it, all curves.
    """
    tracked = [(run, TrackingState.load(state_path(store, run.id))) for run in RunStore(store).list()[:_RUNS_LOOKED_AT]]
    tracked = [(run, state) for run, state in tracked if state.runs.get("") and state.uri == uri]
    if not tracked:
        return []
    newest, state = tracked[0]
    found = [Link(f"run {newest.id}", run_link(base, state.experiment, state.runs[""]))]
    found += _views(store, state, base)
    found += _seeds(newest, state, base)
    same = [other.runs[""] for _, other in tracked if other.experiment == state.experiment]
    if len(same) > 1:
        title = f"the last {len(same[:_COMPARED_RUNS])} runs of this pipeline"
        found.append(Link(title, comparison_link(base, state.experiment, same[:_COMPARED_RUNS])))
    return [*found, Link("curves of all runs", curves_link(base, state.experiment))]


def _views(store: Store, state: TrackingState, base: str) -> list[Link]:
    """The saved view of the last runs, when there is one: charts, and the table."""
    key = _saved(store).get(f"{state.uri} {state.experiment}")
    if not key:
        return []
    return [
        Link("charts of the last runs", view_link(base, state.experiment, key, charts=True)),
        Link("table of the last runs", view_link(base, state.experiment, key, charts=False)),
    ]


def _saved(store: Store) -> dict[str, str]:
    with suppress(OSError, ValueError):
        found: dict[str, str] = json.loads(_views_path(store).read_bytes())
        return found
    return {}


def _views_path(store: Store) -> Path:
    return store.folder / "tracking" / "views.json"


def save_views(store: Store, uri: str) -> None:
    """Keep a view of the newest tracked run's experiment in MLflow; a server that refuses costs the view only."""
    from orchestrator.tracking import connect, save_view

    states = (TrackingState.load(state_path(store, run.id)) for run in RunStore(store).list()[:_RUNS_LOOKED_AT])
    state = next((state for state in states if state.runs.get("") and state.uri == uri), None)
    if state is None:
        return
    try:
        key = save_view(connect(uri), state.experiment)
    except MoepipeError as error:
        console.note(f"No saved view: {error.message}")
        return
    if key:
        saved = {**_saved(store), f"{uri} {state.experiment}": key}
        write_atomic(_views_path(store), json.dumps(saved, indent=1).encode())


def _seeds(run: Run, state: TrackingState, base: str) -> list[Link]:
    """One comparison for each member that exists for several seeds, the most telling stages first."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for node, mlflow_run in {**state.reused, **_members(state)}.items():
        stage, seed, member = parse_node(node)
        if seed is not None:
            groups[stage, member].append(mlflow_run)
    outputs = {}
    with suppress(MoepipeError):
        outputs = {name: type(view.stage).output for name, view in build_graph(run.spec()).stages.items()}

    def rank(item: tuple[tuple[str, str], list[str]]) -> tuple[int, str, str]:
        (stage, member), _ = item
        output = outputs.get(stage, "")
        return (_WORTH.index(output) if output in _WORTH else len(_WORTH), stage, member)

    several = sorted(((key, runs) for key, runs in groups.items() if len(runs) > 1), key=rank)
    return [
        Link(f"{len(runs)} seeds of {'/'.join(filter(None, key))}", comparison_link(base, state.experiment, runs))
        for key, runs in several[:_LINKS_PER_RUN]
    ]


def _members(state: TrackingState) -> dict[str, str]:
    return {name.removeprefix("node:"): value for name, value in state.runs.items() if name.startswith("node:")}


def serve(store: Store, port: int, start: bool, as_json: bool) -> None:
    """Print the links; with ``start`` run the server until Ctrl-C, unless MLflow is a server of its own.

    ``start`` also saves a view of the last runs in MLflow.
    """
    uri = tracking_uri(None, store)
    base = uri.rstrip("/") if is_server(uri) else f"http://127.0.0.1:{port}"
    if start:
        save_views(store, uri)
    if is_server(uri) or not start:
        _print(store, base, uri, as_json)
        return
    log = store.folder / "tracking" / "server.log"
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with Server(uri, port, artifact_folder(store), log) as server:
            console.note(f"Starting MLflow on {server.base} (first start on a new database: half a minute) ...")
            server.wait_until_ready()
            _print(store, base, uri, as_json)
            console.note("Ctrl-C ends it.")
            with suppress(KeyboardInterrupt):
                server.wait()
    finally:
        signal.signal(signal.SIGTERM, previous)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _elsewhere(store: Store, uri: str) -> list[str]:
    """Other addresses to which the last runs were written (``tracking.uri`` of their pipelines)."""
    states = [TrackingState.load(state_path(store, run.id)) for run in RunStore(store).list()[:_RUNS_LOOKED_AT]]
    return list(dict.fromkeys(state.uri for state in states if state.runs.get("") and state.uri != uri))


def _print(store: Store, base: str, uri: str, as_json: bool) -> None:
    found = links(store, base, uri)
    if as_json:
        console.emit_json({"base": base, "uri": uri, "pid": os.getpid(), "links": [vars(link) for link in found]})
        return
    elsewhere = [] if found else _elsewhere(store, uri)
    if elsewhere:
        console.say(base, f"The last runs of this store are tracked at {', '.join(elsewhere)}, not here.")
        console.say(f"To look there: MLFLOW_TRACKING_URI={elsewhere[0]} moepipe ui")
    elif not found:
        console.say(base, "Nothing is tracked yet: submit a pipeline, or moepipe track sync RUN.")
    for link in found:
        console.say(f"{link.title}:", f"  {link.url}")
