"""``moepipe doctor``: what it sees, what it says about it, and the checks of ``moepipe ui``."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from moe.errors import EnvironmentProblem
from orchestrator import doctor
from orchestrator.doctor import OUR_PACKAGES, examine, port_is_free, versions
from orchestrator.ui import Server, command, comparison_link, environment

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checks(tmp_path_factory):
    """All checks against an empty store and a dead MLflow server."""
    folder = tmp_path_factory.mktemp("doctor")
    return {check.name: check for check in examine(str(folder / "store"), folder / "data", "http://127.0.0.1:9")}


def test_a_sound_machine_has_no_failed_check(checks):
    failed = [check for check in checks.values() if check.status == "failed"]
    assert not failed
    assert checks["Python"].detail.startswith(".".join(map(str, sys.version_info[:2])))
    assert {"torch", "ray", "deepspeed", "mlflow", "disk space", "store", "/dev/shm", "import torch"} <= set(checks)


def test_every_problem_has_a_fix(checks):
    assert all(check.fix for check in checks.values() if check.status != "ok")
    assert not [check for check in checks.values() if check.status == "ok" and check.fix]


def test_dead_tracking_is_a_warning_and_missing_data_is_told(checks):
    assert checks["MLflow"].status == "warning" and "track sync" in checks["MLflow"].fix
    assert "camelyon17" in checks["data sets"].detail.split("not below")[1]


def test_no_data_at_all_is_a_warning_with_a_fix(tmp_path, monkeypatch):
    from workers.datasets.base import DATASETS, Missing

    module = DATASETS.load("camelyon17")
    monkeypatch.setattr(type(DATASETS), "load", lambda self, name: module)
    monkeypatch.setattr(module, "missing", lambda root: [Missing("everything", "get it")])
    (check,) = doctor._data(tmp_path)
    assert check.status == "warning" and "moepipe data verify" in check.fix


def test_store_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    found = {check.name: check for check in doctor._store(str(tmp_path / "file"))}
    assert found["store"].status == "failed" and "--store" in found["store"].fix


def test_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "_DISK_NEEDED", 1e30)
    found = {check.name: check for check in doctor._store(str(tmp_path))}
    assert found["disk space"].status == "failed" and "moepipe gc" in found["disk space"].fix


def test_missing_and_unsupported_libraries(monkeypatch):
    monkeypatch.setattr(doctor, "LIBRARIES", ("torch", "no-such-library"))
    monkeypatch.setattr(doctor, "_ranges", lambda: {"torch": "<1.0"})
    found = {check.name: check for check in doctor._libraries()}
    assert found["no-such-library"].detail == "not installed"
    assert "supported: <1.0" in found["torch"].detail and found["torch"].status == "failed"
    assert versions()["no-such-library"] is None


def test_a_stranger_with_our_name_fails_the_doctor(tmp_path):
    stranger = tmp_path / "other" / "serve"
    stranger.mkdir(parents=True)
    (stranger / "__init__.py").write_text("")
    # No argument: the doctor's exit code and document are what scripts use.
    done = subprocess.run(
        [sys.executable, "-c", "from orchestrator.cli import main; main()", "doctor", "--json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path / 'other'}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    document = json.loads(done.stdout)
    (check,) = [item for item in document["checks"] if item["name"] == "moepipe's packages"]
    assert done.returncode == 5 and document["healthy"] is False
    assert check["status"] == "failed" and str(stranger) in check["detail"] and set(OUR_PACKAGES) - {"serve"}


def test_ports():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert not port_is_free(port)
    assert port_is_free(port)


def test_ui_on_a_taken_port_names_a_free_one(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(EnvironmentProblem, match="in use") as caught:
            Server("sqlite:///x.db", port, tmp_path, tmp_path / "log")
    assert "moepipe ui --port " in caught.value.hint and str(port) not in caught.value.hint.split()


def test_ui_server_is_on_loopback_without_jobs(tmp_path):
    line = command("sqlite:///x.db", 5050, tmp_path)
    assert line[line.index("--host") + 1] == "127.0.0.1" and line[line.index("--port") + 1] == "5050"
    assert environment({})["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    link = comparison_link("http://127.0.0.1:5050", "3", ["a", "b"])
    assert link == "http://127.0.0.1:5050/#/compare-runs?runs=%5B%22a%22%2C%22b%22%5D&experiments=%5B%223%22%5D"


def test_ui_server_that_dies_is_an_error_with_its_log(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (
        Server("nonsense://x", port, tmp_path, tmp_path / "server.log") as server,
        pytest.raises(EnvironmentProblem, match="ended at once"),
    ):
        server.wait_until_ready(240)
    assert (tmp_path / "server.log").stat().st_size > 0
