"""How long a fan-out of empty members takes to schedule, and whether the driver's memory stays flat.

    python benchmarks/fan_out.py [--members 500] [--on ray|inline] [--cpus 2]

Ray is started before the clock, because a run pays for it once. The members write one small file each.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from orchestrator.executors.inline import InlineExecutor
from orchestrator.executors.ray import RayExecutor
from orchestrator.graph import build_graph
from orchestrator.runs import RunStore
from orchestrator.scheduler import execute
from orchestrator.spec import PipelineSpec
from orchestrator.store import Store
from tests.support.toy_stages import register


def resident_mb() -> float:
    """Resident memory of this process in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return float("nan")


def spec(members: int) -> PipelineSpec:
    """A fan-out and the one stage that reads it."""
    stages = {
        "members": {"kind": "numbers", "config": {"count": members}, "resources": {"cpus": 1}},
        "total": {"kind": "sum", "inputs": {"numbers": "${stages.members}"}},
    }
    return PipelineSpec(apiVersion="moepipe/v1", name="fan-out", stages=stages)


def once(members: int, store: Store, executor: InlineExecutor | RayExecutor) -> dict[str, float]:
    """Run one fan-out; seconds and the driver's memory before and after."""
    pipeline = spec(members)
    graph = build_graph(pipeline)
    run = RunStore(store).create(pipeline)
    before, start = resident_mb(), time.perf_counter()
    outcome = execute(graph, store, run, executor)
    seconds, after = time.perf_counter() - start, resident_mb()
    if outcome.status != "finished":
        raise SystemExit(f"The run ended as {outcome.status}: {outcome.error}")
    return {
        "members": members,
        "hits": outcome.hits,
        "seconds": seconds,
        "rss_before_mb": before,
        "rss_after_mb": after,
    }


def main() -> None:
    """Parse the arguments, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=int, default=500)
    parser.add_argument("--on", choices=("ray", "inline"), default="ray")
    parser.add_argument("--cpus", type=float, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    register()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("warm-up", "cold", "hits"):
            members = 10 if name == "warm-up" else args.members
            store = Store.open(Path(folder, "warm" if name == "warm-up" else "store"))
            executor = RayExecutor(num_cpus=args.cpus, preload=()) if args.on == "ray" else InlineExecutor()
            if isinstance(executor, RayExecutor) and name != "hits":
                executor.connect()
            rows.append({"run": name, **once(members, store, executor)})
    if args.json:
        print(json.dumps(rows))
        return
    print(f"{'run':8} {'members':>8} {'hits':>6} {'seconds':>9} {'ms/member':>10} {'RSS before':>11} {'RSS after':>10}")
    for row in rows:
        each = 1000 * row["seconds"] / row["members"]
        memory = f"{row['rss_before_mb']:8.1f} MB {row['rss_after_mb']:7.1f} MB"
        print(f"{row['run']:8} {row['members']:8} {row['hits']:6} {row['seconds']:9.2f} {each:10.1f} {memory}")


if __name__ == "__main__":
    main()
