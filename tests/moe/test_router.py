"""Routing: choice, weights, seats, capacity, losses, draws, and the contradictions that a spec refuses."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from moe.errors import SpecError
from moe.layers.balance import (
    gshard_loss,
    load_importance_loss,
    noisy_loss,
    normal_cdf,
    squared_variation,
    switch_loss,
)
from moe.layers.router import choose, draw_noise, noise_shape, route, route_scores, route_tokens
from moe.layers.seating import (
    by_importance,
    capacity,
    count_choices,
    fastmoe_capacity,
    official_load,
    seats,
    tutel_capacity,
)
from moe.router_spec import RouterSpec

SIZES = {"n": st.integers(1, 12), "experts": st.integers(1, 6), "seed": st.integers(0, 999)}
FACTORS = st.sampled_from([None, -1.0, -0.4, 0.0, 0.3, 1.0, 1.7])
QUICK = settings(max_examples=40, deadline=None)


def logits(n, experts, seed=0, dtype=torch.float64):
    return torch.randn(n, experts, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_equal_scores_go_to_the_lower_number():
    scores = torch.tensor([[0.2, 0.4, 0.4, 0.0], [0.25, 0.25, 0.25, 0.25]])
    assert choose(scores, 1).tolist() == [[1], [0]]
    assert choose(scores, 3).tolist() == [[1, 2, 0], [0, 1, 2]]
    assert choose(scores, 9).shape == (2, 4)


def queue_seats(experts_NK, order, first):
    """Seats by walking through the queue, one choice after the other."""
    n, k = experts_NK.shape
    walk = (
        [(t, j) for t in range(n) for j in range(k)] if order == "token" else [(t, j) for j in range(k) for t in first]
    )
    found, taken = torch.empty_like(experts_NK), Counter()
    for t, j in walk:
        expert = int(experts_NK[t, j])
        found[t, j] = taken[expert]
        taken[expert] += 1
    return found


@QUICK
@given(k=st.integers(1, 4), order=st.sampled_from(["rank", "token", "priority"]), **SIZES)
def test_seats_are_those_of_a_queue(n, experts, seed, k, order):
    scores = logits(n, experts, seed).softmax(-1)
    chosen = choose(scores, k)
    first = by_importance(scores) if order == "priority" else None
    kind = "token" if order == "token" else "rank"
    expected = queue_seats(chosen, kind, range(n) if first is None else first.tolist())
    assert torch.equal(seats(chosen, experts, kind, first), expected)
    assert count_choices(chosen, experts).tolist() == torch.bincount(chosen.flatten(), minlength=experts).tolist()


def test_equal_importance_keeps_token_order():
    scores = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.4, 0.6], [0.1, 0.9]])
    assert by_importance(scores).tolist() == [1, 3, 0, 2]


@QUICK
@given(k=st.integers(1, 4), priority=st.booleans(), **SIZES)
def test_the_official_load_follows_its_table(n, experts, seed, k, priority):
    """The definition in words: a table of running counts of the last rank, read at the last token."""
    scores = logits(n, experts, seed).softmax(-1)
    chosen = choose(scores, k)
    k = chosen.shape[1]
    first = by_importance(scores) if priority else None
    order = list(range(n)) if first is None else first.tolist()
    table = torch.zeros(n, experts, dtype=torch.long)
    running = torch.zeros(experts, dtype=torch.long)
    for t in order:
        expert = int(chosen[t, k - 1])
        running[expert] += 1
        table[t] = running - 1
        if priority:
            table[t] = torch.where(torch.arange(experts) == expert, running - 1, 0)
    table += torch.bincount(chosen[:, : k - 1].flatten(), minlength=experts)
    if priority:
        assert torch.equal(official_load(chosen, seats(chosen, experts, "rank", first), experts), table[-1] + 1)
    else:
        assert torch.equal(count_choices(chosen, experts), table[-1] + 1)


def test_capacities():
    load = torch.tensor([7, 2, 1])
    assert int(tutel_capacity(1.5, 10, 1, load)) == 6  # int(1.5 * 4)
    assert int(tutel_capacity(1.1, 10, 2, load)) == 8  # 2 * int(4.4)
    assert int(tutel_capacity(0.0, 10, 1, load)) == 7
    assert int(tutel_capacity(-1.0, 10, 1, load)) == 4
    assert int(tutel_capacity(-9.0, 10, 1, load)) == 7
    assert int(tutel_capacity(1.5, 10, 1, load, alignment=4)) == 8
    assert int(tutel_capacity(0.2, 3, 1, load)) == 0
    assert fastmoe_capacity("gshard", 12, 4, 0.6) == 4 and fastmoe_capacity("switch", 10, 3, 0.7) == 3
    assert capacity(10, 4, 2, 1.25) == 7


@QUICK
@given(
    k=st.integers(1, 4),
    factor=FACTORS,
    priority=st.booleans(),
    normalize=st.booleans(),
    one=st.booleans(),
    **SIZES,
)
def test_what_every_routing_satisfies(n, experts, seed, k, factor, priority, normalize, one):
    spec = RouterSpec(top_k=k, batch_prioritized=priority, normalize_gates=normalize, one_score=one)
    scores = logits(n, experts, seed).softmax(-1)
    routing = route_scores(scores, spec, factor)
    width = min(k, experts)
    top = scores.topk(width).values
    torch.testing.assert_close(scores.gather(1, routing.experts_NK), top)
    if one:
        assert bool((routing.gates_NK == 1).all())
    elif normalize and width > 1:
        torch.testing.assert_close(routing.gates_NK, top / top.sum(-1, keepdim=True))
    else:
        torch.testing.assert_close(routing.gates_NK, top)
    assert torch.equal(routing.weights_NK, routing.gates_NK * routing.kept_NK)
    assert torch.equal(routing.counts_E, count_choices(routing.experts_NK[routing.kept_NK], experts))
    if factor is None or factor == 0:
        assert bool(routing.kept_NK.all()) and int(routing.counts_E.sum()) == n * width
    else:
        limit = width * int(abs(factor) * math.ceil(n / experts))
        assert int(routing.counts_E.max()) <= limit
        taken = routing.counts_E.clamp(max=limit)
        assert torch.equal(taken, count_choices(routing.experts_NK, experts).clamp(max=limit))  # no seat stays empty
    if factor is not None:
        for expert in range(experts):
            seated = routing.seats_NK[(routing.experts_NK == expert) & routing.kept_NK]
            assert sorted(seated.tolist()) == list(range(int(routing.counts_E[expert])))


@QUICK
@given(k=st.integers(1, 4), **SIZES)
def test_priority_keeps_the_best_tokens(n, experts, seed, k):
    scores = logits(n, experts, seed).softmax(-1)
    routing = route_scores(scores, RouterSpec(batch_prioritized=True), 0.5)
    best = scores.amax(-1)
    for expert in range(experts):
        mine = routing.experts_NK[:, 0] == expert
        kept, dropped = best[mine & routing.kept_NK[:, 0]], best[mine & ~routing.kept_NK[:, 0]]
        if len(kept) and len(dropped):
            assert float(kept.min()) >= float(dropped.max())


@QUICK
@given(k=st.integers(1, 3), priority=st.booleans(), **SIZES)
def test_tokens_may_come_in_any_order(n, experts, seed, k, priority):
    """Always when nothing is dropped; with capacity as long as priority, not position, decides."""
    scores = logits(n, experts, seed).softmax(-1)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    spec = RouterSpec(top_k=k, batch_prioritized=True)
    factor = 0.7 if priority and experts > 1 else None  # one expert: all are equally important
    one, other = (route_scores(s, spec, factor) for s in (scores, scores[order]))
    assert torch.equal(one.experts_NK[order], other.experts_NK) and torch.equal(one.kept_NK[order], other.kept_NK)
    torch.testing.assert_close(one.weights_NK[order], other.weights_NK)


def test_official_load_drops_where_the_true_one_does_not():
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
    spec = RouterSpec(batch_prioritized=True, capacity_factor=0.0)
    assert route_scores(scores, spec, 0.0).kept_NK.all()
    last_first = scores.flip(0)  # the last token sits first: the official count sees one taken seat
    quirk = route_scores(last_first, spec.model_copy(update={"official_load": True}), 0.0)
    assert int(quirk.capacity) == 1 and int(quirk.kept_NK.sum()) == 1


SPECS = {
    "linear": RouterSpec(top_k=2, balance="gshard"),
    "raw": RouterSpec(top_k=2, normalize_gates=False, noise=1.0, balance="load_importance"),
    "top1": RouterSpec(
        gate="cosine", noise=0.5, balance="load_importance", capacity_factor=1.0, batch_prioritized=True
    ),
    "one_score": RouterSpec(gate="avg_k", top_k=3, one_score=True, noise=1.0, balance="load_importance"),
    "naive": RouterSpec(gate="naive", top_k=2, balance="gshard"),
    "gshard": RouterSpec(gate="gshard", top_k=2, capacity_factor=0.6, random_routing=True, balance="gshard"),
    "switch": RouterSpec(gate="switch", capacity_factor=0.7, balance="switch"),
    "noisy": RouterSpec(gate="noisy", top_k=2, balance="noisy"),
}


@pytest.mark.parametrize("name", sorted(SPECS))
@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("training", [True, False])
def test_derivatives_against_finite_differences(name, order, training):
    spec, given_logits = SPECS[name], logits(7, 4, seed=3).requires_grad_()
    noise = draw_noise(spec, given_logits, training, torch.Generator().manual_seed(1))
    deviation = logits(7, 4, seed=4).exp().requires_grad_() if name == "noisy" else None

    def function(values, deviation=None):
        routing, scores = route_tokens(values, spec, training=training, noise=noise, deviation_NE=deviation)
        return routing.weights_NK * 1.0, routing.balance * 1.0, scores

    inputs = (given_logits,) if deviation is None else (given_logits, deviation)
    check = torch.autograd.gradcheck if order == "first" else torch.autograd.gradgradcheck
    assert check(function, inputs)


def test_one_score_leaves_the_gate_to_the_auxiliary_loss():
    values = logits(6, 4).requires_grad_()
    routing, _ = route_tokens(values, SPECS["one_score"], training=True, noise=torch.zeros(6, 4).double())
    assert not routing.weights_NK.requires_grad
    assert torch.autograd.grad(routing.balance, values)[0].abs().sum() > 0


def test_noise_is_divided_by_the_number_of_experts_and_absent_in_evaluation():
    values, noise = logits(6, 4), logits(6, 4, seed=9)
    spec = SPECS["raw"].model_copy(update={"noise": 2.0})
    _, scores = route_tokens(values, spec, training=True, noise=noise)
    torch.testing.assert_close(scores, (values + 0.5 * noise).softmax(-1))
    _, quiet = route_tokens(values, spec, training=False, noise=noise)
    torch.testing.assert_close(quiet, values.softmax(-1))


@pytest.mark.parametrize("name", sorted(SPECS))
def test_evaluation_draws_and_drops_nothing_unless_asked(name):
    spec, values = SPECS[name], logits(9, 4)
    assert noise_shape(spec, values, training=False) is None and draw_noise(spec, values, False) is None
    routing, _ = route_tokens(values, spec, training=False)
    assert bool(routing.kept_NK.all()) and routing.capacity is None


def test_official_evaluation_applies_its_own_capacity_and_draws():
    more = {"eval_capacity": True, "eval_capacity_factor": 0.4}
    spec, values = RouterSpec(**{**SPECS["gshard"].model_dump(), **more}), logits(9, 4)
    routing, _ = route_tokens(values, spec, training=False, noise=torch.zeros(9))
    assert int(routing.capacity) == math.ceil(0.4 * 9) * 2 // 4 and int(routing.counts_E.max()) <= 2
    same = RouterSpec(capacity_factor=0.5, eval_capacity=True)
    assert int(route_tokens(values, same, training=False)[0].capacity) == int(0.5 * math.ceil(9 / 4))


def test_random_routing_skips_light_second_experts_after_pruning():
    spec, values = SPECS["gshard"].model_copy(update={"capacity_factor": 9.0}), logits(9, 4)
    never, _ = route_tokens(values, spec, training=True, noise=torch.zeros(9))
    always, _ = route_tokens(values, spec, training=True, noise=torch.ones(9))
    assert bool(never.kept_NK.all()) and not bool(always.kept_NK[:, 1].any()) and bool(always.kept_NK[:, 0].all())
    assert torch.equal(always.gates_NK, never.gates_NK) and int(always.counts_E.sum()) == 9


def test_draws_come_from_the_generator_and_have_the_right_law():
    values = logits(400, 4)
    for name in ("raw", "switch", "gshard", "noisy"):
        one, two = (draw_noise(SPECS[name], values, True, torch.Generator().manual_seed(5)) for _ in range(2))
        assert torch.equal(one, two) and one.dtype == torch.float64
        assert bool((one.min() >= 0) & (one.max() < 1)) is (name in ("switch", "gshard"))
        assert one.shape == ((400,) if name == "gshard" else (400, 4))


def test_missing_and_misshapen_draws_are_refused():
    values = logits(5, 4)
    with pytest.raises(SpecError, match=r"draws of shape \(5, 4\); got nothing"):
        route_tokens(values, SPECS["raw"], training=True)
    with pytest.raises(SpecError, match=r"draws of shape \(5,\); got shape \(5, 4\)"):
        route_tokens(values, SPECS["gshard"], training=True, noise=values)
    with pytest.raises(SpecError, match="deviations"):
        route_tokens(values, SPECS["noisy"], training=True, noise=values)


def test_losses_of_even_and_crowded_loads():
    even = torch.eye(4, dtype=torch.float64).repeat(3, 1)
    crowded = even[:1].repeat(12, 1)
    assert float(gshard_loss(even, choose(even, 1))) == pytest.approx(1.0)
    assert float(gshard_loss(crowded, choose(crowded, 1))) == pytest.approx(4.0)
    assert float(switch_loss(even, torch.tensor([3, 3, 3, 3]))) == pytest.approx(1.0)
    assert float(switch_loss(crowded, torch.tensor([12, 0, 0, 0]))) == pytest.approx(4.0)
    assert float(squared_variation(torch.full((4,), 3.0))) == 0.0
    assert float(squared_variation(torch.tensor([0.0, 0.0, 0.0, 4.0]))) == pytest.approx(4.0)
    torch.testing.assert_close(
        normal_cdf(torch.tensor([-1.0, 0.0, 2.0])), torch.special.ndtr(torch.tensor([-1, 0, 2.0]))
    )


def test_the_load_of_the_noisy_gate_is_the_chance_to_be_chosen_again():
    """Against 200 000 fresh draws of one expert's noise, all others fixed."""
    clean, deviation = logits(1, 4, seed=2), logits(1, 4, seed=3).exp()
    noisy = clean + logits(1, 4, seed=4) * deviation
    order = choose(noisy, 3)
    loads = []
    for expert in range(4):
        fresh = clean[0, expert] + deviation[0, expert] * logits(200_000, 1, seed=5)[:, 0]
        others = noisy[0, torch.arange(4) != expert].sort(descending=True).values
        loads.append((fresh > others[1]).double().mean())
    weights = noisy.gather(1, order[:, :2]).softmax(-1)
    importance = torch.zeros(4, dtype=torch.float64).scatter(0, order[0, :2], weights[0])
    expected = squared_variation(importance) + squared_variation(torch.stack(loads))
    assert float(noisy_loss(clean, noisy, deviation, order, 2)) == pytest.approx(float(expected), rel=0.02)


@pytest.mark.parametrize("name", sorted(SPECS))
@pytest.mark.parametrize("n", [0, 1, 3])
def test_one_expert_and_few_tokens_give_finite_losses_and_gradients(name, n):
    for experts in (1, 4):
        if name == "gshard" and experts == 1:
            continue
        values = logits(n, experts).requires_grad_()
        noise = draw_noise(SPECS[name], values, True, torch.Generator().manual_seed(0))
        routing, _ = route_tokens(values, SPECS[name], training=True, noise=noise, deviation_NE=torch.ones_like(values))
        (routing.weights_NK.sum() + routing.balance).backward()
        assert bool(torch.isfinite(values.grad).all()) and bool(torch.isfinite(routing.balance))
        if experts == 1 and SPECS[name].balance in ("load_importance", "noisy"):
            assert routing.balance.item() == 0.0
        if n == 0:
            assert routing.balance.item() == 0.0 and routing.experts_NK.shape[0] == 0


def test_load_importance_mixes_a_probability_with_a_logit():
    values, experts = logits(8, 4), 4
    scores, threshold = values.softmax(-1), values.sort(descending=True).values[:, 1]
    load = torch.special.ndtr((scores - threshold.unsqueeze(1)) * experts / 0.5).sum(0)
    parts = [v.var() / (v.mean() ** 2 + 1e-10) for v in (scores.sum(0), load)]
    torch.testing.assert_close(load_importance_loss(scores, threshold, 0.5), sum(parts) / 2)


def test_a_switch_without_seats_is_finite():
    spec = RouterSpec(gate="switch", capacity_factor=0.0, balance="switch", switch_eps=0.0)
    values = logits(5, 3).requires_grad_()
    routing, _ = route_tokens(values, spec, training=True)
    routing.balance.backward()
    assert int(routing.counts_E.sum()) == 0 and routing.balance.item() == 0.0 and not values.grad.abs().sum()


def test_the_students_rule_renormalises_what_was_kept():
    values = torch.tensor([[3.0, 2.0, 0.0], [3.0, 2.0, 1.0], [0.0, 3.0, 2.0]])
    routing = route(values, 2, slots=2)
    assert routing.kept_NK.tolist() == [[True, True], [True, False], [True, True]]
    torch.testing.assert_close(routing.weights_NK.sum(-1), torch.ones(3))
    assert float(routing.weights_NK[1, 0]) == 1.0 and int(routing.capacity) == 2


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"gate": "gshard"}, "gshard gate chooses 2 experts, not top_k=1"),
        ({"gate": "switch", "top_k": 2}, "switch gate chooses 1 expert, not top_k=2"),
        ({"gate": "avg_k"}, "set one_score to true"),
        ({"gate": "naive", "capacity_factor": 1.0}, "naive gate has no capacity"),
        ({"gate": "noisy", "capacity_factor": 1.0}, "noisy gate has no capacity"),
        ({"gate": "switch", "one_score": True}, "one_score=true has no meaning for the switch gate"),
        ({"one_score": True, "pre_score": True}, "pre_score=true has no effect with one_score=true"),
        ({"eval_capacity": True}, "eval_capacity=true needs a capacity_factor"),
        ({"capacity_factor": 1.0, "eval_capacity_factor": 2.0}, "used with eval_capacity=true only"),
        ({"alignment": 4}, "alignment=4 needs a capacity_factor"),
        ({"gate": "switch", "capacity_factor": -1.0}, "needs a capacity_factor of 0 or more"),
        ({"gate": "switch", "batch_prioritized": True}, "no batch_prioritized"),
        ({"gate": "naive", "noise": 1.0}, "noise=1.0 has no meaning for the naive gate"),
        ({"random_routing": True}, "random_routing has no meaning for the linear gate"),
        ({"gate": "cosine", "normalize_input": True}, "cosine gate has no normalize_input"),
        ({"balance": "load_importance"}, "noise above 0"),
        ({"gate": "naive", "balance": "load_importance"}, "linear, cosine or avg_k gate"),
        ({"balance": "switch"}, "switch loss belongs to the switch gate, not to linear"),
        ({"balance": "noisy"}, "noisy loss belongs to the noisy gate"),
        ({"capacity_factor": float("nan")}, "finite number"),
        ({"top_k": 0}, "greater than or equal to 1"),
        ({"gate": "hash"}, "'linear', 'cosine'"),
        ({"capacity": 1.0}, "Extra inputs"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_contradictory_specs_are_refused(fields, text):
    with pytest.raises(ValidationError, match=text):
        RouterSpec(**fields)
