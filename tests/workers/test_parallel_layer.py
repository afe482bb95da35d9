"""DeepSpeed's expert-parallel layer gives the numbers of the plain layer, with 1 and 2 ranks sharing the experts."""

from __future__ import annotations

import json

import pytest
import torch

from moe.errors import SpecError
from moe.layers.layer import MoELayer
from moe.router_spec import RouterSpec
from tests.support.ranks import pair_environments, run_together
from workers.engines.parallel_layer import layer_names, share_of

pytestmark = pytest.mark.timeout(900)  # three processes import deepspeed and train
RULES = ("linear k1", "linear k2", "gmoe", "capacity k2")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One process alone and one pair, started together."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("parallel")
    run_together("tests.workers.parallel_layer_cases", folder, [{}, *pair_environments()], timeout=800)
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1")}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("process", "ep"), [("1-0", 1), ("2-0", 1), ("2-0", 2), ("2-1", 1), ("2-1", 2)])
def test_results_and_gradients_are_those_of_the_plain_layer(results, rule, process, ep):
    found = results[process][f"{rule}, ep {ep}"]
    assert {"y", "first x", "first experts.w1", "second experts.w2", "balance"} <= set(found)
    assert {name: value for name, value in found.items() if not value < 2e-5} == {}


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize(("process", "ep"), [("1-0", 1), ("2-0", 1), ("2-0", 2), ("2-1", 2)])
def test_training_with_the_engine_is_training_with_torch(results, process, ep, stage):
    found, expected = results[process][f"engine, ep {ep}, zero {stage}"], results["1-0"]["torch"]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert set(found["weights"]) == set(expected["weights"])
    for name, values in expected["weights"].items():
        assert found["weights"][name] == pytest.approx(values, abs=3e-4), name
    assert found["reload"] == 0 and found["plain"] < 1e-6 and found["share"] == 0
    assert found["moments"] == [[4, 6, 10], [4, 10, 6]]


def test_shares_and_names_without_ranks():
    layer = MoELayer(6, 10, RouterSpec(), 4)
    second = share_of(layer, 2, 1)
    assert torch.equal(second.w1, layer.experts.w1[2:]) and second.num_experts == 2
    seats = torch.randn(2, 2, 3, 6)
    y = second(seats)
    for rank, e in ((0, 0), (1, 1)):
        alone = layer.experts(seats[rank, e], [3 if n == 2 + e else 0 for n in range(4)])
        torch.testing.assert_close(y[rank, e], alone)
    assert layer_names(layer)["deepspeed_moe.experts.w2"] == "experts.w2"
    assert layer_names(layer)["deepspeed_moe.gate.gate.weight"] == "gate.weight"
    with pytest.raises(SpecError, match="4 experts cannot be shared equally by 3 ranks"):
        share_of(layer, 3, 0)
    with pytest.raises(SpecError, match="pre_score"):
        share_of(MoELayer(6, 10, RouterSpec(pre_score=True), 4), 2, 0)
