"""Short ways to build and run toy pipelines in tests."""

from __future__ import annotations

import tests.support.toy_stages  # noqa: F401
from orchestrator.executors.inline import InlineExecutor
from orchestrator.graph import build_graph
from orchestrator.runs import RunStore
from orchestrator.scheduler import execute
from orchestrator.spec import PipelineSpec


def pipeline(stages, seeds=(0,), name="toy"):
    """A spec of toy stages."""
    return PipelineSpec(apiVersion="moepipe/v1", name=name, seeds=list(seeds), stages=stages)


def go(spec, store, executor=None, **options):
    """Run a spec to its end; returns (outcome, run)."""
    run = options.pop("run", None) or RunStore(store).create(spec)
    outcome = execute(
        build_graph(spec), store, run, executor or InlineExecutor(), data_root=store.folder / "data", **options
    )
    return outcome, run


DIAMOND = {
    "numbers": {"kind": "numbers", "config": {"count": 3}},
    "squares": {"kind": "square", "inputs": {"number": "${stages.numbers}"}, "config": {"count": 3}},
    "total": {"kind": "sum", "inputs": {"numbers": "${stages.squares}"}},
    "all": {"kind": "gather", "inputs": {"numbers": ["${stages.total}"]}},
}
