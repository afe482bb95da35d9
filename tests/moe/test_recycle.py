"""Checkpoint recycling: index lists, gathers, the chain from predecessor to successor."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from pytest import mark, raises
from torch.testing import assert_close

from moe.conversion.recycle.dual_path import split_dual_path
from moe.conversion.recycle.indices import ListPlan, importance_lists, random_lists, top_list, uniform_list
from moe.conversion.recycle.indices_v2 import NeuronPlan, neuron_lists
from moe.conversion.recycle.options import RecycleOptions
from moe.conversion.recycle.recycle import layer_map, recycle
from moe.conversion.recycle.weights import UnitLists, select_weights, size_name, stack_sizes
from moe.errors import CheckpointError, DataError, SpecError
from tests.moe.recycle_helpers import (
    dense_state,
    few,
    ffn,
    record,
    seeded,
    successor_state,
    successor_state_of_width,
    vit,
)

# -- index lists -----------------------------------------------------------------------------------------------------


@few
@given(st.integers(1, 40), st.data())
def test_lists_are_ascending_unique_and_complete_when_everything_is_kept(total, data):
    keep = data.draw(st.integers(1, total))
    plan = ListPlan(total, keep, 4, (1, 3), data.draw(st.integers(1, 3)), data.draw(st.booleans()))
    metric = dict(enumerate(torch.rand(4, total, generator=seeded(total)) + 0.01))
    for lists in (random_lists(plan, seeded()), importance_lists(plan, metric, seeded())):
        assert sorted(lists) == [0, 1, 2, 3]
        for layer, units in lists.items():
            assert units.shape == ((plan.experts, keep) if layer in plan.expert_layers else (keep,))
            assert bool((units.diff(dim=-1) > 0).all()) and int(units.min()) >= 0 and int(units.max()) < total
            if keep == total:
                assert torch.equal(units, torch.arange(total).expand_as(units))
    for rounding in ("round", "truncate", "floor"):
        units = uniform_list(total, keep, rounding)
        assert len(units.unique()) == keep and int(units[0]) == 0 and int(units[-1]) < total


@few
@given(st.permutations(range(12)), st.integers(1, 12))
def test_the_most_important_units_follow_a_permutation(order, keep):
    metric = {layer: torch.randn(12, generator=seeded(layer)).abs() for layer in range(3)}
    moved = {layer: value[list(order)] for layer, value in metric.items()}
    assert {order[i] for i in top_list(moved, keep).tolist()} == set(top_list(metric, keep).tolist())


def test_importance_draws_what_matters():
    metric = {0: torch.tensor([1e-6, 1.0, 1e-6, 1.0])}
    lists = importance_lists(ListPlan(4, 2, 1, (0,), 50), metric, seeded())
    assert (lists[0] == torch.tensor([1, 3])).all(dim=1).float().mean() > 0.9


def test_impossible_lists_are_told():
    with raises(SpecError, match="5 of 4 units"):
        ListPlan(4, 5, 1, (0,), 2)
    with raises(SpecError, match=r"\[3\] do not exist"):
        ListPlan(4, 2, 2, (3,), 2)
    plan = ListPlan(4, 2, 2, (0,), 2)
    with raises(DataError, match="no statistics of layer 1"):
        importance_lists(plan, {0: torch.ones(4)}, seeded())
    with raises(DataError, match=r"layer 1 .*all zero"):
        importance_lists(plan, {0: torch.ones(4), 1: torch.zeros(4)}, seeded())
    with raises(DataError, match=r"shape \(3,\) instead of \(4,\)"):
        importance_lists(plan, {0: torch.ones(4), 1: torch.ones(3)}, seeded())
    with raises(SpecError, match="rounding"):
        uniform_list(4, 2, "up")


def test_simplified_tool_lists():
    metric = dict(enumerate(torch.rand(3, 10, generator=seeded())))
    for method, across in (("random", False), ("uniform", False), ("importance", False), ("importance", True)):
        plan = NeuronPlan(method, 10, 0.35, 3, (0, 2), 4, across)
        lists, _ = neuron_lists(plan, seeded(), metric)
        assert sorted(lists) == [0, 2] and lists[2].shape == (4, 3)
        if across:
            assert torch.equal(lists[0], lists[2])
    with raises(SpecError, match="no selection method 'best'"):
        NeuronPlan("best", 10, 0.5, 1, (0,), 1)
    with raises(SpecError, match="out of range"):
        NeuronPlan("random", 10, 1.5, 1, (0,), 1)
    with raises(DataError, match="Layer 1 needs statistics"):
        neuron_lists(NeuronPlan("importance", 10, 0.5, 2, (1,), 1), seeded(), {0: torch.ones(10)})


SELECTIONS = ("L1", "L2", "act_patrn", "random", "uniform")


@mark.parametrize("select", [*SELECTIONS, "copy"])
def test_equal_sizes_give_back_the_predecessor(select):
    old, new = dense_state(), successor_state(dim=16)
    made = recycle(old, new, RecycleOptions(select=select), generator=seeded(), statistics=record())
    for name, value in made.state.items():
        if "core_experts" in name:
            dense = name.replace("core_experts.vit_", "")
            assert all(torch.equal(expert, old[dense]) for expert in value)
        elif name in old and "head" not in name:
            assert torch.equal(value, old[name])
        elif "experts" not in name:
            assert torch.equal(value, new[name]) and made.origin[name] == "fresh"
    x = torch.randn(3, 16)
    core = [
        made.state[f"blocks.2.mlp.core_experts.vit_{p}"][0]
        for p in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    ]
    dense = [old[f"blocks.2.mlp.{p}"] for p in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")]
    assert torch.equal(ffn(x, *core), ffn(x, *dense))


@few
@given(st.sampled_from(SELECTIONS), st.integers(1, 16), st.integers(1, 64), st.integers(0, 9))
def test_experts_hold_their_lists_rows_and_columns(select, dim, hidden, seed):
    old = dense_state(seed=seed)
    new = successor_state_of_width(dim, hidden)
    made = recycle(old, new, RecycleOptions(select=select), generator=seeded(seed), statistics=record(seed=seed))
    rows, columns = made.experts.neuron[2], made.experts.channel[2]
    first = torch.cat([made.state[f"blocks.2.mlp.{f}_experts.vit_fc1.weight"] for f in ("core", "univ")])
    for expert in range(5):
        want = old["blocks.2.mlp.fc1.weight"][rows[expert]][:, columns[expert]]
        assert torch.equal(first[expert], want)
    assert list(made.state) == list(new)


@few
@given(st.permutations(range(64)), st.integers(0, 9))
def test_the_order_of_hidden_neurons_in_the_file_is_of_no_consequence(order, seed):
    """Permuted neurons with permuted lists: every expert still computes the same function."""
    old, order = dense_state(seed=seed), torch.tensor(order)
    moved = dict(old)
    for block in range(3):
        mlp = f"blocks.{block}.mlp"
        moved[f"{mlp}.fc1.weight"] = old[f"{mlp}.fc1.weight"][order]
        moved[f"{mlp}.fc1.bias"] = old[f"{mlp}.fc1.bias"][order]
        moved[f"{mlp}.fc2.weight"] = old[f"{mlp}.fc2.weight"][:, order]
    channel = {0: torch.arange(16), 1: torch.arange(16), 2: torch.arange(16)}
    some = torch.stack([torch.randperm(64, generator=seeded(seed + e))[:20].sort().values for e in range(2)])
    where = torch.empty(64, dtype=torch.int64)
    where[order] = torch.arange(64)
    dense = UnitLists(channel, channel, {i: torch.arange(64) for i in range(3)})
    both = {1: torch.arange(16).expand(2, -1)}
    x = torch.randn(4, 16, generator=seeded(seed))
    results = []
    for state, lists in ((old, some), (moved, where[some])):
        out = select_weights(state, dense, UnitLists(both, both, {1: lists}), [1])
        parts = [out[f"blocks.1.mlp.experts.vit_{p}"] for p in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")]
        results.append([ffn(x, *(part[e] for part in parts)) for e in range(2)])
    assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


def test_universal_experts_are_the_thinned_full_ones():
    old, new = dense_state(), successor_state()
    made = recycle(old, new, RecycleOptions(select="random"), generator=seeded(), donor=dense_state(dim=8, seed=5))
    experts = made.experts
    dense = UnitLists(
        {i: torch.arange(8) for i in range(3)},
        {i: torch.arange(8) for i in range(3)},
        {i: torch.arange(32) for i in range(3)},
    )
    stack = select_weights(old, dense, experts, [1, 2])
    two_steps = split_dual_path(stack, 2, 3, 0.25, [1, 2])
    for name, value in made.state.items():
        if "experts" in name:
            assert torch.equal(value, two_steps[name]) and made.origin[name] == "predecessor"
            assert value.data_ptr() != two_steps[name].data_ptr()


def test_a_donor_gives_everything_but_the_experts():
    donor, new = dense_state(dim=8, seed=5), successor_state()
    made = recycle(dense_state(), new, generator=seeded(), statistics=record(), donor=donor)
    assert made.dense is None and list(made.state) == list(new)
    for name, origin in made.origin.items():
        if origin == "donor":
            assert torch.equal(made.state[name], donor[name])
    assert made.origin["blocks.1.attn.qkv.weight"] == "donor"
    assert {made.origin[n] for n in ("blocks.1.mlp.phi", "fc_norm.weight", "blocks.2.mlp.slot_norm.bias")} == {"fresh"}
    corrected = recycle(
        dense_state(), new, RecycleOptions(inherit_norms=True), generator=seeded(), statistics=record(), donor=donor
    ).state
    assert torch.equal(corrected["blocks.2.mlp.slot_norm.bias"], donor["blocks.2.norm2.bias"])
    assert torch.equal(corrected["fc_norm.weight"], donor["norm.weight"])


def test_the_same_seed_gives_the_same_experts_with_and_without_donor():
    arguments = {"generator": seeded(3), "statistics": record()}
    alone = recycle(dense_state(), successor_state(), **arguments)
    arguments["generator"] = seeded(3)
    donated = recycle(dense_state(), successor_state(), **arguments, donor=dense_state(dim=8, seed=5))
    assert all(torch.equal(alone.state[n], donated.state[n]) for n in alone.state if "experts" in n)


def test_shared_channels_match_the_stream_of_the_shrunken_network():
    options = RecycleOptions(channels="shared_topk")
    made = recycle(dense_state(), successor_state(), options, generator=seeded(), statistics=record())
    channels = top_list(record().of("norm2", "L2"), 8)
    assert all((rows == channels).all() for rows in made.experts.channel.values())
    assert torch.equal(made.dense.channel[0], channels)
    assert torch.equal(made.state["cls_token"], dense_state()["cls_token"][..., channels])


@mark.parametrize(("how", "layers"), [("first", (0, 1, 2)), ("even", (0, 2, 5))])
def test_a_deeper_predecessor_lends_some_of_its_layers(how, layers):
    assert layer_map(3, 6, how) == layers
    old = dense_state(depth=6)
    options = RecycleOptions(select="L1", depth=how)
    made = recycle(old, successor_state(dim=16), options, generator=seeded(), statistics=record(depth=6))
    core = made.state["blocks.2.mlp.core_experts.vit_fc1.weight"][1]
    assert torch.equal(core, old[f"blocks.{layers[2]}.mlp.fc1.weight"])


def test_half_precision_successors_get_half_precision_experts():
    new = {n: v.to(torch.bfloat16) if "experts" in n else v for n, v in successor_state().items()}
    made = recycle(dense_state(), new, RecycleOptions(select="random"), generator=seeded())
    assert all(v.dtype == torch.bfloat16 for n, v in made.state.items() if "experts" in n)


def test_a_recycled_network_loads_into_timm_and_runs():
    """Without experts' blocks the shrunken dense part is a working, smaller timm network."""
    made = recycle(
        dense_state(), successor_state(), RecycleOptions(select="L2"), generator=seeded(), statistics=record()
    )
    model = vit(8)
    missing, _ = model.load_state_dict(made.state, strict=False)
    assert {name.split(".mlp.")[0] for name in missing if "norm" not in name} == {"blocks.1", "blocks.2"}
    assert model(torch.randn(1, 3, 32, 32)).isfinite().all()


def test_several_sizes_beside_each_other():
    old = dense_state()
    lists = {size_name(r): {1: torch.stack([torch.arange(int(64 * r))] * e)} for r, e in ((0.5, 2), (0.25, 3))}
    out = stack_sizes(old, lists, [1])
    assert out["blocks.1.mlp.experts.0p25.fc2.weight"].shape == (3, 16, 16)
    assert torch.equal(out["blocks.1.mlp.experts.0p50.fc1.weight"][1], old["blocks.1.mlp.fc1.weight"][:32])
    assert "blocks.1.mlp.fc1.weight" not in out and "head.weight" in out
    with raises(SpecError, match="no index list for layer 2"):
        stack_sizes(old, lists, [1, 2])


def test_universal_experts_of_a_donor_hold_matching_neurons():
    stack = {
        f"blocks.0.mlp.experts.vit_{part}": torch.zeros(3, *shape)
        for part, shape in (("fc1.weight", (8, 4)), ("fc1.bias", (8,)), ("fc2.weight", (4, 8)), ("fc2.bias", (4,)))
    }
    mark_of = torch.arange(8.0)
    donor = {
        "blocks.0.mlp.fc1.weight": mark_of[:, None].expand(8, 4).clone(),
        "blocks.0.mlp.fc1.bias": mark_of,
        "blocks.0.mlp.fc2.weight": mark_of.expand(4, 8).clone(),
        "blocks.0.mlp.fc2.bias": torch.zeros(4),
    }
    agree = {}
    for matching in (True, False):
        out = split_dual_path(stack, 1, 2, 0.5, [0], donor=donor, generator=seeded(), matching=matching)
        parts = [out[f"blocks.0.mlp.univ_experts.vit_{p}"] for p in ("fc1.bias", "fc1.weight", "fc2.weight")]
        agree[matching] = torch.equal(parts[0], parts[1][..., 0]) and torch.equal(parts[0], parts[2][:, 0])
    assert agree == {True: True, False: False}
    with raises(SpecError, match="belong together"):
        split_dual_path(stack, 1, 2, 0.5, [0], donor=donor)
    with raises(SpecError, match=r"leaves 0 of 8"):
        split_dual_path(stack, 1, 2, 0.1, [0])
    with raises(CheckpointError, match=r"shape \(3, 8, 4\) instead of \(4, 8, 4\)"):
        split_dual_path(stack, 1, 3, 0.5, [0])
    with raises(CheckpointError, match=r"blocks.1.mlp.experts.vit_fc1.bias"):
        split_dual_path(stack, 1, 2, 0.5, [1])
