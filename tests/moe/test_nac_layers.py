"""Layers of the neural attentive circuit: modulated layers, kernel, attention, read-in, tokenizer, draws."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.errors import SpecError
from moe.models.nac.attention import LatentAttention, Nodes
from moe.models.nac.circuit import build_circuit
from moe.models.nac.draws import Draws, code_noise, path_drop
from moe.models.nac.graph_specs import AttentionOptions, KernelSpec, ModFCSpec
from moe.models.nac.kernel import DotProductKernel
from moe.models.nac.modfc import ModLinear
from moe.models.nac.pooling import OutputLatentPooling
from moe.models.nac.read_in import ReadInAttention, folded_attention
from moe.models.nac.specs import GridSpec, PoolingSpec, TokenizerSpec
from moe.models.nac.tokenizer import Tokenizer, token_shape
from tests.moe.test_nac import KERNEL, MOD, generator, images, spec_of


def tokens_one_by_one(key, value, q_BUHD, x_BVN, codes):
    """Attention with the projection of every token by every latent."""
    heads, width = q_BUHD.shape[2:]
    every = x_BVN.unsqueeze(2).expand(-1, -1, q_BUHD.shape[1], -1)
    k, v = (layer(every, codes).unflatten(-1, (heads, width)) for layer in (key, value))
    weights = (torch.einsum("buhd,bvuhd->buhv", q_BUHD, k) / math.sqrt(width)).softmax(-1)
    return torch.einsum("buhv,bvuhd->buhd", weights, v).flatten(2)


def folding_case(spec, bias, batch=2, latents=3, tokens=5, width=7, heads=2, dtype=torch.float32):
    torch.manual_seed(0)
    key, value = (ModLinear(width, heads * 4, 6, spec, bias).to(dtype) for _ in range(2))
    for layer in (key, value):
        if bias:
            torch.nn.init.normal_(layer.native_bias)
    q = torch.randn(batch, latents, heads, 4, dtype=dtype, requires_grad=True)
    x = torch.randn(batch, tokens, width, dtype=dtype, requires_grad=True)
    codes = torch.randn(latents, 6, dtype=dtype, requires_grad=True)
    return key, value, q, x, codes


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", ["none", "ln", "l2"])
@pytest.mark.parametrize("kind", ["ModFC", "FC", "WModFC"])
def test_folded_read_in_equals_projecting_every_token(kind, norm, bias):
    spec = ModFCSpec(kind=kind, scale_times_input_normalization_type=norm, **(MOD | {"scale_gain": 0.7}))
    case = folding_case(spec, bias)
    ours, theirs = folded_attention(*case), tokens_one_by_one(*case)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    wanted = [*case[2:], *case[0].parameters(), *case[1].parameters()]
    cotangent = torch.randn_like(ours)
    grads = [torch.autograd.grad((y * cotangent).sum(), wanted, allow_unused=True) for y in (ours, theirs)]
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    latents=st.integers(1, 5),
    tokens=st.integers(1, 6),
    width=st.integers(2, 9),
    heads=st.integers(1, 3),
)
def test_folded_read_in_at_any_size(batch, latents, tokens, width, heads):
    case = folding_case(ModFCSpec(**MOD), True, batch, latents, tokens, width, heads, torch.float64)
    torch.testing.assert_close(folded_attention(*case), tokens_one_by_one(*case))


def test_one_code_serves_all_latents():
    key, value, q, x, codes = folding_case(ModFCSpec(**MOD), False)
    torch.testing.assert_close(
        folded_attention(key, value, q, x, codes[:1]),
        folded_attention(key, value, q, x, codes[:1].expand(3, -1)),
    )


def attention_case(training, truncation=0.9, dtype=torch.float64, **options):
    torch.manual_seed(1)
    own = AttentionOptions(kernel_kwargs=KernelSpec(**(KERNEL | {"truncation": truncation})), **options)
    layer = LatentAttention(6, 4, 2, 3, own, mod=ModFCSpec(**MOD), layer_scale=0.5, path_drop_prob=0.3)
    layer = layer.to(dtype).train(training)
    sides = [
        Nodes(torch.randn(2, n, 6, dtype=dtype), torch.randn(n, 4, dtype=dtype), torch.randn(n, 3, dtype=dtype))
        for n in (3, 5)
    ]
    return layer, sides


@pytest.mark.parametrize("training", [False, True])
def test_attention_has_right_first_and_second_gradients(training):
    layer, (to, sent) = attention_case(training)
    to, sent = (Nodes(x.states[:1, :2], x.codes[:2], x.signatures[:2]) for x in (to, sent))
    draws = {"kernel": torch.rand(1, 2, 2, generator=generator()), "path_drop": torch.full((1, 1, 1), 0.5)}
    leaves = [x.requires_grad_() for x in (to.states, sent.states, to.codes, to.signatures)]

    def forward(states, senders, codes, signatures):
        return layer(Nodes(states, codes, signatures), sent._replace(states=senders), Draws(draws))

    assert torch.autograd.gradcheck(forward, leaves, atol=1e-5, fast_mode=True)
    assert torch.autograd.gradgradcheck(forward, leaves, atol=1e-4, fast_mode=True)


def test_read_in_has_right_second_gradients():
    layer = ReadInAttention(5, 6, 4, 2, 3, mod=ModFCSpec(**MOD), qkv_bias=True).double()
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((1, 2, 6), (2, 4), (1, 3, 5))]
    assert torch.autograd.gradgradcheck(layer, leaves, atol=1e-4, fast_mode=True)


@pytest.mark.parametrize(
    "options", [{}, {"mask_attn_scores_with_affinities": False, "scale_attn_with_affinities": True}]
)
def test_receiver_without_open_edge_hears_nothing(options):
    layer, (to, sent) = attention_case(False, truncation=0.2, **options)
    away = sent._replace(signatures=-to.signatures[:1].expand(5, -1))
    alone = to._replace(signatures=to.signatures[:1].expand(3, -1).clone().requires_grad_())
    y = layer(alone, away)
    assert torch.isfinite(y).all()
    y.sum().backward()
    assert torch.isfinite(alone.signatures.grad).all()
    layer.zero_grad()
    silent = layer(alone, away._replace(states=away.states + 1))
    torch.testing.assert_close(silent, y)


def test_sampled_edges_follow_their_probabilities():
    kernel = DotProductKernel(KernelSpec(stochastic_kernel=True, stochastic_sampling_temperature=0.1)).train()
    one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]])
    p = math.exp(-0.4)
    edges = kernel.log(one, other, 4000, Draws(generator=generator())).exp()
    assert ((edges > 0.5).float().mean() - p).abs() < 0.03
    assert edges.max() < 1 and torch.isfinite(edges.log()).all()


@pytest.mark.parametrize("implementation", ["direct", "masked"])
def test_cut_edges_are_closed_in_both_forms(implementation):
    kernel = DotProductKernel(KernelSpec(truncation=0.9, truncation_implementation=implementation))
    signatures = torch.eye(3, requires_grad=True)
    torch.testing.assert_close(kernel(signatures, signatures), torch.eye(3))
    (gradient,) = torch.autograd.grad(kernel(signatures, signatures)[0, 1], signatures)
    assert bool(gradient.any()) == (implementation == "masked")
    assert torch.equal(kernel.log(signatures, signatures) == -math.inf, ~torch.eye(3, dtype=torch.bool))


def test_code_noise_is_relative_bounded_and_constant():
    codes = torch.tensor([[2.0, -4.0, 0.0]], requires_grad=True)
    noisy = code_noise(codes, 0.1, "code", Draws(generator=generator()))
    assert ((noisy - codes).abs() <= 0.1 * codes.abs()).all() and noisy[0, 2] == 0 and noisy[0, 0] != 2
    (gradient,) = torch.autograd.grad(noisy.sum(), codes)
    assert torch.equal(gradient, torch.ones_like(codes))


def test_path_drop_keeps_the_mean_and_drops_whole_samples():
    old, residual = torch.zeros(4000, 2, 3), torch.ones(4000, 2, 3)
    y = path_drop(old, residual, 0.25, True, "path_drop", Draws(generator=generator()))
    assert (y == y[:, :1, :1]).all() and y.unique().tolist() == pytest.approx([0, 4 / 3])
    assert abs(float(y.mean()) - 1) < 0.03
    assert torch.equal(path_drop(old, residual, 0.25, False, "path_drop", Draws({})), residual)


def test_draws_say_what_is_missing_or_misshapen():
    like = torch.zeros(1)
    with pytest.raises(SpecError, match=r"lack 'prop0\.kernel'.*Did you mean 'prop1\.kernel'"):
        Draws({"prop1.kernel": like}).at(kernel="prop0.kernel").uniform("kernel", (1,), like)
    with pytest.raises(SpecError, match=r"\(1,\), needed is \(2, 3\)"):
        Draws({"code": like}).normal("code", (2, 3), like)
    e = Draws(generator=generator()).exponential("e", (5000,), like)
    assert e.min() > 0 and abs(float(e.mean()) - 1) < 0.05


def test_hard_gumbel_pooling_takes_one_state_and_trains_all():
    pooling = OutputLatentPooling(3, 2, PoolingSpec(softmax_type="gumbel-hard"))
    states = torch.randn(4, 5, 3, requires_grad=True)
    weights = pooling.weights(states, Draws(generator=generator()))
    assert torch.equal(weights.detach().sort(-1).values[:, -1], torch.ones(4)) and (weights > 0.5).sum() == 4
    (gradient,) = torch.autograd.grad((weights * torch.randn(4, 5)).sum(), pooling.confidence_scorer.weight)
    assert gradient.any()


def test_tokenizer_grid_and_errors():
    spec = TokenizerSpec(capacity_preset="nano", num_stages=2, positional_grid_kwargs=GridSpec(dim=3, grid_size=(2, 2)))
    tokenizer = Tokenizer(3, 16, spec)
    assert tokenizer.out_features == 11 and token_shape(19, spec) == (2, 2)
    assert torch.equal(tokenizer(images(side=19)), tokenizer(images(side=19)[..., :16, :16]))
    assert tokenizer(images(side=32)).shape == (2, 16, 11)
    with pytest.raises(SpecError, match=r"at least 8 pixels.*\(2, 3, 4, 4\)"):
        tokenizer(images(side=4))
    with pytest.raises(SpecError, match=r"\[B, 3, h, w\]"):
        tokenizer(torch.zeros(1, 1, 16, 16))
    with pytest.raises(SpecError, match="multiple of 4, got 10"):
        Tokenizer(3, 10, spec)
    assert TokenizerSpec(capacity_preset="tiny", num_stages=3).blocks == (3, 3, 9)
    with pytest.raises(ValueError, match="does not name the blocks"):
        TokenizerSpec(num_stages=2, depths=(1,))


def test_wrong_widths_are_named():
    layer = ModLinear(3, 2, 4, ModFCSpec())
    with pytest.raises(SpecError, match=r"width 3 got states of \(1, 2, 5\)"):
        layer(torch.zeros(1, 2, 5), torch.zeros(2, 4))
    with pytest.raises(SpecError, match=r"\(2, 3\) cannot modulate.*width 4"):
        layer(torch.zeros(1, 2, 3), torch.zeros(2, 3))
    attention, (to, sent) = attention_case(False)
    with pytest.raises(SpecError, match="without signatures"):
        attention(to._replace(signatures=None), sent)
    with pytest.raises(SpecError, match="do not compare"):
        attention(to._replace(signatures=torch.zeros(3, 9)), sent)
    with pytest.raises(SpecError, match="wants tokens of width 5"):
        ReadInAttention(5, 6, 4, 2, 3, mod=ModFCSpec())(torch.zeros(1, 2, 6), torch.zeros(2, 4), torch.zeros(1, 3, 4))
    with pytest.raises(SpecError, match="4 tokens for 3 latents"):
        build_circuit(spec_of(read_in_type="ProjectionReadIn", num_input_latents=3))(images())
