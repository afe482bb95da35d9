"""Soft MoE and SpheroMoE layers: symmetries, derivatives, options, errors, records."""

import copy
import pickle

import pydantic
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.errors import RunFailed, SpecError
from moe.jetpack_specs import SoftMoESpec, SpheroSpec
from moe.layers.draws import Draws, dropout
from moe.layers.slot_experts import ExpertLayerNorm, ExpertMLP
from moe.layers.slot_product import mixing_product, slot_linear
from moe.layers.slots import unit
from moe.layers.soft_moe import SoftMoE
from moe.layers.sphero import SpheroMoE, temperature_schedule

RELEASED = {"slot_layernorm": True, "noise": True, "noise_mult": 0.1, "drop": 0.4, "drop_path": 0.3}


def sphero(dim=12, core=2, univ=3, **options):
    torch.manual_seed(0)
    return SpheroMoE(dim, SpheroSpec(core_experts=core, univ_experts=univ, **options))


def soft(dim=12, experts=3, **options):
    torch.manual_seed(0)
    return SoftMoE(dim, SoftMoESpec(num_experts=experts, **options))


@settings(max_examples=25, deadline=None)
@given(
    make=st.sampled_from([sphero, soft]),
    slots=st.integers(1, 3),
    norm=st.booleans(),
    tokens=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_tokens_may_be_permuted_and_samples_are_independent(make, slots, norm, tokens, seed):
    layer = make(slots_per_expert=slots, slot_layernorm=norm, noise=True).eval()
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, tokens, 12, generator=generator)
    perm = torch.randperm(tokens, generator=generator)
    y = layer(x)
    torch.testing.assert_close(layer(x[:, perm]), y[:, perm], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(x[2:3]), y[2:3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [sphero, soft])
def test_maps_of_any_height_and_width(make):
    layer = make().eval()
    x = torch.randn(2, 3, 5, 12)
    y = layer(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y.flatten(1, 2), layer(x.flatten(1, 2)))


@pytest.mark.parametrize(
    "options",
    [
        {"slot_layernorm": True},
        {"num_heads": 2, "slots_per_expert": 2, "query_proj": "affine", "key_proj": "linear", "slot_layernorm": True},
        {"input_as_phi": True},
        {"keys": "raw", "combine": "softmax", "temperatures": "one", "temperature_form": "softplus"},
    ],
)
def test_derivatives_of_first_and_second_order_in_float64(options):
    layer = sphero(dim=4, core=1, univ=2, univ_factor=0.5, **options).double()
    with torch.no_grad():
        for scale in layer.scales:
            scale.fill_(0.31)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    values = tuple(p.detach().clone().requires_grad_() for p in layer.parameters())
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(run, (x, *values))
    assert torch.autograd.gradgradcheck(run, (x, *values), atol=1e-4)


def test_soft_moe_derivatives_in_float64():
    layer = soft(dim=4, experts=2, slots_per_expert=2, slot_layernorm=True, layer_scale=True).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)


def test_the_fast_products_equal_the_plain_ones_to_every_order():
    x = torch.randn(3, 4, 5, requires_grad=True)
    w = torch.randn(3, 6, 5, requires_grad=True)
    b = torch.randn(3, 6, requires_grad=True)
    a, c = torch.randn(3, 5, 4, requires_grad=True), torch.randn(3, 5, 7, requires_grad=True)
    pairs = [
        (lambda: slot_linear(x, w, b), lambda: torch.einsum("emi,eoi->emo", x, w) + b[:, None], (x, w, b)),
        (lambda: mixing_product(a.mT, c), lambda: torch.bmm(a.mT, c), (a, c)),
    ]
    for ours, plain, leaves in pairs:
        results = []
        for function in (ours, plain):
            y = function()
            first = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
            results.append((y, *first, *second))
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_gradients_of_large_experts_arrive_in_the_layout_of_the_weights():
    layer = sphero(dim=256, core=4, univ=0)
    layer(torch.randn(2, 5, 256)).sum().backward()
    weight = layer.core_experts.vit_fc1.weight
    assert weight.grad.nbytes >= 4 << 20 and weight.grad.stride() == weight.stride()
    torch.testing.assert_close(
        torch.func.vmap(lambda x: slot_linear(x, weight.detach(), None))(torch.ones(2, 4, 1, 256))[0, :, 0],
        weight.detach().sum(-1),
        rtol=1e-4,
        atol=1e-4,
    )


def test_noise_is_drawn_in_training_only_unless_parity_asks_for_it():
    x = torch.randn(2, 6, 12)
    layer = sphero(noise=True, noise_mult=0.5)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    official = sphero(noise=True, noise_mult=0.5, noise_in_eval=True).eval()
    assert not torch.equal(official(x), official(x))
    noise = torch.randn(2, 6, 5, 1)
    assert torch.equal(official(x, Draws(noise)), official(x, Draws(noise)))
    before = sphero(noise=True, noise_mult=0.25, noise_in_eval=True, noise_position="before").eval()
    # Noise before the division by a temperature of 0.5 counts double.
    torch.testing.assert_close(before(x, Draws(noise)), official(x, Draws(noise)))


def test_all_released_options_train_and_repeat_under_a_seed():
    layer, x = sphero(**RELEASED), torch.randn(3, 6, 12)
    torch.manual_seed(5)
    y = layer(x)
    torch.manual_seed(5)
    assert torch.equal(layer(x), y)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_dropout_keeps_the_mean_and_the_share():
    torch.manual_seed(0)
    x = torch.ones(1000, 1001)
    y = dropout(x, 0.4, True)
    assert abs(float((y != 0).float().mean()) - 0.6) < 2e-3 and abs(float(y.mean()) - 1) < 4e-3
    assert torch.equal(dropout(x, 0.4, False), x) and torch.equal(dropout(x, 0.0, True), x)
    assert dropout(torch.ones(3), 1 - 1e-9, True).shape == (3,)


def test_a_dropped_sample_is_zero_and_the_others_are_scaled():
    layer, x = sphero(drop_path=0.5), torch.randn(2, 4, 12)
    y = layer(x, Draws(None, {"expert_drop": torch.tensor([0.0, 1.0])}))
    assert torch.equal(y[0], torch.zeros(4, 12))
    torch.testing.assert_close(y[1], 2 * layer.eval()(x)[1])


@pytest.mark.parametrize("scale", ["rescale", "renormalize"])
def test_dropped_experts(scale):
    layer = sphero(core=2, univ=0, expert_dropout=0.5, expert_dropout_scale=scale, temperature=50.0)
    x = torch.randn(1, 4, 12)
    keep = torch.tensor([[1.0, 0.0]])
    _, seen = layer.forward_with_record(x, Draws(None, {"experts": keep}))
    assert seen.dead_experts == (1,) and seen.contribution[1] == 0
    assert sum(seen.weight) == pytest.approx(1.0, abs=0.05)
    nothing = layer(x, Draws(None, {"experts": torch.zeros(1, 2)}))
    assert torch.equal(nothing, torch.zeros_like(nothing))


def test_masked_pairs_have_no_weight():
    layer = sphero(logit_dropout=0.5)
    mask = torch.zeros(1, 4, 5, 1)
    mask[:, :, 2] = 1
    _, seen = layer.forward_with_record(torch.randn(1, 4, 12), Draws(None, {"logit_drop": mask}))
    assert seen.weight[2] == 0 and seen.dead_experts == (2,)


def test_the_record_is_plain_numbers():
    layer = sphero(slots_per_expert=2, slot_layernorm=True).eval()
    x = torch.randn(3, 7, 12)
    y, seen = layer.forward_with_record(x)
    torch.testing.assert_close(y, layer(x))
    assert len(seen.contribution) == len(seen.weight) == 5
    assert sum(seen.weight) == pytest.approx(1, abs=1e-4)
    assert 1 <= seen.support_min <= seen.support <= seen.support_max <= 10
    assert 0 < seen.slot_entropy <= 1 and seen.temperatures == (0.5, 0.5)
    assert set(seen.group_contribution) == {"core", "univ"} and seen.to_dict()["support"] == seen.support
    out = layer.process(layer.merge(layer.route(x, Draws()).dispatch.mT @ x), Draws())
    added = layer.route(x, Draws()).combine[..., :2] @ out[:, :2]
    assert seen.contribution[0] == pytest.approx(float(added.detach().norm(dim=-1).mean()), rel=1e-4)


def test_a_cold_router_is_sparse():
    warm, cold = (sphero(core=8, univ=8, temperature=t).eval() for t in (0.5, 0.02))
    x = torch.randn(2, 9, 12)
    assert cold.forward_with_record(x)[1].support < warm.forward_with_record(x)[1].support


@pytest.mark.parametrize("form", ["free", "exp", "softplus"])
def test_temperatures_follow_a_schedule(form):
    layer = sphero(temperature_form=form, temperature=2.0, learn_temperature=False, temperature_floor=0.1)
    assert layer.temperature_values() == pytest.approx((2.0, 2.0))
    assert not any(scale.requires_grad for scale in layer.scales)
    values = [temperature_schedule(i, 10, 4.0, 0.25) for i in (0, 5, 10, 99)]
    assert values == pytest.approx([4.0, 1.0, 0.25, 0.25])
    layer.set_temperatures(values[1], 0.05)
    assert layer.temperature_values() == pytest.approx((1.0, 0.1))
    with pytest.raises(SpecError, match="cannot be set"):
        layer.set_temperatures(0.0)


def test_a_zero_token_has_a_gradient():
    x = torch.zeros(1, 3, 12, requires_grad=True)
    sphero()(x).sum().backward()
    assert x.grad.isfinite().all()
    zero = torch.zeros(2, 4, requires_grad=True)
    assert torch.equal(unit(zero), zero)
    norm = ExpertLayerNorm(2, 1)
    one = torch.ones(2, 3, 1, requires_grad=True)
    norm(one).sum().backward()
    assert one.grad.isfinite().all()


def test_autocast_keeps_the_router_in_float32():
    layer, x = sphero(slot_layernorm=True), torch.randn(2, 6, 12)
    seen = []
    hook = layer.slot_norm.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    hook.remove()
    assert y.dtype == torch.bfloat16 and seen == [torch.float32]
    y.float().sum().backward()
    assert layer.core_experts.vit_fc1.weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x), rtol=0.1, atol=0.02)
    low = sphero().bfloat16()
    assert low(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("make", [sphero, soft])
def test_copies_pickles_and_state_dicts(make):
    layer, x = make(slot_layernorm=True).eval(), torch.randn(2, 5, 12)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
    fresh = make(slot_layernorm=True)
    fresh.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(fresh.eval()(x), layer(x))


def test_compiled_layers_trace_in_one_graph_and_agree():
    layer, x = sphero(slot_layernorm=True).eval(), torch.randn(2, 5, 12, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    torch.testing.assert_close(y, layer(x))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(layer(x).sum(), x)[0], rtol=1e-4, atol=1e-5)


def test_starts_of_the_experts():
    linear, official = (ExpertMLP(64, 256, 3, init=init) for init in ("linear", "official"))
    assert 0.9 / 8 < linear.vit_fc1.weight.abs().max() <= 1 / 8
    assert 0.9 / 128 < official.vit_fc1.weight.abs().max() <= 1 / 128
    assert not official.vit_fc2.bias.any()
    phi = sphero(dim=12, core=3, univ=4).phi.flatten(1)
    torch.testing.assert_close(phi @ phi.t(), torch.eye(7), atol=1e-5, rtol=0)


def test_what_cannot_be_built_or_run():
    with pytest.raises(pydantic.ValidationError, match="at least one expert"):
        SpheroSpec(core_experts=0)
    with pytest.raises(SpecError, match="do not divide"):
        sphero(num_heads=5)
    with pytest.raises(SpecError, match="cannot be built"):
        sphero(dim=4, univ_factor=0.01)
    with pytest.raises(SpecError, match="gated ones"):
        ExpertMLP(4, 4, 2, glu=True, inner_layernorm=True)
    layer = sphero(noise=True)
    for shape in ((2, 12), (2, 4, 11), (2, 0, 12)):
        with pytest.raises(SpecError, match=r"Expected \[B, N, 12\]"):
            layer(torch.zeros(shape))
    with pytest.raises(SpecError, match="Injected noise"):
        layer(torch.zeros(2, 4, 12), Draws(torch.zeros(2, 4, 4, 1)))
    with pytest.raises(SpecError, match="2 experts of width 4"):
        ExpertMLP(4, 4, 2)(torch.zeros(1, 3, 1, 4))


@pytest.mark.parametrize("core, univ, tokens", [(1, 0, 1), (0, 1, 1), (1, 0, 5), (0, 3, 2)])
def test_one_expert_one_token_one_group(core, univ, tokens):
    layer, x = sphero(core=core, univ=univ), torch.randn(2, tokens, 12, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.isfinite().all()


def test_activations_that_are_not_finite_are_named():
    x = torch.randn(2, 4, 12)
    x[1, 2, 3] = float("inf")
    with pytest.raises(RunFailed, match=r"1 of 8 tokens .* first at \(1, 2\) \(input \(2, 4, 12\)"):
        sphero()(x)
    assert sphero()(torch.full((1, 2, 12), 3e38)).shape == (1, 2, 12)
