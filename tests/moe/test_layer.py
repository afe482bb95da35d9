"""The mixture layer: against a mixture written out by hand, its edges, its records, precision, copies, compilation."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from moe.errors import RunFailed, SpecError
from moe.layers.dispatch import combine, dispatch, read_counts
from moe.layers.kernels import expert_ffn
from moe.layers.layer import MoELayer, collect_balance, collect_records
from moe.layers.router import draw_noise, route_scores
from moe.router_spec import RouterSpec

D, H, E = 6, 5, 4
SPECS = {
    "linear": RouterSpec(top_k=2, balance="gshard"),
    "gmoe": RouterSpec(
        gate="cosine", noise=1.0, balance="load_importance", capacity_factor=1.0, batch_prioritized=True, projection=7
    ),
    "pre_score": RouterSpec(top_k=2, pre_score=True, capacity_factor=0.6),
    "emoe": RouterSpec(gate="avg_k", top_k=3, one_score=True, noise=1.0, balance="load_importance"),
    "naive": RouterSpec(gate="naive", top_k=2),
    "gshard": RouterSpec(gate="gshard", top_k=2, capacity_factor=0.6, random_routing=True, balance="gshard"),
    "switch": RouterSpec(gate="switch", capacity_factor=0.7, balance="switch"),
    "noisy": RouterSpec(gate="noisy", top_k=2, balance="noisy"),
}
NAMES = sorted(SPECS)


def layer(spec="linear", experts=E, dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    made = MoELayer(D, H, SPECS.get(spec, spec), experts, **options)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made.to(dtype)


def tokens(*shape, dtype=torch.float64, seed=5):
    return torch.randn(*(shape or (11,)), D, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_hand(made, x, routing):
    """The mixture, token by token and choice by choice."""
    ex, out = made.experts, torch.zeros_like(x)
    for t in range(len(x)):
        for j in range(routing.experts_NK.shape[1]):
            if not routing.kept_NK[t, j]:
                continue
            e, weight = int(routing.experts_NK[t, j]), routing.gates_NK[t, j]
            given_x = x[t] * weight if made.spec.pre_score else x[t]
            y = ex.w2[e] @ F.gelu(ex.w1[e] @ given_x + ex.b1[e]) + ex.b2[e]
            out[t] = out[t] + (y if made.spec.pre_score else weight * y)
    return out


@pytest.mark.parametrize("kernel", ["auto", "loop", "padded", "masked_dense"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_the_mixture_written_out(name, training, kernel):
    made, x = layer(name, kernel=kernel).train(training), tokens()
    y, record = made.forward_with_record(x, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(y, by_hand(made, x, record.routing))
    if not training:
        assert bool(record.routing.kept_NK.all())


@pytest.mark.parametrize("name", NAMES)
def test_leading_axes_are_flattened_in_order(name):
    made, x = layer(name).eval(), tokens(2, 3, 4)
    torch.testing.assert_close(made(x).reshape(-1, D), made(x.reshape(-1, D)))
    assert made(x).shape == x.shape and made(tokens()[0]).shape == (D,)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(NAMES), st.integers(1, 9), st.integers(0, 99), st.sampled_from(["auto", "grouped", "masked_dense"])
)
def test_without_capacity_a_token_does_not_see_its_neighbours(name, n, seed, kernel):
    dtype = torch.float32 if kernel == "grouped" else torch.float64
    made, x = layer(name, kernel=kernel, dtype=dtype).eval(), tokens(n, seed=seed, dtype=dtype)
    together = made(x)
    alone = torch.cat([made(row[None]) for row in x])
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(made(x[order]), together[order])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [0, 1, 2])
def test_few_tokens(name, n):
    made, x = layer(name), tokens(n).requires_grad_()
    y = made(x)
    (y.square().sum() + made.last.balance).backward()
    assert y.shape == (n, D) and bool(torch.isfinite(x.grad).all())
    assert all(torch.isfinite(p.grad).all() for p in made.experts.parameters())  # zeros, never missing


@pytest.mark.parametrize("name", ["linear", "gmoe", "emoe", "switch", "naive"])
def test_one_expert_is_a_feed_forward_network(name):
    spec = SPECS[name].model_copy(update={"top_k": 1})
    made, x = layer(spec, experts=1).train(), tokens().requires_grad_()
    y, ex = made(x), made.experts
    dense = F.linear(F.gelu(F.linear(x, ex.w1[0], ex.b1[0])), ex.w2[0], ex.b2[0])
    kept = made.last.routing.kept_NK
    torch.testing.assert_close(y, dense * kept)
    if spec.balance == "load_importance":
        assert made.last.balance.item() == 0.0
        made.last.balance.backward()


def test_all_tokens_to_one_expert():
    made, x = layer(RouterSpec(gate="naive")), tokens()
    with torch.no_grad():
        made.gate.weight.zero_()
        made.gate.bias.copy_(torch.tensor([0.0, 0.0, 9.0, 0.0]))
    made(x).sum().backward()
    assert made.last.routing.counts_E.tolist() == [0, 0, 11, 0]
    empty = [0, 1, 3]
    assert all(not p.grad[empty].any() and p.grad[2].any() for p in made.experts.parameters())


def test_capacity_drops_to_zero_in_training_and_in_official_evaluation_only():
    spec = RouterSpec(capacity_factor=0.5)
    made, x = layer(spec), tokens(8)
    with torch.no_grad():
        made.gate.weight.zero_()
    y = made.train()(x)
    assert made.last.routing.counts_E.tolist() == [1, 0, 0, 0] and int(made.last.routing.capacity) == 1
    assert not y[1:].any() and y[0].any()
    assert bool(made.eval()(x).any(dim=1).all())
    official = layer(spec.model_copy(update={"eval_capacity": True})).eval()
    official.load_state_dict(made.state_dict())
    assert not official(x)[1:].any()


def test_weighing_before_or_after_a_homogeneous_expert_is_the_same():
    after, before = (
        layer(RouterSpec(top_k=2, normalize_gates=False, pre_score=pre), activation="relu") for pre in (False, True)
    )
    for made in (after, before):
        nn.init.zeros_(made.experts.b1)
        nn.init.zeros_(made.experts.b2)
    torch.testing.assert_close(before(tokens()), after(tokens()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kernel", ["auto", "masked_dense"])
def test_second_derivatives(name, kernel):
    made, x = layer(name, experts=3, kernel=kernel).train(), tokens(4).requires_grad_()
    made.requires_grad_()
    noise = draw_noise(made.spec, torch.zeros(4, 3).double(), True, torch.Generator().manual_seed(0))
    names = [n for n, _ in made.named_parameters()]

    def function(x, *values):
        y, record = functional_call(made, dict(zip(names, values, strict=True)), (x, noise)), made.last
        return y, record.balance * 1.0

    values = [p.detach().clone().requires_grad_() for p in made.parameters()]
    assert torch.autograd.gradgradcheck(function, (x, *values), atol=1e-5, fast_mode=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kernel", ["auto", "masked_dense"])
@pytest.mark.parametrize("name", NAMES)
def test_activations_that_are_not_finite_are_refused(name, bad, kernel):
    made, x = layer(name, kernel=kernel), tokens()
    x[7, 2] = bad
    with pytest.raises(
        RunFailed, match=r"1 of 11 tokens .* not finite, first token 7 \(input \(11, 6\), torch.float64\)"
    ):
        made(x)
    with torch.no_grad():
        next(made.gate.parameters()).fill_(float("nan"))
    with pytest.raises(RunFailed, match=r"logits \(11, 4\) are not finite although its input \(11, 6\) is"):
        made(tokens())


def test_the_check_can_be_left_out():
    x = tokens()
    x[7, 2] = float("nan")
    y = layer(check_finite=False).eval()(x)
    assert bool(y[7].isnan().all()) and bool(torch.isfinite(y[:7]).all())


def test_bf16_overflow_is_reported_and_large_values_are_not():
    made = layer(dtype=torch.bfloat16)
    huge = torch.full((3, D), 3e38).to(torch.bfloat16)
    with pytest.raises(RunFailed, match="not finite"):
        made(huge * 4)
    assert made(tokens(dtype=torch.float32).to(torch.bfloat16) * 1e3).dtype == torch.bfloat16


@pytest.mark.parametrize("name", NAMES)
def test_the_gate_decides_in_float32_under_autocast(name):
    made, x = layer(name, dtype=torch.float32).eval(), tokens(dtype=torch.float32)
    _, plain = made.forward_with_record(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, record = made.forward_with_record(x)
    assert torch.equal(record.routing.experts_NK, plain.routing.experts_NK)
    assert torch.equal(record.scores_NE, plain.scores_NE) and record.scores_NE.dtype == torch.float32
    assert y.dtype == torch.float32 and record.balance.dtype == torch.float32


def test_names_of_the_state():
    assert list(layer("naive").state_dict()) == [
        *("gate.weight", "gate.bias"),
        *("experts.w1", "experts.b1", "experts.w2", "experts.b2"),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_pickles_leave_the_record_behind(name):
    made, x = layer(name), tokens()
    made(x)
    assert made.last.balance is not None
    buffer = io.BytesIO()
    torch.save(made, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), torch.load(buffer, weights_only=False)):
        assert other.last is None and made.last is not None
        assert torch.equal(other.eval()(x), made.eval()(x))


def test_records_and_losses_of_a_model_are_collected_in_order():
    model = nn.Sequential(
        layer("linear"), nn.LayerNorm(D).double(), nn.ModuleDict({"mlp": layer("gmoe", seed=1)})["mlp"]
    )
    assert collect_records(model) == {} and collect_balance(model) == []
    model(tokens())
    records = collect_records(model)
    assert list(records) == ["0", "2"] and records["2"] is model[2].last
    losses = collect_balance(model)
    assert len(losses) == 2 and losses[0] is model[0].last.balance
    sum(losses).backward()
    assert model[0].gate.weight.grad.any() and model[2].gate.sim_matrix.grad.any()


def test_forward_with_record_keeps_no_state():
    made = layer()
    y, record = made.forward_with_record(tokens())
    assert made.last is None and record.scores_NE.shape == (11, E) and torch.equal(made(tokens()), y)


def test_all_draws_come_from_the_generator():
    made, x = layer("gmoe", dropout=0.5).train(), tokens()

    def draw(seed):
        return made(x, generator=torch.Generator().manual_seed(seed))

    before = torch.random.get_rng_state()
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", ["linear", "gmoe", "pre_score"])
def test_dropout_does_not_depend_on_the_kernel(name):
    results = []
    for kernel in ("loop", "padded", "masked_dense"):
        made = layer(name, dropout=0.5, kernel=kernel).train()
        results.append(made(tokens(), generator=torch.Generator().manual_seed(4)))
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])
    assert not torch.allclose(results[0], layer(name).eval()(tokens()))


@pytest.mark.parametrize("kernel", ["loop", "masked_dense"])
def test_injected_dropout_is_read_by_expert_and_seat(kernel):
    made, x = layer("linear", dropout=0.25, kernel=kernel).eval(), tokens()
    keep = torch.ones(E, len(x), H, dtype=torch.float64)
    plain, ex = made(x), made.experts
    token, choice = 2, 1
    routing = route_scores(made.gate(x).softmax(-1), RouterSpec(top_k=2, capacity_factor=99.0), 99.0)
    expert, seat = int(routing.experts_NK[token, choice]), int(routing.seats_NK[token, choice])
    mask = keep * 0.75  # every factor becomes 1
    torch.testing.assert_close(made(x, dropout_mask=mask), plain)
    mask[expert, seat] = 0.0  # the choice is left with the expert's output bias
    y = made(x, dropout_mask=mask)
    hidden = F.gelu(ex.w1[expert] @ x[token] + ex.b1[expert])
    lost = routing.gates_NK[token, choice] * (ex.w2[expert] @ hidden)
    torch.testing.assert_close(y[token], plain[token] - lost)
    rest = torch.arange(len(x)) != token
    torch.testing.assert_close(y[rest], plain[rest])
    with pytest.raises(SpecError, match=r"\[4, 11, 3\].*H = 5"):
        made(x, dropout_mask=keep[:, :, :3])
    with pytest.raises(SpecError, match="1 seats per expert, but"):
        made(x, dropout_mask=keep[:, :1])


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(SpecError, match="top_k=5 is more than num_experts=4"):
        MoELayer(D, H, RouterSpec(top_k=5), 4)
    with pytest.raises(SpecError, match=r"width 6; got shape \(11, 5\)"):
        layer()(torch.zeros(11, 5))
    with pytest.raises(SpecError):
        MoELayer(D, 0, RouterSpec(), 4)
    with pytest.raises(SpecError, match="linear gate does not follow"):
        layer("linear").update_gate()


def test_the_avg_k_gate_follows_the_keys():
    made = layer("emoe")
    keys, old = made.experts.w1.detach().mean(1), made.gate.weight.detach().clone()
    made.update_gate(momentum=0.9)
    torch.testing.assert_close(made.gate.weight.detach(), 0.9 * old + 0.1 * keys)
    made.update_gate()
    torch.testing.assert_close(made.gate.weight.detach(), keys)
    made.update_gate(normalize=True, value_norm_weighted=True)
    torch.testing.assert_close(made.gate.weight.detach().norm(dim=1), torch.ones(E).double())
    assert not MoELayer(D, H, SPECS["emoe"], E).gate.weight.requires_grad


@pytest.mark.parametrize("factor", [None, 0.4])
@pytest.mark.parametrize("k", [1, 2])
def test_counts_may_stay_on_the_device(factor, k):
    """Dropped choices then travel behind the groups: the same mixture without any size that depends on data."""
    made, x = layer(dtype=torch.float32), tokens(dtype=torch.float32)
    routing = route_scores(made.gate(x).softmax(-1), RouterSpec(top_k=k, capacity_factor=factor), factor)
    weights, results = [made.experts.get_parameter(n) for n in ("w1", "b1", "w2", "b2")], []
    for counts in (routing.counts_E, read_counts(routing.counts_E)[0]):
        sent = dispatch(x, routing, counts)
        y = expert_ffn(sent.tokens_MD, sent.counts, *weights, kernel="grouped")
        results.append((combine(y, sent, routing.weights_NK), combine(y, sent, None)))
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0][1], combine(y, sent, routing.kept_NK.float()))
    assert len(dispatch(x, routing, routing.counts_E).tokens_MD) == 11 * k


@pytest.mark.parametrize(
    "name, backend",
    [("gmoe", "eager"), *(pytest.param(name, "inductor", marks=pytest.mark.slow) for name in NAMES)],
)
def test_compiled_layers_give_the_same_numbers(name, backend):
    made, other = layer(name), layer(name)
    compiled = torch.compile(other, backend=backend)
    for n in (7, 12):
        x, noise = tokens(n).requires_grad_(), draw_noise(made.spec, torch.zeros(n, E).double(), True)
        results = []
        for module, source in ((made, made), (compiled, other)):
            y = module(x, noise)
            results.append((y, source.last.balance, *torch.autograd.grad(y.square().sum(), [x, source.experts.w1])))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def test_the_masked_way_compiles_in_one_piece():
    made, x = layer("gmoe", kernel="masked_dense", check_finite=False).eval(), tokens()
    compiled = torch.compile(made, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), made(x))
