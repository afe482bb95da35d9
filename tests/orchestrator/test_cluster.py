"""Clusters without one: names of runs, growth, tokens, tunnels, doctor's reports, what is compared before driving."""

import json
import os
import shutil
import stat
import time

import pytest
import yaml

from moe.errors import EnvironmentProblem, NotFoundError, SpecError
from orchestrator import cluster_doctor, cluster_growth, cluster_runs, cluster_tunnel
from orchestrator.capacity import Capacity, misfit
from orchestrator.doctor import Check
from orchestrator.executors.ray_connection import amounts_of
from orchestrator.graph import build_graph
from orchestrator.runs import RunStore
from orchestrator.spec import Resources
from tests.support.pipelines import DIAMOND, go, pipeline


class TestNamedRuns:
    def test_the_same_name_is_made_once_and_then_continued(self, store):
        runs, spec = RunStore(store), pipeline(DIAMOND)
        first = cluster_runs.run_named(runs, spec, "nightly", {})
        assert first.id == "nightly" and cluster_runs.run_named(runs, spec, "nightly", {}).id == "nightly"  # lost
        go(spec, store, run=first)
        second = cluster_runs.run_named(runs, spec, "nightly", {})
        assert second.origin == "nightly"
        go(spec, store, run=second)
        third = cluster_runs.run_named(runs, spec, "nightly", {})
        assert third.origin == second.id  # the chain goes on at its end
        assert cluster_runs.newest(runs, "nightly").id == third.id

    def test_a_name_belongs_to_one_pipeline(self, store):
        runs = RunStore(store)
        cluster_runs.run_named(runs, pipeline(DIAMOND), "nightly", {})
        with pytest.raises(SpecError, match="nightly exists and is of another pipeline"):
            cluster_runs.run_named(runs, pipeline(DIAMOND, seeds=(0, 1)), "nightly", {})

    @pytest.mark.parametrize("name", ["", "../up", "a/b", "-x", "a b", "x" * 101])
    def test_names_are_plain(self, store, name):
        with pytest.raises(SpecError, match="is not a run's name"):
            cluster_runs.run_named(RunStore(store), pipeline(DIAMOND), name, {})

    def test_a_driver_elsewhere_that_fell_silent_is_waited_for(self, store, monkeypatch):
        runs, spec, said = RunStore(store), pipeline(DIAMOND), []
        run = runs.create(spec, name="nightly")
        (run.path / "owner.json").write_text(json.dumps({"host": "gone", "pid": 1}))
        monkeypatch.setattr(cluster_runs, "_POLL_S", 0.1)
        assert run.status == "running"

        def listen(message):
            said.append(message)
            silent = time.time() - 61.0  # void after 60 s
            os.utime(run.path / "owner.json", (silent, silent))

        again = cluster_runs.run_named(runs, spec, "nightly", {}, listen)
        assert again.id == "nightly" and again.status == "lost" and "was driven by gone" in said[0]


def test_the_code_of_both_sides_is_compared():
    graph = build_graph(pipeline(DIAMOND))
    here = cluster_runs.code_of(graph)
    assert any(name.endswith("square.py") for name in here)
    cluster_runs.require_code(graph, here)
    name = next(name for name in here if name.endswith("square.py"))
    with pytest.raises(EnvironmentProblem, match=r"other code .*: \S*square\.py\."):
        cluster_runs.require_code(graph, {**here, name: "0" * 64})


class TestGrowth:
    TYPES = '{"gpu": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 3}}'

    def test_what_may_come_counts_what_is_there(self, monkeypatch):
        monkeypatch.setenv("MOEPIPE_NODE_TYPES", self.TYPES)
        gpu = {"Alive": True, "Labels": {cluster_growth.GROUP: "gpu"}, "Resources": {}}
        head = {"Alive": True, "Labels": {}, "Resources": {}}
        assert cluster_growth.may_come([head]) == [{"CPU": 8, "GPU": 1}] * 3
        assert len(cluster_growth.may_come([head, gpu, {**gpu, "Alive": False}])) == 2
        assert cluster_growth.may_come([gpu] * 5) == []

    def test_a_stage_that_fits_a_node_to_come_is_not_refused(self, monkeypatch):
        monkeypatch.setenv("MOEPIPE_NODE_TYPES", self.TYPES)
        head = {"cpus": 4.0, "gpus": 0.0}
        wanted = Resources(cpus=2, gpus=1)
        assert "asks for" in misfit("train", wanted, Capacity((head,)))
        coming = [amounts_of(resources) for resources in cluster_growth.may_come([])]
        assert misfit("train", wanted, Capacity((head, *coming))) == ""

    def test_on_the_head_of_ray_up_its_configuration_says_it(self, monkeypatch, tmp_path):
        from pathlib import Path

        from ray.autoscaler._private.util import prepare_config

        config = yaml.safe_load((Path(__file__).parents[2] / "cluster.yaml").read_text())
        monkeypatch.delenv("MOEPIPE_NODE_TYPES", raising=False)
        monkeypatch.setattr(cluster_growth, "BOOTSTRAP", tmp_path / "ray_bootstrap_config.yaml")
        assert cluster_growth.may_come([]) == []
        (tmp_path / "ray_bootstrap_config.yaml").write_text(yaml.safe_dump(prepare_config(config)))
        types = cluster_growth.node_types()
        assert {name: kind["max_workers"] for name, kind in types.items()} == {"gpu_worker": 4, "spot_gpu_worker": 8}
        assert sum("spot" in resources for resources in cluster_growth.may_come([])) == 8

    def test_nonsense_is_told(self, monkeypatch):
        monkeypatch.setenv("MOEPIPE_NODE_TYPES", '{"gpu": {"resources": {}}}')
        with pytest.raises(SpecError, match="MOEPIPE_NODE_TYPES cannot be read"):
            cluster_growth.node_types()


class TestTunnel:
    def test_a_token_is_made_once_and_is_private(self, tmp_path):
        path = tmp_path / "new" / "ray_token"
        assert cluster_tunnel.make_token(path)
        text = path.read_text()
        assert len(text) == 64 and stat.S_IMODE(path.stat().st_mode) == 0o600
        path.chmod(0o644)
        assert not cluster_tunnel.make_token(path) and path.read_text() == text
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

    def test_the_token_of_the_hosts_is_used(self, tmp_path, monkeypatch):
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
            monkeypatch.setenv(name, "")
        config = {"file_mounts": {"/home/u/moepipe/ray_token": str(tmp_path / "token")}}
        with pytest.raises(NotFoundError, match="moepipe cluster token"):
            cluster_tunnel.use_token(config)
        (tmp_path / "token").write_text("x")
        assert cluster_tunnel.use_token(config) == tmp_path / "token"
        assert os.environ["RAY_AUTH_MODE"] == "token" and os.environ["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / "token")

    def test_local_hosts_get_the_first_autoscaler(self):
        assert cluster_tunnel.ray_environment({"provider": {"type": "local"}})["RAY_UP_enable_autoscaler_v2"] == "0"
        assert "RAY_UP_enable_autoscaler_v2" not in cluster_tunnel.ray_environment({"provider": {"type": "aws"}})

    @pytest.mark.parametrize(("text", "said"), [("a: [", "is not YAML"), ("a: 1", "describes no cluster")])
    def test_what_is_no_cluster_is_told(self, tmp_path, text, said):
        path = tmp_path / "cluster.yaml"
        with pytest.raises(NotFoundError):
            cluster_tunnel.read_cluster(path)
        path.write_text(text)
        with pytest.raises(SpecError, match=said):
            cluster_tunnel.read_cluster(path)

    @pytest.mark.skipif(not shutil.which("ssh"), reason="no ssh client")
    def test_a_head_out_of_reach_is_told(self, tmp_path, monkeypatch):
        """`ray dashboard` really tries: nothing listens on port 22 of this address of the loopback."""
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
            monkeypatch.setenv(name, os.environ.get(name, ""))
        monkeypatch.setattr(cluster_tunnel, "_WAIT_S", 20.0)
        path = tmp_path / "cluster.yaml"
        provider = {"type": "local", "head_ip": "127.99.0.1", "worker_ips": []}
        auth = {"ssh_user": "nobody", "ssh_private_key": str(tmp_path / "key")}
        path.write_text(yaml.safe_dump({"cluster_name": "x", "provider": provider, "auth": auth}))
        with pytest.raises(EnvironmentProblem, match="No tunnel to the head of"), cluster_tunnel.address_of(str(path)):
            pass


class TestReports:
    def test_they_survive_the_way_through_a_job_s_output(self, capsys):
        from orchestrator import console

        check = Check("store", "failed", "no", "mount it")
        report = cluster_doctor.NodeReport("10.0.0.1", True, {"CPU": 4.0}, (check,))
        console.emit_json(cluster_doctor.to_json([report]))
        text = "some warning {\n" + capsys.readouterr().out + "and a last word\n"
        assert cluster_doctor.from_json(text) == [report] and report.failed == [check]
        with pytest.raises(EnvironmentProblem, match="cannot be read: bash: moepipe: not found"):
            cluster_doctor.from_json("bash: moepipe: not found\n")

    def test_what_differs_between_machines_is_found(self, store):
        answer = cluster_doctor.look_here(str(store.folder), "data", "sqlite://", "none")
        assert not answer["store_seen"] and answer["code"] == cluster_doctor.code_digest()
        states = {check.name: check.status for check in cluster_doctor._between({**answer, "code": "x", "time": 0.0})}
        assert states == {"same code": "failed", "same Python": "ok", "shared store": "failed", "clock": "warning"}
