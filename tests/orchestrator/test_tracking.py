"""The projection of the run record to MLflow: complete, repeatable, and never in the way of a run."""

from __future__ import annotations

import shutil
import time

import pytest

from moe.errors import BusyError, EnvironmentProblem
from orchestrator.cli_ui import links, save_views
from orchestrator.graph import build_graph
from orchestrator.mirror import Mirror, sync
from orchestrator.stages.base import STAGES
from orchestrator.store import Store
from orchestrator.tracking import connect
from orchestrator.tracking_state import (
    MAX_PARAMS,
    TrackingState,
    clean_key,
    flatten,
    parse_node,
    state_path,
    tracking_uri,
)
from tests.support.pipelines import go, pipeline

STAGES.add("toydata", "tests.orchestrator.toy_data")
DEAD = "http://127.0.0.1:9"
STAGES_OF = {
    "data": {"kind": "toydata"},
    "numbers": {"kind": "numbers", "config": {"count": 2, "seeded": True}},
    "slow": {"kind": "sleepy", "inputs": {"start": "${stages.numbers}"}, "config": {"steps": 4}},
    "report": {"kind": "gather", "inputs": {"numbers": "${stages.slow}"}},
}
SPEC = pipeline(STAGES_OF, seeds=(0, 1))


@pytest.fixture(scope="session")
def migrated(tmp_path_factory):
    """An empty MLflow database; making one takes seconds, so it is made once and copied."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    connect(f"sqlite:///{path}")
    return path


@pytest.fixture
def tracked(tmp_path, migrated, monkeypatch):
    """A store with a database of its own."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = Store.open(tmp_path / "store")
    shutil.copy(migrated, store.folder / "mlflow.db")
    return store


def runs_in(store, **tags):
    """MLflow runs of a store with these tags, as (name, run)."""
    client = connect(tracking_uri(None, store))
    experiments = [item.experiment_id for item in client.search_experiments()]
    query = " and ".join(f"tags.`moepipe.{key}` = '{value}'" for key, value in tags.items())
    return {run.info.run_name: run for run in client.search_runs(experiments, query, max_results=1000)}


def test_pipeline_stages_and_members_are_nested(tracked):
    _, run = go(SPEC, tracked)
    state = sync(run, tracked, tracking_uri(SPEC, tracked))
    assert state.complete and not state.error
    pipelines, stages = runs_in(tracked, type="pipeline"), runs_in(tracked, type="stage")
    members = runs_in(tracked, type="member")
    assert [len(group) for group in (pipelines, stages, members)] == [1, 4, 8]
    found = [*pipelines.values(), *stages.values(), *members.values()]
    assert {item.info.status for item in found} == {"FINISHED"}
    assert {item.info.run_id for item in found} == set(state.runs.values())
    (top,) = pipelines.values()
    assert all(item.data.tags["mlflow.parentRunId"] == top.info.run_id for item in stages.values())
    parents = {item.data.tags["mlflow.parentRunId"] for name, item in members.items() if name.startswith("numbers/")}
    assert parents == {stages["numbers"].info.run_id}


def test_members_carry_tags_parameters_and_curves(tracked):
    _, run = go(SPEC, tracked)
    state = sync(run, tracked, tracking_uri(SPEC, tracked))
    member = runs_in(tracked, type="member")["slow/seed=1"]
    tags = {key.removeprefix("moepipe."): value for key, value in member.data.tags.items() if "moepipe." in key}
    key = next(event.data["key"] for event in run.events() if event.node == "slow/seed=1" and "key" in event.data)
    assert tags["run"] == run.id and tags["stage"] == "slow" and tags["seed"] == "1" and tags["key"] == key
    assert tags["kind"] == "sleepy" and tags["scale"] == "dev" and len(tags["artifact"]) == 64
    assert member.data.params["steps"] == "4" and member.data.params["seed"] == "1"
    assert member.data.metrics["toy/steps"] == 4.0
    client = connect(state.uri)
    history = client.get_metric_history(member.info.run_id, "train/loss")
    assert history and history[-1].value == pytest.approx(0.25) and history[-1].step == 4
    stage = runs_in(tracked, type="stage")["numbers"]
    values = [item.data.metrics["toy/value"] for item in runs_in(tracked, stage="numbers", type="member").values()]
    assert len(values) == 4 and stage.data.metrics["toy/value"] == pytest.approx(sum(values) / 4)


def test_report_files_spec_and_data_hang_on_the_pipeline_run(tracked):
    _, run = go(SPEC, tracked)
    state = sync(run, tracked, tracking_uri(SPEC, tracked))
    client, top = connect(state.uri), state.runs[""]
    assert {item.path for item in client.list_artifacts(top)} == {"pipeline.json", "report"}
    assert "report/table.json" in {item.path for item in client.list_artifacts(top, "report")}
    assert (tracked.folder / "mlflow").is_dir()
    (data,) = client.get_run(top).inputs.dataset_inputs
    assert data.dataset.name == "toy"


def test_the_page_opens_with_a_saved_view_of_the_last_runs(tracked):
    _, run = go(SPEC, tracked)
    uri = tracking_uri(SPEC, tracked)
    state = sync(run, tracked, uri)
    assert "table of the last runs" not in {link.title for link in links(tracked, "http://h", uri)}
    save_views(tracked, uri)
    found = {link.title: link.url for link in links(tracked, "http://h", uri)}
    key = found["charts of the last runs"].partition("viewStateShareKey=")[2].partition("&")[0]
    tags = connect(uri).get_experiment(state.experiment).tags
    assert tags[f"mlflow.sharedViewState.{key}"].startswith("deflate;")
    assert links(tracked, "http://h", "sqlite:///elsewhere.db") == []


def test_writing_twice_changes_nothing(tracked):
    _, run = go(SPEC, tracked)
    uri = tracking_uri(SPEC, tracked)
    state = sync(run, tracked, uri)
    client = connect(uri)

    def picture():
        found = runs_in(tracked)
        curve = client.get_metric_history(found["slow/seed=0"].info.run_id, "train/loss")
        return {name: (item.info.run_id, item.data.params, item.data.metrics) for name, item in found.items()}, curve

    before = picture()
    assert sync(run, tracked, uri).runs == state.runs
    state_path(tracked, run.id).unlink()  # as after a crash that lost the state: everything is projected again
    assert sync(run, tracked, uri).runs == state.runs
    after = picture()
    assert before[0] == after[0]
    assert [(point.step, point.value) for point in before[1]] == [(point.step, point.value) for point in after[1]]


def test_a_projection_that_stopped_midway_is_completed(tracked):
    _, run = go(SPEC, tracked)
    uri = tracking_uri(SPEC, tracked)
    positions = [after for _, after in run.follow()]
    whole = run.path / "events.jsonl"
    text = whole.read_bytes()
    whole.write_bytes(text[: positions[len(positions) // 2]])
    halfway = sync(run, tracked, uri)
    assert not halfway.complete and halfway.position == positions[len(positions) // 2]
    whole.write_bytes(text)
    assert sync(run, tracked, uri).complete
    assert len(runs_in(tracked, type="member")) == 8
    assert {item.info.status for item in runs_in(tracked).values()} == {"FINISHED"}
    values = [item.data.metrics["toy/value"] for item in runs_in(tracked, stage="numbers", type="member").values()]
    assert runs_in(tracked, type="stage")["numbers"].data.metrics["toy/value"] == pytest.approx(sum(values) / 4)


def test_hits_make_no_new_members_but_point_to_the_earlier_ones(tracked):
    _, first = go(SPEC, tracked)
    before = sync(first, tracked, tracking_uri(SPEC, tracked))
    _, second = go(SPEC, tracked)
    state = sync(second, tracked, tracking_uri(SPEC, tracked))
    assert set(state.runs) == {""}
    assert len(runs_in(tracked, type="member")) == 8
    assert state.reused == {name[5:]: run for name, run in before.runs.items() if name.startswith("node:")}
    assert runs_in(tracked, run=second.id)[second.id].data.tags["moepipe.hits"] == "8"


def test_failed_members_are_failed_runs(tracked):
    stages = {
        "numbers": {"kind": "numbers", "config": {"count": 2, "fail_times": 9, "fail_member": 1}},
        "total": {"kind": "sum", "inputs": {"numbers": "${stages.numbers}"}},
    }
    spec = pipeline(stages)
    outcome, run = go(spec, tracked)
    sync(run, tracked, tracking_uri(spec, tracked))
    assert outcome.status == "failed"
    found = runs_in(tracked)
    states = {name: item.info.status for name, item in found.items()}
    assert states["numbers/seed=0/item=0"] == "FINISHED" and states["numbers/seed=0/item=1"] == "FAILED"
    assert states[run.id] == states["numbers"] == "FAILED" and "total/seed=0" not in states
    assert "on purpose" in found["numbers/seed=0/item=1"].data.tags["moepipe.error"]


def test_a_dead_server_is_a_clear_error_for_sync(tracked):
    _, run = go(SPEC, tracked)
    begin = time.monotonic()
    with pytest.raises(EnvironmentProblem, match="does not answer"):
        sync(run, tracked, DEAD)
    assert time.monotonic() - begin < 60  # MLflow's own retries take minutes


def test_two_writers_of_one_run_do_not_meet(tracked):
    from filelock import FileLock

    _, run = go(SPEC, tracked)
    path = state_path(tracked, run.id)
    path.parent.mkdir(exist_ok=True)
    with FileLock(f"{path}.lock"), pytest.raises(BusyError):
        sync(run, tracked, tracking_uri(SPEC, tracked))


@pytest.mark.timeout(600)  # the process is a patient one: on a busy machine it gets a tenth of a core
def test_the_process_beside_a_run_writes_all_of_it(tracked):
    _, run = go(SPEC, tracked)
    mirror = Mirror(run, tracked, tracking_uri(SPEC, tracked))
    mirror.start()
    state = mirror.wait(500)
    assert state.complete and not mirror.problem()
    assert len(state.runs) == 13


def test_the_process_reports_a_dead_server_once(tracked):
    _, run = go(SPEC, tracked)
    mirror = Mirror(run, tracked, DEAD)
    mirror.start()
    assert "does not answer" in mirror.wait(240).error
    assert f"moepipe track sync {run.id}" in mirror.problem()
    assert mirror.problem() == ""
    mirror._process.wait(240)  # it tries once more, and nobody else may write meanwhile
    state = sync(run, tracked, tracking_uri(SPEC, tracked))
    assert state.complete and len(runs_in(tracked, type="member")) == 8


def test_where_runs_are_written(tracked, monkeypatch):
    assert tracking_uri(SPEC, tracked) == f"sqlite:///{tracked.folder}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere:1")
    assert tracking_uri(SPEC, tracked) == "http://elsewhere:1"
    own = SPEC.model_copy(update={"tracking": SPEC.tracking.model_copy(update={"uri": "http://mine:2"})})
    assert tracking_uri(own, tracked) == "http://mine:2"


def test_state_of_another_server_is_not_used(tmp_path):
    path = tmp_path / "tracking" / "r.json"
    path.parent.mkdir()
    TrackingState(uri="a", position=7, runs={"": "x"}).save(path)
    assert TrackingState.load(path, "a").position == 7
    assert TrackingState.load(path, "b") == TrackingState(uri="b")
    path.write_text("{torn")
    assert TrackingState.load(path, "a") == TrackingState(uri="a")


def test_flatten_keeps_mlflow_limits():
    assert flatten({"a": {"b": 1, "c": [1, 2]}, "d": None, "e": "x"}) == {"a.b": "1", "a.c": "[1, 2]", "e": "x"}
    assert len(flatten({str(i): i for i in range(500)})) == MAX_PARAMS
    assert len(flatten({"long": "x" * 10_000})["long"]) == 6000
    assert clean_key("acc/dömäin=3 (a)") == "acc/d_m_in_3 _a_"
    assert len(clean_key("k" * 999)) == 250


@pytest.mark.parametrize(
    ("node", "parts"),
    [
        ("report", ("report", None, "")),
        ("slow/seed=3", ("slow", 3, "")),
        ("experts/seed=0/group=2", ("experts", 0, "group=2")),
        ("stage/item=1", ("stage", None, "item=1")),
    ],
)
def test_node_ids_are_understood(node, parts):
    assert parse_node(node) == parts
    graph = build_graph(SPEC)
    assert all(parse_node(name)[0] == item.stage for name, item in graph.nodes.items())
