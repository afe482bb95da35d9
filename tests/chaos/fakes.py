"""A Ray cluster of small fake nodes on this machine in a process of its own, told by lines what to do.

``python -m tests.chaos.fakes NODES``; each order and each answer is one line of JSON. Health checks are fast, so that a
dead node is noticed after some seconds (Ray's defaults: some 15 s).
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

HEALTH = {
    "health_check_initial_delay_ms": 2000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}
_BYTES = 80_000_000
_PATIENCE_S = 60.0


class Fakes:
    """The cluster. The head gives no cores to members."""

    def __init__(self, nodes: int) -> None:
        head = {"num_cpus": 0, "object_store_memory": _BYTES, "_system_config": HEALTH, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, connect=True, head_node_args=head)
        self.nodes: dict[str, Any] = {}
        for _ in range(nodes):
            self.add()

    def add(self) -> dict[str, Any]:
        """One more node."""
        node = self.cluster.add_node(num_cpus=2, object_store_memory=_BYTES)
        self.nodes[node.node_id] = node
        return self.state()

    def state(self) -> dict[str, Any]:
        """Address, and the raylet's process of each node that should be there."""
        raylets = {name: node.all_processes["raylet"][0].process.pid for name, node in self.nodes.items()}
        head = self.cluster.head_node
        own = [info.process.pid for infos in head.all_processes.values() for info in infos]
        return {"address": self.cluster.address, "nodes": raylets, "head": own}

    def crash(self, name: str) -> dict[str, Any]:
        """A node goes without a word; returns when the head has noticed."""
        self.cluster.remove_node(self.nodes.pop(name), allow_graceful=False)
        return {"noticed": self.gone(name)}

    def drain(self, name: str, seconds: float) -> dict[str, Any]:
        """A notice that a node goes in so many seconds, as a cloud gives for a spot machine."""
        client = ray._raylet.GcsClient(address=self.cluster.address)
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        accepted, why = client.drain_node(name, reason, "spot notice", int(1000 * (time.time() + seconds)))
        return {"accepted": accepted, "why": why}

    def gone(self, name: str) -> float:
        """Seconds until the head counts a node as dead; -1: it did not."""
        start = time.monotonic()
        while time.monotonic() - start < _PATIENCE_S:
            if not any(node["Alive"] for node in ray.nodes() if node["NodeID"] == name):
                return time.monotonic() - start
            time.sleep(0.1)
        return -1.0

    def given_up(self, name: str) -> dict[str, Any]:
        """Wait until the head counts a node as dead."""
        return {"noticed": self.gone(name)}

    def leaks(self) -> dict[str, Any]:
        """Placement groups and actors that still are there after a while."""
        end = time.monotonic() + _PATIENCE_S
        while (left := self._left()) != {"groups": [], "actors": []} and time.monotonic() < end:
            time.sleep(0.5)
        return left

    def _left(self) -> dict[str, Any]:
        groups = [key for key, group in ray.util.placement_group_table().items() if group["state"] != "REMOVED"]
        actors = [actor["ActorClassName"] for actor in ray._private.state.actors().values() if actor["State"] != "DEAD"]
        # Ray Train's own: a singleton, and a helper of each gang that cannot see its gang's end without a dashboard.
        actors = [name for name in actors if name not in ("_AutoscalingCoordinatorActor", "PlacementGroupCleaner")]
        return {"groups": groups, "actors": actors}


def main() -> None:
    """Carry out orders until the input ends."""
    fakes = Fakes(int(sys.argv[1]))
    print(json.dumps(fakes.state()), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = getattr(fakes, order["do"])(*order.get("with", []))
        except Exception as error:
            answer = {"error": repr(error)}
        print(json.dumps(answer), flush=True)
    fakes.cluster.shutdown()


if __name__ == "__main__":
    main()
