"""Placement on a Ray cluster of fake GPUs: fractions are packed, custom resources choose nodes, plan says it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.capacity import Capacity
from orchestrator.cluster_fit import fits, to_json
from orchestrator.graph import build_graph
from tests.support.pipelines import DIAMOND, pipeline

ROOT = Path(__file__).parents[2]
GPU_NODE = {"cpus": 4.0, "gpus": 2.0, "memory_gb": 8.0}


def stage(count, **resources):
    return {"kind": "numbers", "config": {"count": count}, "resources": resources}


class TestFit:
    def fit(self, capacity, **stages):
        graph = build_graph(pipeline(stages))
        return {fit.stage: fit for fit in fits(graph, list(graph.nodes), Capacity(capacity))}

    def test_fractions_share_a_gpu(self):
        fit = self.fit((GPU_NODE, GPU_NODE), experts=stage(20, cpus=0.5, gpus=0.25))["experts"]
        assert (fit.members, fit.at_once, fit.machines) == (20, 16, 2)
        assert fit.words() == "experts 16 of 20 on 2 machines"

    def test_the_scarcest_counts(self):
        found = self.fit((GPU_NODE,), a=stage(9, cpus=1), b=stage(9, cpus=1, gpus=1), c=stage(9, cpus=1, memory_gb=3))
        assert {name: fit.at_once for name, fit in found.items()} == {"a": 4, "b": 2, "c": 2}

    def test_a_stage_of_named_nodes(self):
        spot = {**GPU_NODE, "spot": 1000.0}
        found = self.fit((GPU_NODE, spot), a=stage(9, cpus=1, custom={"spot": 0.001}), b=stage(9, cpus=1))
        assert found["a"].at_once == 4 and found["a"].machines == 1 and found["b"].at_once == 8

    def test_what_is_done_needs_no_room(self):
        graph = build_graph(pipeline(DIAMOND))
        todo = [name for name in graph.nodes if name.startswith("squares")]
        (fit,) = fits(graph, todo, Capacity((GPU_NODE,)))
        assert to_json([fit]) == {"squares": {"members": 3, "at_once": 3, "machines": 1}}


SCRIPT = """
import json, sys
from pathlib import Path
from ray.cluster_utils import Cluster
from orchestrator.executors.ray import RayExecutor
from orchestrator.stages.base import STAGES
from orchestrator.store import Store
from tests.support.pipelines import go, pipeline

STAGES.add("where", "tests.support.toy_stages.where")
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 80_000_000})
nodes = {
    name: cluster.add_node(num_cpus=4, num_gpus=2, resources={name: 1000}, object_store_memory=80_000_000).node_id
    for name in ("on_demand", "spot")
}
cluster.wait_for_nodes()
stages = {
    "halves": {"kind": "where", "config": {"count": 8, "seconds": 6.0}, "resources": {"cpus": 0.5, "gpus": 0.5}},
    "safe": {"kind": "where", "config": {"count": 4}, "resources": {"cpus": 1, "custom": {"on_demand": 0.001}}},
    "cheap": {"kind": "where", "config": {"count": 2}, "resources": {"cpus": 1, "gpus": 1, "custom": {"spot": 0.001}}},
}
executor = RayExecutor(cluster.address, preload=())
outcome, run = go(pipeline(stages), Store.open(sys.argv[1]), executor)
events = [[e.time, e.kind, e.node] for e in run.events() if e.kind in ("member-started", "member-finished")]
logs = {node: run.log_path(node).read_text() for node in outcome.artifacts}
print(json.dumps({"status": outcome.status, "nodes": nodes, "events": events, "logs": logs}))
cluster.shutdown()
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_members_land_where_they_may(tmp_path):
    """Two nodes with two fake GPUs each and a head without; in a process of its own."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {**clean, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "store")]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=380)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["status"] == "finished"
    place = {node: text.split("node=")[1].split()[0] for node, text in found["logs"].items()}
    seen = {node: text.split("gpus=")[1].split("\n")[0].strip() for node, text in found["logs"].items()}
    by_stage = {name: [node for node in place if node.startswith(name)] for name in ("halves", "safe", "cheap")}
    assert {place[node] for node in by_stage["safe"]} == {found["nodes"]["on_demand"]}
    assert {place[node] for node in by_stage["cheap"]} == {found["nodes"]["spot"]}
    # Half GPUs: two members to each of the four, all eight at the same time, each sees one GPU.
    pairs = [(place[node], seen[node]) for node in by_stage["halves"]]
    assert len(set(pairs)) == 4 and all(pairs.count(pair) == 2 for pair in pairs)
    running = most = 0
    for _, kind, node in sorted(found["events"]):
        if node.startswith("halves"):
            running += 1 if kind == "member-started" else -1
            most = max(most, running)
    assert most == 8
