"""What `moepipe cluster up` and `down` add to Ray's launcher: counting the nodes, stopping every host."""

import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from moe.errors import EnvironmentProblem
from orchestrator import admission, cluster_jobs
from orchestrator import cluster_control as control
from orchestrator.admission import Admission
from orchestrator.capacity import Capacity
from orchestrator.graph import build_graph
from tests.support.pipelines import pipeline

ROOT = Path(__file__).parents[2]


def read(name):
    return yaml.safe_load((ROOT / name).read_text())


@pytest.mark.parametrize(("name", "nodes"), [("deploy/on_prem.yaml", 3), ("cluster.yaml", 1), ("deploy/gcp.yaml", 1)])
def test_how_many_nodes_there_should_be(name, nodes):
    assert control.expected_nodes(read(name)) == nodes


def test_local_workers_are_bounded_by_the_hosts_and_by_what_is_asked_for():
    config = read("deploy/on_prem.yaml")
    assert control.expected_nodes({**config, "min_workers": 1}) == 2
    assert control.expected_nodes({**config, "min_workers": 9}) == 3
    del config["min_workers"]
    assert control.expected_nodes(config) == 3


def test_nodes_are_waited_for_and_missing_ones_named(monkeypatch):
    monkeypatch.setattr(control, "_POLL_S", 0.01)
    config, told = read("deploy/on_prem.yaml"), []
    head, first, second = control.addresses(config)
    answers = iter([[], [head], [head], [head, first, second]])
    assert control.wait_for_nodes(config, lambda: next(answers), 30, told.append) == [head, first, second]
    assert told == ["0 of 3 nodes are up", "1 of 3 nodes are up", "3 of 3 nodes are up"]
    with pytest.raises(EnvironmentProblem, match=rf"2 of 3 nodes are up; missing: {second}"):
        control.wait_for_nodes(config, lambda: [head, first], 0.05, told.append)


@pytest.fixture
def ssh(tmp_path, monkeypatch):
    """An `ssh` that runs the line here, with a home of its own, and writes down how it was called; one host is off."""
    script = f"""#!/bin/bash
for word; do :; done
printf '%s\\n' "${{*:1:$#-1}}" >> {tmp_path}/calls
case "$*" in *"@10.0.0.12 "*) echo 'No route to host' >&2; exit 255;; esac
HOME={tmp_path} exec bash -c "$word"
"""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ssh").write_text(script)
    (folder / "ray").write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/rays\n')
    for path in folder.iterdir():
        path.chmod(0o755)
    (tmp_path / "moepipe").mkdir()
    (tmp_path / "moepipe/env.sh").write_text(f"export PATH={folder}:$PATH\n")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return tmp_path


def test_every_host_is_asked_with_the_command_of_the_yaml(ssh):
    head, first, second = control.stop_hosts(read("deploy/on_prem.yaml"))
    assert [host.reached for host in (head, first, second)] == [True, True, False]
    assert (ssh / "rays").read_text() == "stop\nstop\n"
    calls = (ssh / "calls").read_text().splitlines()
    assert calls[0].endswith(" ubuntu@10.0.0.10") and "ProxyCommand" not in calls[0]
    assert all(
        "ProxyCommand=ssh" in call and "-W %h:%p ubuntu@10.0.0.10" in call.replace("'", "") for call in calls[1:]
    )
    assert all("BatchMode=yes" in call and "moepipe_cluster" in call for call in calls)


def test_a_host_without_any_ray_is_stopped_already(ssh):
    (ssh / "moepipe/env.sh").unlink()
    head, first, _ = control.stop_hosts(read("deploy/on_prem.yaml"))
    assert head.reached and first.reached and not (ssh / "rays").exists()


def test_what_still_runs_is_seen(tmp_path):
    program = tmp_path / "gcs_server"
    shutil.copy(shutil.which("sleep"), program)
    running = subprocess.Popen([program, "60"])
    try:
        done = subprocess.run(["bash", "-c", control._LEFT], capture_output=True, text=True, check=True)
    finally:
        running.kill()
        running.wait()
    assert "gcs_server" in done.stdout.removeprefix("left:").split()


class Client:
    """A dashboard that breaks the connection while a job runs, or never answers."""

    def __init__(self, silent=False):
        self.silent, self.calls = silent, 0

    async def tail_job_logs(self, job):
        self.calls += 1
        yield "one\n"
        if self.calls == 1:
            raise ConnectionError("closed")
        yield "two\n"

    def get_job_status(self, job):
        if self.silent or self.calls == 2:
            raise ConnectionError("refused")
        return SimpleNamespace(value="RUNNING" if self.calls < 3 else "SUCCEEDED")

    def get_job_logs(self, job):
        return "one\ntwo\nthree\n"

    def get_job_info(self, job):
        return SimpleNamespace(status=SimpleNamespace(value="SUCCEEDED"), driver_exit_code=0, message="")


def following(client, monkeypatch):
    monkeypatch.setattr(cluster_jobs, "_POLL_S", 0.01)
    jobs = object.__new__(cluster_jobs.Jobs)
    jobs.address, jobs._client = "http://head", client
    return jobs


def test_words_come_once_over_broken_connections(monkeypatch):
    written = []
    assert following(Client(), monkeypatch).follow("run", written.append).exit_code == 0
    assert "".join(written) == "one\ntwo\nthree\n"


def test_a_head_that_does_not_come_back_is_an_error_that_says_how_to_go_on(monkeypatch):
    with pytest.raises(EnvironmentProblem, match=r"has not answered for 0\.1 s: refused") as told:
        following(Client(silent=True), monkeypatch).follow("run", print, patience_s=0.1)
    assert "same --run" in told.value.hint


def test_a_host_that_came_back_is_used_again(monkeypatch):
    machines = [{"cpus": 1.0}]
    graph = build_graph(pipeline({"n": {"kind": "numbers", "config": {"count": 2}}}))
    first, second = graph.nodes
    monkeypatch.setattr(admission, "LOOK_S", 3600.0)
    room = Admission(graph, lambda: Capacity(tuple(machines)))
    room.open(graph.nodes)
    room.new_round()
    assert room.take(first) and not room.take(second)
    machines.append({"cpus": 1.0})
    room.new_round()
    assert not room.take(second)  # it has been asked for a moment ago
    monkeypatch.setattr(admission, "LOOK_S", 0.0)
    room.new_round()
    assert room.take(second)
