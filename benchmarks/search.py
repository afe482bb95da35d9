"""What a search costs besides its trials: 64 trials of one second each against the ideal wall time on the same cores.

    python -m benchmarks search
    python benchmarks/search.py [--trials 64] [--seconds 1] [--cpus 2]

Ray starts before the clock and ends after it, because a run pays for it once. In the time are: Tune's own start, the
processes of the trials with their imports, keys, commits of the artifacts, the table. The trials sleep, so that other
work on the machine disturbs the overhead only. Beside it: plain Ray Tune, and a widened space, where what is there is
not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import Row
from benchmarks.setting import Sizes
from orchestrator.executors.ray import RayExecutor
from orchestrator.graph import build_graph
from orchestrator.runs import RunStore
from orchestrator.scheduler import execute
from orchestrator.spec import PipelineSpec
from orchestrator.store import Store
from tests.support.toy_stages import register

LIMIT = 1.35


def spec(trials: int, seconds: float) -> PipelineSpec:
    """A grid of that many sleepers."""
    config: dict[str, Any] = {
        "stage": {"kind": "numbers", "config": {"sleep_s": seconds}},
        "space": {"value": {"int": [1, trials]}},
        "metric": "value",
        "selection": "training_domains",
        "algorithm": "grid",
        "figures": False,
    }
    return PipelineSpec(apiVersion="moepipe/v1", name="search", stages={"s": {"kind": "search", "config": config}})


def once(trials: int, seconds: float, store: Store, cpus: float) -> tuple[float, str]:
    """Wall time of one search, and the last line of its log."""
    pipeline = spec(trials, seconds)
    graph = build_graph(pipeline)
    run = RunStore(store).create(pipeline)
    executor = RayExecutor(num_cpus=cpus, preload=("orchestrator.search_run",))
    executor.connect()
    time.sleep(3)  # the actors that a run starts with Ray are there by then
    outcome = execute(graph, store, run, executor)
    times = [event.time for event in run.events()]
    taken = times[-1] - times[0]
    if outcome.status != "finished":
        raise SystemExit(f"The run ended as {outcome.status}: {outcome.error}")
    return taken, run.log_path("s/seed=0").read_text().splitlines()[-1]


def plain_tune(trials: int, seconds: float, cpus: float) -> float:
    """Wall time of the same trials with Ray Tune as its documentation starts it: no store, no keys, no resume."""
    executor = RayExecutor(num_cpus=cpus)
    executor.connect()
    time.sleep(3)
    from ray import tune

    def trial(point: dict[str, Any]) -> dict[str, Any]:
        time.sleep(seconds)
        return {"value": point["value"]}

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        start = time.perf_counter()
        config = tune.RunConfig(storage_path=folder, verbose=0)
        space = {"value": tune.grid_search(list(range(trials)))}
        tune.Tuner(trial, param_space=space, run_config=config).fit()
        taken = time.perf_counter() - start
    executor.close()
    return taken


def measure(trials: int, seconds: float, more: int, cpus: int) -> list[Row]:
    """Both lines."""
    register()
    with tempfile.TemporaryDirectory() as folder:
        store = Store.open(Path(folder) / "store")
        first, said = once(trials, seconds, store, cpus)
        assert f"0 from the store, {trials} run now" in said
        quarter, _ = once(trials // 4, seconds, Store.open(Path(folder) / "quarter"), cpus)
        wider, said = once(trials + more, seconds, store, cpus)
        assert f"{trials} from the store, {more} run now" in said
    plain = plain_tune(trials // 4, seconds, cpus)
    ideal = trials * seconds / cpus
    whole = (trials + more) * seconds / cpus
    return [
        Row(
            f"search of {trials} trials of {seconds:g} s on {cpus} cores, against the ideal",
            ideal,
            first,
            1 / LIMIT,
            f"{first / ideal:.2f}x of the ideal wall time, at most {LIMIT}x",
        ),
        Row(f"{trials // 4} of them, against plain Ray Tune", plain, quarter, None, "without store, keys and resume"),
        Row(f"the same widened by {more} trials, against the ideal of all", whole, wider, None, f"{more} trials run"),
    ]


def run(sizes: Sizes) -> list[Row]:
    """The rows of ``python -m benchmarks search``."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return measure(8, 0.2, 2, cores) if sizes == Sizes.quick() else measure(64, 1.0, 8, cores)


def main() -> None:
    """Parse the arguments, run, print."""
    from benchmarks.__main__ import table

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--more", type=int, default=8)
    parser.add_argument("--cpus", type=int, default=2)
    args = parser.parse_args()
    print(table(measure(args.trials, args.seconds, args.more, args.cpus)))


if __name__ == "__main__":
    main()
