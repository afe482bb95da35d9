"""The promotion gate: conditions, refusals with what was seen, and what happens in the registry."""

from __future__ import annotations

import shutil

import pytest

from moe.errors import SpecError
from orchestrator.promote import check
from orchestrator.runs import RunStore
from orchestrator.spec import PipelineSpec, PromotionSpec
from orchestrator.tracking import connect
from orchestrator.tracking_state import TrackingState, state_path
from tests.orchestrator.cli_support import call, document, folder  # noqa: F401
from tests.orchestrator.compare_store import STAGES, Runs, put

GOOD = {"erm": (60, 50), "student": (60, 52), "student_distill": (90, 80)}


@pytest.fixture(scope="session")
def migrated(tmp_path_factory):
    """An empty MLflow database; making one takes seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    connect(f"sqlite:///{path}")
    return path


@pytest.fixture
def runs(store, migrated, monkeypatch):
    monkeypatch.setenv("MOEPIPE_STORE", str(store.folder))
    shutil.copy(migrated, store.folder / "mlflow.db")
    return Runs(store)


def gate(*conditions, **more):
    return {"promotion": {"model": "digits", "stage": "distill", "conditions": list(conditions), **more}}


def tracked(runs, name):
    """The run as one that was written to MLflow."""
    uri = f"sqlite:///{runs.store.folder}/mlflow.db"
    client = connect(uri)
    known = client.get_experiment_by_name("toy")
    experiment = known.experiment_id if known else client.create_experiment("toy")
    made = client.create_run(experiment, tags={"moepipe.run": name, "moepipe.name": ""})
    TrackingState(uri=uri, experiment=experiment, runs={"": made.info.run_id}).save(state_path(runs.store, name))
    return name


def checked(runs, name, *conditions, champion=None):
    place = RunStore(runs.store)
    spec = PromotionSpec.model_validate(gate(*conditions)["promotion"])
    return check(place.open(name), runs.store, spec, place.open(champion) if champion else None)


@pytest.mark.parametrize(
    ("condition", "met", "seen"),
    [
        ({"at_least": 0.85}, True, "0.85"),
        ({"at_least": 0.86}, False, "0.85"),
        ({"metric": "worst", "at_most": 0.5}, False, "0.8"),
        ({"metric": "left", "at_least": 0.9}, True, "0.9"),
        ({"metric": "macro_f1", "at_least": 0.75}, True, "0.75"),
        ({"metric": "seeds", "at_least": 3}, True, "3"),
        ({"metric": "device_hours", "at_most": 3.5}, True, "3"),
        ({"metric": "latency_ms", "at_most": 2}, False, "2.5"),
        ({"metric": "flops", "at_most": 2e9}, False, "not recorded"),
        ({"metric": "nonsense", "at_least": 0}, False, "not recorded"),
        ({"baseline": "erm", "margin": 0.2, "significant": True}, True, "+0.3 against erm (0.55), p = "),
        ({"baseline": "erm", "margin": 0.31}, False, "+0.3 against erm"),
        ({"baseline": "ghost"}, False, "ghost"),
        ({"method": "student", "baseline": "erm", "significant": True}, False, "+0.01 against erm"),
    ],
)
def test_conditions(runs, condition, met, seen):
    name = runs.run(GOOD)
    (found,) = checked(runs, name, {"method": "student_distill", **condition})
    assert found.met is met and seen in found.seen


def test_the_champion_is_a_baseline(runs):
    old = runs.run(GOOD)
    worse = runs.run({**GOOD, "student_distill": (70, 60)})
    better = runs.run({**GOOD, "student_distill": (95, 95)})
    condition = {"method": "student_distill", "baseline": "champion"}
    assert checked(runs, old, condition)[0].seen.endswith("no champion yet")
    assert checked(runs, old, condition, champion=old)[0].met
    assert not checked(runs, worse, condition, champion=old)[0].met
    assert checked(runs, better, {**condition, "significant": True}, champion=old)[0].met


@pytest.mark.parametrize(
    "condition",
    [
        {},
        {"at_least": 0, "significant": True},
        {"baseline": "x", "metric": "worst", "significant": True},
        {"at_least": 0, "margin": 0.1},
        {"metric": "latency_ms", "baseline": "champion"},
    ],
)
def test_a_condition_that_says_nothing_is_refused(condition):
    with pytest.raises(ValueError, match=r"condition needs|significant needs|margin needs|lead means a higher"):
        PromotionSpec.model_validate(gate({"method": "erm", **condition})["promotion"])


def test_a_pipeline_with_a_gate_is_a_pipeline():
    spec = PipelineSpec(apiVersion="moepipe/v1", name="x", stages=STAGES, **gate({"method": "erm", "at_least": 0.5}))
    assert PipelineSpec.model_validate_json(spec.canonical()).promotion.conditions[0].at_least == 0.5


def test_promote_moves_the_alias_and_says_why(runs):
    spec = gate({"method": "student_distill", "at_least": 0.5}, {"method": "student_distill", "baseline": "champion"})
    first = tracked(runs, runs.run(GOOD, spec=spec))
    assert document("promote", first, "--dry-run")["version"] is None
    client = connect(f"sqlite:///{runs.store.folder}/mlflow.db")
    assert client.search_registered_models() == []
    done = document("promote", first)
    assert (done["model"], done["version"], done["previous"], done["promoted"]) == ("digits", "1", None, True)
    version = client.get_model_version_by_alias("digits", "champion")
    assert version.tags["moepipe.run"] == first and '"met": true' in version.tags["moepipe.gate"]
    assert version.tags["moepipe.artifact"] == RunStore(runs.store).open(first).artifacts()["distill/seed=0"]

    worse = tracked(runs, runs.run({**GOOD, "student_distill": (70, 60)}, spec=spec))
    error = document("promote", worse, code=8)["error"]
    assert error["code"] == "gate" and "not below champion (seen: 0.65, -0.2 against champion" in error["message"]
    assert client.get_model_version_by_alias("digits", "champion").version == version.version

    model = put(runs.store, "model", {"other": True}, {})
    files = {"distill/seed=0": model}
    better = tracked(runs, runs.run({**GOOD, "student_distill": (99, 99)}, spec=spec, artifacts=files))
    text = call("promote", better).stdout
    assert "digits@champion is version 2 now, before: version 1." in text and "ok" in text
    assert document("promote", worse, "--to", "candidate")["alias"] == "candidate"  # not gated


def test_what_cannot_be_promoted_is_told(runs, tmp_path):
    plain = runs.run(GOOD)
    assert "declares no gate" in call("promote", plain, code=2).stderr
    assert "--gate gate.yaml" in call("promote", plain, code=2).stderr
    call("promote", plain, "--gate", tmp_path / "none.yaml", code=4)
    file = tmp_path / "gate.yaml"
    file.write_text("promotion: {conditions: [{method: erm, at_leats: 1}]}")
    assert "at_leats" in call("promote", plain, "--gate", file, code=2).stderr
    file.write_text("promotion: {conditions: [{method: erm, at_least: 0.1}]}")
    assert "does not say which model" in call("promote", plain, "--gate", file, code=2).stderr
    file.write_text("{stage: dist, model: x, conditions: [{method: erm, at_least: 0.1}]}")
    assert "Did you mean 'distill'" in call("promote", plain, "--gate", file, code=4).stderr
    file.write_text("a: [")
    call("promote", plain, "--gate", file, code=2)
    failed = runs.run(GOOD, status="failed", spec=gate({"method": "erm", "at_least": 0.1}))
    assert "is failed" in call("promote", failed, code=1).stderr


def test_the_gate_of_a_file_counts(runs, tmp_path):
    name = runs.run(GOOD)
    (tmp_path / "gate.yaml").write_text("{model: m, stage: erm, conditions: [{method: erm, at_least: 0.9}]}")
    assert (
        "avg of erm: at least 0.9 (seen: 0.55)"
        in call("promote", name, "--gate", tmp_path / "gate.yaml", code=8).stderr
    )


def test_a_gate_of_nothing_is_refused():
    with pytest.raises((SpecError, ValueError)):
        PromotionSpec.model_validate({"conditions": []})
