"""What `moepipe cluster up` and `down` add to Ray's launcher: counting the nodes, stopping every host."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from moe.errors import EnvironmentProblem
from orchestrator import cluster_control as control

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
