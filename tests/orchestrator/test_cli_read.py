"""Commands that read, and those about data sets and pipelines, through typer's runner."""

# ruff: noqa: F811 - fixtures are imported and then named as parameters

from __future__ import annotations

import json
from pathlib import Path

from orchestrator.tracking_state import TrackingState
from tests.orchestrator.cli_support import INLINE, call, document, done, folder  # noqa: F401


def test_runs_show_and_status(done):
    (run,) = document("runs")["runs"]
    assert run["run"] == done["run"] and run["status"] == "finished"
    status = document("status", done["run"])
    assert [stage["stage"] for stage in status["stages"]] == ["numbers", "slow", "report"]
    assert all(stage["state"] == "finished" and stage["fraction"] == 1.0 for stage in status["stages"])
    shown = document("show", done["run"][:-1])  # a unique beginning is enough
    assert shown["reports"][0]["node"] == "report" and shown["options"]["on"] == "inline"
    for command in ("runs", "show", "status"):
        assert done["run"] in call(command).stdout


def test_a_record_that_another_version_wrote_spoils_no_list(done, folder):
    (spec,) = Path(".moepipe").glob("runs/*/spec.json")
    record = json.loads(spec.read_text())
    spec.write_text(json.dumps({**record, "seeds": "three"}))
    (run,) = document("runs")["runs"]
    assert run["pipeline"] == record["name"] and run["status"] == "finished"
    assert "written by another version" in call("show", code=2).stderr
    assert call("gc").exit_code == 0


def test_show_of_a_member(done):
    (member,) = document("show", "latest", "slow/seed=1")["members"]
    assert member["metrics"] == {"toy/steps": 4.0} and member["artifact"]["files"] == {"value.json": 30}
    assert (Path(member["artifact"]["path"]) / "value.json").exists()
    assert len(document("show", "latest", "numbers")["members"]) == 4
    assert len(document("show", "latest", "numbers/seed=0")["members"]) == 2
    assert member["key"] in call("show", "latest", "slow/seed=1").stdout
    assert "Did you mean 'slow/seed=1'?" in call("show", "latest", "slow/seed=11", code=4).stderr


def test_verify_finds_changed_bytes(done):
    assert "5 artifacts verified" in call("show", "--verify").stderr  # two pairs of members made the same bytes
    file = Path(document("show", "latest", "report")["members"][0]["artifact"]["path"]) / "value.json"
    file.write_bytes(file.read_bytes().replace(b"value", b"vague"))
    assert "file value.json has other bytes" in call("show", "latest", "report", "--verify", code=6).stderr
    assert "has other bytes" in call("show", "latest", "report", "--why", "--verify", code=6).stderr


def test_logs_of_a_run_filter(done):
    text = call("logs").stdout
    assert "report: started, attempt 1" in text and text.splitlines()[-1].endswith("finished, 0 hits")
    lines = document("logs", "latest", "--grep", r"slow/seed=\d: finished")["lines"]
    assert len(lines) == 2
    assert document("logs", "latest", "--since", "1d")["lines"] and call("logs", "--follow").stdout
    assert "is not a duration" in call("logs", "latest", "--since", "soon", code=2).stderr
    assert "not a regular expression" in call("logs", "latest", "--grep", "(", code=2).stderr


def test_ls_lists_the_registries(folder):
    found = document("ls")
    assert {"numbers", "gather"} <= {entry["name"] for entry in found["stages"]}
    assert {"camelyon17", "rotated14"} <= {entry["name"] for entry in found["datasets"]}
    assert all(entry["title"] for entry in found["datasets"])
    assert "rotated14" in call("ls", "datasets").stdout


def test_explain_and_schema(folder):
    assert document("explain", "retry.infrastructure")["fields"][0]["default"] == "default 3"
    assert "steps" in call("explain", "stages.sleepy").stdout
    assert json.loads(call("schema").stdout)["title"] == "moepipe pipeline"
    call("schema", "-o", "schema.json")
    assert json.loads((folder / "schema.json").read_text())["$schema"]


def test_data_commands(folder):
    listed = {item["name"]: item for item in document("data", "ls")["datasets"]}
    assert listed["camelyon17"]["present"] is False and "moepipe data" in listed["camelyon17"]["missing"][0]["fix"]
    assert "camelyon17" in call("data", "ls").stdout
    document("data", "miniature", "rotated_mnist", "--data", "sets")
    found = document(
        "data",
        "verify",
        "rotated_mnist",
        "--data",
        "sets",
        "--option",
        "source=miniature",
        "--option",
        "per_environment=300",
    )
    assert "image of row" not in " ".join(found["checks"]) and found["checks"][-1].startswith("64 of ")
    assert found["rows"] > 0 and set(found["splits"]) >= {"train", "val", "test"} and len(found["digest"]) == 64
    assert "KEY=VALUE" in call("data", "verify", "digits5", "--option", "x", code=2).stderr
    assert "has no miniature" in call("data", "miniature", "digits5", code=2).stderr
    assert "not imported from an archive" in call("data", "import", "digits5", "toy.yaml", code=2).stderr


def test_version_and_environment_variables(folder, monkeypatch):
    found = document("version")
    assert found["libraries"]["torch"] and found["python"].startswith("3.")
    monkeypatch.setenv("MOEPIPE_STORE", str(folder / "elsewhere"))
    assert document("submit", "toy.yaml", *INLINE)["status"] == "finished"
    assert (folder / "elsewhere" / "runs").is_dir() and not (folder / ".moepipe").exists()


def test_printed_commands_name_a_store_that_is_not_the_default(folder):
    text = call("submit", "toy.yaml", *INLINE, "--store", "other").stdout
    assert f"moepipe ui --store {folder / 'other'}" in text


def test_ui_links_without_runs(folder):
    assert document("ui", "--links")["links"] == []


def test_ui_names_the_server_where_the_runs_are(done, folder):
    state = TrackingState(uri="http://mlflow.example:5000", experiment="1", runs={"": "r"})
    state.save(folder / ".moepipe" / "tracking" / f"{done['run']}.json")
    text = call("ui", "--links").stdout
    assert "tracked at http://mlflow.example:5000, not here" in text and "Nothing is tracked" not in text


def test_init_writes_a_pipeline_once(folder):
    text = call("init").stdout
    assert text.startswith("# yaml-language-server") and "stages:" in text
    call("init", "-o", "mine.yaml")
    assert "exists already" in call("init", "-o", "mine.yaml", code=2).stderr
