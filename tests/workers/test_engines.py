"""Engines: every layout gives the numbers of plain torch on one rank, and state moves between all of them."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from moe.errors import CheckpointError, EnvironmentProblem, SpecError
from tests.support.ranks import pair_environments, run_together
from workers.engines import deepspeed as engine_module
from workers.engines.base import EngineState, OptimizerOptions, ParamGroup, build_optimizer, weighted
from workers.engines.torch import TorchEngine

pytestmark = pytest.mark.timeout(900)  # three processes import deepspeed and train


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict[str, dict]]:
    """One process alone and one pair, started together, each running all its cases."""
    folder = tmp_path_factory.mktemp("engines")
    # A compiler that does not exist: nothing may be compiled.
    forbidden = {"CXX": "/nonexistent", "TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
    run_together("tests.workers.engine_cases", folder, [{}, *pair_environments()], timeout=800, **forbidden)
    assert not list(folder.glob("extensions/**/*.so"))
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in ("single-0", "pair-0", "pair-1")}


def check(found: dict, weights: float = 3e-4, moments: float = 1e-3) -> None:
    assert found["losses"] == pytest.approx(found["expected"], rel=1e-5)
    # Adam turns the rounding noise of gradients that are zero by identity into steps of up to the learning rate.
    assert found.get("names", 0.0) == 0.0
    assert found.get("weights", 0.0) < weights and found.get("moments", 0.0) < moments


@pytest.mark.parametrize("case", ["torch", "zero0", "zero1", "zero2", "k1", "dense", "exact_aggregator", "clip", "sgd"])
@pytest.mark.parametrize("ranks", ["single-0", "pair-0"])
def test_equal_to_plain_torch_on_one_rank(results, ranks, case):
    check(results[ranks][case])


@pytest.mark.parametrize("case", ["ep_zero0", "ep_zero1", "ep_zero2"])
def test_experts_shared_by_two_ranks_give_the_same_numbers(results, case):
    check(results["pair-0"][case])


def test_all_ranks_report_the_same_losses(results):
    for name, found in results["pair-0"].items():
        assert results["pair-1"][name].get("losses") == found.get("losses"), name


@pytest.mark.parametrize(
    ("ranks", "case"),
    [
        ("pair-0", "from_one_rank"),
        ("single-0", "from_two_ranks"),
        ("pair-0", "torch_to_parallel"),
        ("pair-0", "parallel_to_torch"),
        ("pair-0", "zero0_to_zero1"),
    ],
)
def test_a_checkpoint_goes_on_at_another_world_size_and_layout(results, ranks, case):
    check(results[ranks][case])


@pytest.mark.parametrize("ranks", ["single-0", "pair-0"])
def test_forgetting_the_moments_is_the_same_in_both_engines(results, ranks):
    found = results[ranks]["reset"]
    assert found["losses"] == pytest.approx(found["expected"], rel=1e-4)


def test_bf16_stays_near_fp32_and_is_equal_on_both_layouts(results):
    single, pair = results["single-0"], results["pair-0"]
    assert pair["bf16"]["losses"][0] == pytest.approx(single["zero1"]["losses"][0], rel=0.05)
    assert pair["bf16"]["losses"][0] == pytest.approx(single["bf16"]["losses"][0], rel=0.01)


@pytest.mark.parametrize("ranks", ["single-0", "pair-0"])
def test_the_export_loads_in_plain_torch_with_equal_logits(results, ranks):
    assert results[ranks]["export"]["difference"] < 1e-5
    assert results[ranks]["export"]["plain"] == 0.0


def test_wrong_sizes_are_refused():
    check_sizes = engine_module._check
    with pytest.raises(SpecError, match="zero_stage is 3"):
        check_sizes(engine_module.DeepSpeedOptions(3), 1, OptimizerOptions())  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="ep_size is 2 with 3 ranks"):
        check_sizes(engine_module.DeepSpeedOptions(1, 2), 3, OptimizerOptions())
    with pytest.raises(SpecError, match="clipping"):
        check_sizes(engine_module.DeepSpeedOptions(1, 2), 2, OptimizerOptions(clip=1.0))
    with pytest.raises(SpecError, match="no experts that ranks could share"):
        engine_module._check_experts(engine_module.DeepSpeedOptions(1, 2), nn.Linear(2, 2))


def test_an_upgrade_that_drops_the_switch_is_noticed():
    class Changed:
        __version__ = "9.9"
        ops = object()

    with pytest.raises(EnvironmentProblem, match=r"9\.9"):
        engine_module._switch_off_compiled_communication(Changed)


def test_torch_state_is_keyed_by_name_and_strict():
    net = nn.Linear(2, 1)
    engine = TorchEngine(net, [ParamGroup("all", list(net.parameters()), 1e-2)], OptimizerOptions())
    engine.step([torch.ones(3, 2)], lambda module, x: module(x).square().mean())
    state = engine.state_dict()
    assert set(state.optimizer) == {"weight", "bias"}
    assert set(state.optimizer["weight"]) == {"exp_avg", "exp_avg_sq", "step"}
    with pytest.raises(CheckpointError, match="'other'"):
        engine.load_state_dict(EngineState(state.module, {"other": state.optimizer["bias"]}))
    with pytest.raises(CheckpointError, match="missing: bias"):
        engine.load_state_dict(EngineState({"weight": state.module["weight"]}))


def test_parameters_without_a_gradient_do_not_move():
    net = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(2, 1)})
    before = net["unused"].weight.detach().clone()
    options = OptimizerOptions("adam")
    engine = TorchEngine(net, [ParamGroup("all", list(net.parameters()), 1e-2, weight_decay=0.1)], options)
    engine.step([torch.ones(3, 2)], lambda module, x: module["used"](x).mean())
    assert torch.equal(net["unused"].weight, before)


def test_plain_micro_batches_share_the_step_equally():
    assert [item.weight for item in weighted(["a", "b"], 2)] == [0.25, 0.25]


def test_unknown_optimisers_and_foreign_parameters_are_refused():
    net = nn.Linear(2, 1)
    group = ParamGroup("all", list(net.parameters()), 1e-2)
    with pytest.raises(SpecError, match="Did you mean 'adam'"):
        build_optimizer([group], OptimizerOptions("adan"))
    with pytest.raises(SpecError, match="not part of the module"):
        TorchEngine(nn.Linear(2, 1), [group], OptimizerOptions())
