"""Longest first: what the split found decides which expert starts first."""

from __future__ import annotations

import pytest

from moe.errors import NotFoundError
from orchestrator.executors.inline import InlineExecutor
from orchestrator.graph import build_graph
from orchestrator.runs import RunStore
from orchestrator.stages.base import StageBase
from orchestrator.stages.features import Stage as Features
from orchestrator.stages.train import Stage as Train
from orchestrator.store import Store
from orchestrator.weighing import Ranks
from tests.support.pipelines import go, pipeline
from tests.workers.toy import register

TRAINING = {"batch_size": 16, "steps": 1, "lr": 0.01, "validate_on": None}
BACKBONE = {"name": "tiny_cnn", "channels": 1, "width": 2}


class Recording(InlineExecutor):
    """The inline executor, which starts one member at a time; remembers in which order."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[str] = []

    def start(self, task):
        self.started.append(task.node)
        super().start(task)


@pytest.fixture
def stages():
    """Eight training domains of 24 rows for five experts, so that groups own 2, 2, 1, 2 and 1 of them."""
    register()
    data = {"kind": "prepare", "config": {"dataset": "toy", "options": {"num_domains": 10, "size": 8}}}
    training = {key: value for key, value in TRAINING.items() if key != "validate_on"}
    return {
        "data": data,
        "split": {"kind": "split", "inputs": {"data": "${stages.data}"}, "config": {"groups": 5}},
        "experts": {
            "kind": "train",
            "inputs": {"data": "${stages.data}", "groups": "${stages.split}"},
            "config": {"groups": 5, "backbone": BACKBONE, "training": training},
        },
        "features": {
            "kind": "features",
            "inputs": {"data": "${stages.data}", "model": "${stages.experts}"},
            "config": {"groups": 5},
        },
    }


def test_the_larger_group_starts_first(store, stages):
    executor = Recording()
    outcome, _ = go(pipeline(stages), store, executor)
    assert outcome.status == "finished", outcome.failures
    rows = store.artifact(outcome.artifacts["split/seed=0"]).meta["rows"]
    assert rows == [48, 48, 24, 48, 24]
    order = [name.rpartition("=")[2] for name in executor.started if name.startswith("experts/")]
    assert order == ["0", "1", "3", "2", "4"]
    trained = [store.artifact(outcome.artifacts[f"experts/seed=0/group={i}"]).meta["rows"] for i in range(5)]
    assert trained == rows  # the weight is what the expert then trains on


def test_networks_on_all_rows_weigh_all_rows(stages):
    data = {"rows": {"train": 100, "val": 20, "test": 7}}
    train = build_graph(pipeline(stages)).nodes["experts/seed=0/group=2"]
    alone = train.config.model_copy(update={"groups": 1, "splits": ("train", "val")})
    assert Train().weigh(alone, Train().members(alone)[0], {"data": [data]}) == 120
    config = Features.Config(groups=2)
    assert [Features().weigh(config, member, {"data": [data]}) for member in Features().members(config)] == [120, 120]


@pytest.mark.parametrize("groups", [{}, {"rows": [5, 6]}], ids=["not counted", "fewer groups"])
def test_without_counts_the_static_weight_stands(stages, groups):
    node = build_graph(pipeline(stages)).nodes["experts/seed=0/group=2"]
    assert Train().weigh(node.config, node.member, {"data": [{}], "groups": [groups]}) == node.member.weight == 1.0


def test_an_artifact_that_vanished_leaves_the_order_as_it_was(store, stages, monkeypatch):
    graph = build_graph(pipeline(stages))
    outcome, _ = go(pipeline({name: stages[name] for name in ("data", "split")}), store)
    store.remove(outcome.artifacts["split/seed=0"])
    with pytest.raises(NotFoundError):
        store.artifact(outcome.artifacts["split/seed=0"])
    ranks = Ranks(graph, store)
    before = ranks["experts/seed=0/group=2"]
    from orchestrator.frontier import Inputs

    arriving = {"groups": (("split", outcome.artifacts["split/seed=0"]),)}
    ranks.arrive("experts/seed=0/group=2", Inputs(arriving, {}))
    assert ranks["experts/seed=0/group=2"] == before


def test_stages_that_do_not_weigh_cost_no_look_into_the_store(store, stages, monkeypatch):
    def refuse(self, digest):
        raise AssertionError(digest)

    spec = pipeline(
        {"numbers": {"kind": "numbers"}, "total": {"kind": "sum", "inputs": {"numbers": "${stages.numbers}"}}}
    )
    graph = build_graph(spec)
    assert type(graph.stages["total"].stage).weigh is StageBase.weigh
    outcome, _ = go(spec, store, run=RunStore(store).create(spec))
    monkeypatch.setattr(Store, "artifact", refuse)
    ranks = Ranks(graph, store)
    from orchestrator.frontier import Inputs

    ranks.arrive("total/seed=0", Inputs({"numbers": (("numbers", outcome.artifacts["numbers/seed=0"]),)}, {}))
    assert ranks["total/seed=0"] == 1.0
