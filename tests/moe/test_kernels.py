"""The kernel seam: five kernels, one result, in value and in first and second gradient; edge sizes; bad input."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call

from moe.errors import CheckpointError, SpecError
from moe.layers import gemm
from moe.layers.activation import ACTIVATIONS, activate, check_activation
from moe.layers.experts import Experts, LocalExperts, numbered_state, stacked_state
from moe.layers.kernel_choice import choose_rows, describe_choice, prefers_masked, use_kernel
from moe.layers.kernels import expert_ffn, masked_ffn

ROWS = ("loop", "grouped", "padded", "baddbmm")
WIDE = ("loop", "padded", "baddbmm")  # grouped products do not know float64


def weights(experts=3, width=8, hidden=12, out=None, dtype=torch.float32, biases=(True, True), seed=0):
    g = torch.Generator().manual_seed(seed)
    out = out or width
    shapes = [(experts, hidden, width), (experts, hidden), (experts, out, hidden), (experts, out)]
    w1, b1, w2, b2 = (torch.randn(s, generator=g, dtype=torch.float64).mul(0.5).to(dtype) for s in shapes)
    parts = [w1, b1 if biases[0] else None, w2, b2 if biases[1] else None]
    return [None if t is None else t.requires_grad_() for t in parts]


def rows(count, width=8, dtype=torch.float32, seed=1):
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(dtype).requires_grad_()


def reference(x, counts, w1, b1, w2, b2, activation="gelu", mask=None, first=False):
    """The textbook: one expert after the other in plain PyTorch."""
    groups, start = [], 0
    for e, n in enumerate(counts):
        h = F.linear(x[start : start + n], w1[e], None if b1 is None else b1[e])
        m = 1 if mask is None else mask[start : start + n]
        a = activate(h * m, activation) if first else activate(h, activation) * m
        groups.append(F.linear(a, w2[e], None if b2 is None else b2[e]))
        start += n
    return torch.cat(groups)


def gradients(y, inputs, order=1):
    """First gradients, and with order 2 those of their squared sum, of a loss with curvature."""
    inputs = [t for t in inputs if t is not None]
    loss = y.square().sum() + y.sum()
    first = torch.autograd.grad(loss, inputs, create_graph=order == 2)
    if order == 1:
        return list(first)
    return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), inputs, materialize_grads=True)]


def largest(t):
    return max([1.0, *t.detach().abs().flatten().tolist()])


CASES = {
    "plain": {},
    "no biases, other width out": {"biases": (False, False), "out": 5},
    "first bias only": {"biases": (True, False)},
    "odd widths": {"width": 9, "hidden": 7, "out": 3},
    "one unit": {"width": 1, "hidden": 1},
}
COUNTS = [[4, 0, 3], [0, 0, 7], [1, 1, 1], [0, 0, 0], [5, 2, 0]]


@pytest.mark.parametrize("kernel", ROWS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_every_kernel_gives_the_textbook_result(kernel, case, counts):
    options = CASES[case]
    parts, x = weights(**options), rows(sum(counts), options.get("width", 8))
    expected = reference(x, counts, *parts)
    y = expert_ffn(x, counts, *parts, kernel=kernel)
    torch.testing.assert_close(y, expected)
    order = 2 if sum(counts) else 1
    for a, b in zip(gradients(y, [x, *parts], order), gradients(expected, [x, *parts], order), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * largest(b))


@pytest.mark.parametrize("kernel", WIDE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_against_finite_differences(kernel, activation):
    counts = [2, 0, 1]
    parts, x = weights(width=3, hidden=2, out=2, dtype=torch.float64), rows(3, 3, torch.float64)

    def function(x, *values):
        return expert_ffn(x, counts, *values, activation, kernel=kernel)

    assert torch.autograd.gradcheck(function, (x, *parts))
    assert torch.autograd.gradgradcheck(function, (x, *parts))


@pytest.mark.parametrize("kernel", ROWS)
@pytest.mark.parametrize("first", [False, True])
def test_dropout_factors_act_where_they_are_told(kernel, first):
    counts = [3, 0, 2]
    parts, x = weights(), rows(5)
    mask = torch.empty(5, 12).bernoulli_(0.5, generator=torch.Generator().manual_seed(3)) * 2
    for activation in ACTIVATIONS:
        y = expert_ffn(x, counts, *parts, activation, kernel=kernel, dropout_mask=mask, dropout_first=first)
        expected = reference(x, counts, *parts, activation, mask, first)
        torch.testing.assert_close(y, expected)
        with torch.no_grad():
            again = expert_ffn(x, counts, *parts, activation, kernel=kernel, dropout_mask=mask, dropout_first=first)
        torch.testing.assert_close(again, expected)
        for a, b in zip(gradients(y, [x, *parts]), gradients(expected, [x, *parts]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 6), min_size=1, max_size=6),
    width=st.integers(1, 11),
    hidden=st.integers(1, 9),
    behind=st.integers(0, 3),
    kernel=st.sampled_from(ROWS),
    activation=st.sampled_from(ACTIVATIONS),
    tensor=st.booleans(),
)
def test_any_sizes(counts, width, hidden, behind, kernel, activation, tensor):
    parts, x = weights(len(counts), width, hidden), rows(sum(counts) + behind, width)
    given_counts = torch.tensor(counts) if tensor else counts
    y = expert_ffn(x, given_counts, *parts, activation, kernel=kernel)
    expected = torch.cat([reference(x, counts, *parts, activation), x.new_zeros(behind, width)])
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert not y[sum(counts) :].any()
    for a, b in zip(gradients(y, [x, *parts]), gradients(expected, [x, *parts]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kernel", ROWS)
def test_rows_do_not_feel_their_neighbours(kernel):
    parts, x = weights(), rows(7).detach()
    with torch.no_grad():
        together = expert_ffn(x, [3, 1, 3], *parts, kernel=kernel)
        alone = torch.cat([expert_ffn(x[i : i + 1], [int(e == n) for n in range(3)], *parts, kernel=kernel)
                           for i, e in enumerate([0, 0, 0, 1, 2, 2, 2])])  # fmt: skip
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("kernel", ROWS)
def test_frozen_weights_get_no_gradient_and_cost_none(kernel):
    parts, x = weights(), rows(5)
    for t in parts:
        t.requires_grad_(False)
    y = expert_ffn(x, [2, 0, 3], *parts, kernel=kernel)
    ours, theirs = gradients(y, [x])[0], gradients(reference(x, [2, 0, 3], *parts), [x])[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * largest(theirs))  # sums in another order
    x.requires_grad_(False)
    assert not expert_ffn(x, [2, 0, 3], *parts, kernel=kernel).requires_grad
    parts[3].requires_grad_()
    (db2,) = torch.autograd.grad(expert_ffn(x, [2, 0, 3], *parts, kernel=kernel).sum(), [parts[3]])
    torch.testing.assert_close(db2, torch.tensor([2.0, 0.0, 3.0]).unsqueeze(1).expand(3, 8))


@pytest.mark.parametrize("kernel", ROWS)
def test_bfloat16_and_autocast(kernel):
    counts, parts, x = [4, 0, 3], weights(), rows(7)
    exact = reference(x, counts, *parts)
    low = [t.detach().bfloat16().requires_grad_() for t in parts]
    y = expert_ffn(x.detach().bfloat16(), counts, *low, kernel=kernel)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=0.1, atol=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = expert_ffn(x, counts, *parts, kernel=kernel)
    assert cast.dtype == torch.bfloat16
    for gradient, plain in zip(gradients(cast.float(), [x, *parts]), gradients(exact, [x, *parts]), strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, plain, rtol=0.2, atol=0.05 * largest(plain))


@pytest.mark.parametrize("kernel", ROWS)
def test_overflow_in_bfloat16_is_seen_in_its_row_alone(kernel):
    parts = [t.detach().bfloat16() for t in weights()]
    x = rows(4).detach().bfloat16()
    x[1] = 3e38
    y = expert_ffn(x, [2, 1, 1], *parts, kernel=kernel)
    assert not torch.isfinite(y[1]).all() and torch.isfinite(y[[0, 2, 3]]).all()


@pytest.mark.parametrize("kernel", ROWS)
def test_expanded_and_strided_tensors(kernel):
    """Gradients with stride 0, transposed weights, rows that are views."""
    w1, b1, w2, b2 = weights()
    wide = rows(6, 16)
    x = wide[:, 4:12]
    turned = w1.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    y = expert_ffn(x, [2, 3, 1], turned, b1, w2, b2, kernel=kernel)
    expected = reference(x, [2, 3, 1], w1, b1, w2, b2)
    torch.testing.assert_close(y, expected)
    ours = torch.autograd.grad(y.sum(), [wide, turned, w2])
    theirs = torch.autograd.grad(expected.sum(), [wide, w1, w2])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def routed(tokens=6, experts=5, k=2, seed=4):
    g = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=g)
    top, chosen = scores.topk(k)
    return chosen, top


def by_choice(x, chosen, factors, parts, activation="gelu", mask=None, first=False):
    """Every token through its experts, one choice after the other."""
    out = []
    for t in range(len(x)):
        y = x.new_zeros(parts[2].shape[1])
        for j, e in enumerate(chosen[t].tolist()):
            one = [None if w is None else w[e : e + 1] for w in parts]
            m = None if mask is None else mask[t, j : j + 1]
            y = y + factors[t, j] * reference(x[t : t + 1], [1], *one, activation, m, first)[0]
        out.append(y)
    return torch.stack(out)


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("biases", [(True, True), (False, False)])
def test_masked_dense_is_the_sum_over_choices(k, biases):
    parts, x = weights(5, biases=biases), rows(6)
    chosen, factors = routed(k=k)
    factors = torch.where(factors < 0.2, 0, factors).requires_grad_()  # some dropped
    y = masked_ffn(x, chosen, factors, *parts)
    expected = by_choice(x, chosen, factors, parts)
    torch.testing.assert_close(y, expected)
    for a, b in zip(gradients(y, [x, factors, *parts], 2), gradients(expected, [x, factors, *parts], 2), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * largest(b))


@pytest.mark.parametrize("first", [False, True])
def test_masked_dense_with_dropout(first):
    parts, x = weights(5), rows(6)
    chosen, factors = routed()
    mask = torch.empty(6, 2, 12).bernoulli_(0.5, generator=torch.Generator().manual_seed(3)) * 2
    y = masked_ffn(x, chosen, factors, *parts, dropout_mask=mask, dropout_first=first)
    torch.testing.assert_close(y, by_choice(x, chosen, factors, parts, mask=mask, first=first))


def test_masked_dense_ignores_overflow_in_experts_that_were_not_chosen():
    parts = [t.detach() for t in weights(2)]
    parts[0][1] = 3e38
    x = rows(3).detach()
    y = masked_ffn(x, torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1), *parts, "relu")
    torch.testing.assert_close(y, reference(x, [3, 0], *parts, "relu"))


def test_masked_dense_of_all_experts_is_the_dense_network():
    w1, b1, w2, _ = weights(4, dtype=torch.float64)
    x = rows(5, dtype=torch.float64)
    everyone = torch.arange(4).expand(5, 4)
    y = masked_ffn(x, everyone, torch.ones(5, 4, dtype=torch.float64), w1, b1, w2, None)
    dense = F.gelu(F.linear(x, w1.flatten(0, 1), b1.flatten())) @ w2.transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(y, dense)


def test_masked_dense_second_order_against_finite_differences():
    parts, x = weights(3, 3, 2, 2, torch.float64), rows(2, 3, torch.float64)
    chosen, factors = routed(2, 3, 2)
    factors = factors.double().requires_grad_()

    def function(x, factors, *values):
        return masked_ffn(x, chosen, factors, *values)

    assert torch.autograd.gradgradcheck(function, (x, factors, *parts))


@pytest.mark.parametrize("kernel", ROWS)
def test_experts_module_is_clean_under_functional_call_copy_and_pickle(kernel):
    torch.manual_seed(0)
    module, x = Experts(3, 8, 12, kernel=kernel), rows(6)
    counts = [1, 3, 2]
    y = module(x, counts)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(module)))
    assert torch.equal(twin(x, counts), y)
    doubled = {name: p.detach() * 2 for name, p in module.named_parameters()}
    changed = functional_call(module, doubled, (x, counts))
    torch.testing.assert_close(changed, reference(x, counts, *doubled.values()))
    assert torch.equal(module(x, counts), y)
    assert list(module.state_dict()) == ["w1", "b1", "w2", "b2"]
    bound = 8**-0.5
    assert float(module.w1.detach().abs().max()) <= bound and float(module.w1[0].detach().std()) > bound / 3
    assert not torch.equal(module.w1[0], module.w1[1])


def test_functional_gradient_transform():
    module = Experts(2, 4, 6, kernel="loop")
    state = {name: p.detach() for name, p in module.named_parameters()}
    x = rows(5, 4).detach()

    def loss(values):
        return functional_call(module, values, (x, [2, 3])).square().sum()

    found = torch.func.grad(loss)(state)
    expected = torch.autograd.grad(module(x, [2, 3]).square().sum(), list(module.parameters()))
    for a, b in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_dropout_draws_come_from_the_generator_and_only_in_training():
    module, x = Experts(2, 8, 64, dropout=0.5), rows(6).detach()
    draws = [module(x, [2, 4], generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    mask = module.draw_mask(1000, x)
    assert set(mask.unique().tolist()) == {0.0, 2.0} and abs(float(mask.mean()) - 1) < 0.05
    module.eval()
    assert torch.equal(module(x, [2, 4]), module(x, [2, 4])) and module.draw_mask(3, x) is None


def test_masked_and_grouped_ways_of_the_module_agree_under_dropout():
    """One draw in token order, given to both ways."""
    module, x = Experts(5, 8, 12, dropout=0.5), rows(6)
    chosen, factors = routed()
    mask = module.draw_mask(12, x, torch.Generator().manual_seed(0))
    one = module.masked(x, chosen, factors, mask.view(6, 2, 12))
    order = chosen.flatten().sort(stable=True).indices
    y = module(x[order // 2], torch.bincount(chosen.flatten(), minlength=5).tolist(), mask[order])
    two = torch.zeros(6, 8).index_add(0, order // 2, y * factors.flatten()[order, None])
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("kernel", ROWS)
def test_second_gradient_that_reaches_one_expert_only(kernel):
    """Rows and weights of the other experts get zeros, whatever memory held before."""
    parts, x = weights(), rows(6)
    results = []
    for y in (expert_ffn(x, [2, 1, 3], *parts, kernel=kernel), reference(x, [2, 1, 3], *parts)):
        (dw1,) = torch.autograd.grad(y.square().sum(), parts[:1], create_graph=True)
        results.append(torch.autograd.grad(dw1[1].square().sum(), [x, *parts], materialize_grads=True))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * largest(b))
    assert not results[0][0][:2].any() and not results[0][0][3:].any()


def test_compiled_layer_gives_the_same():
    module, x = Experts(2, 8, 8, kernel="loop"), rows(5)
    compiled = torch.compile(lambda x: module(x, [2, 3]), backend="aot_eager", fullgraph=True)
    y, expected = compiled(x), module(x, [2, 3])
    torch.testing.assert_close(y, expected)
    for a, b in zip(
        gradients(y, [x, *module.parameters()]), gradients(expected, [x, *module.parameters()]), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_compiled_grouped_kernel_reads_no_counts_on_the_host():
    # The compiler's model of grouped_mm knows bfloat16 only.
    module, x = Experts(2, 8, 8, kernel="grouped").bfloat16(), rows(5, dtype=torch.bfloat16)
    compiled = torch.compile(lambda x, counts: module(x, counts), backend="aot_eager", fullgraph=True)
    for counts in ([2, 3], [5, 0]):
        torch.testing.assert_close(compiled(x, torch.tensor(counts)), module(x, counts))


@pytest.mark.skipif(not gemm.onednn_available(), reason="this build of PyTorch has no oneDNN")
def test_onednn_products_equal_plain_ones():
    a, b = rows(7, 5), rows(5, 3)
    assert gemm.uses_onednn(a)
    for left, right in ((a, b), (a.t().contiguous().t(), b.t().contiguous().t()), (a[::2], b), (a[:1].expand(4, 5), b)):
        torch.testing.assert_close(gemm.product(left.detach(), right.detach()), left.detach() @ right.detach())
    assert torch.autograd.gradgradcheck(gemm.matmul, (rows(2, 3, torch.float64), rows(3, 2, torch.float64)))
    ours, theirs = gemm.matmul(a, b), a @ b
    for x, y in zip(gradients(ours, [a, b], 2), gradients(theirs, [a, b], 2), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    for name in ACTIVATIONS:
        w, bias = rows(3, 5, seed=8).detach(), rows(1, 3, seed=9).detach()[0]
        torch.testing.assert_close(
            gemm.affine(a.detach(), w, bias, name), activate(F.linear(a.detach(), w, bias), name)
        )
    with torch.backends.mkldnn.flags(enabled=False):
        assert not gemm.uses_onednn(a)
        torch.testing.assert_close(gemm.product(a.detach(), b.detach()), ours.detach())


def test_choice_is_a_rule_that_can_be_forced():
    assert choose_rows("cuda", torch.bfloat16, 8, 4096, 512, 2048).kernel == "grouped"
    assert choose_rows("cuda", torch.float64, 8, 4096, 512, 2048).kernel == "padded"
    assert choose_rows("cpu", torch.float32, 6, 1576, 384, 1536).kernel == "loop"
    assert choose_rows("cpu", torch.float32, 196, 1576, 192, 192).kernel == "padded"
    assert choose_rows("cpu", torch.float32, 196, 1576, 192, 192, largest=100).kernel == "grouped"
    assert choose_rows("cpu", torch.float64, 196, 1576, 192, 192, largest=100).kernel == "padded"
    assert not prefers_masked("cpu", torch.float32, 24, 4, 1576, 384, 64)
    assert prefers_masked("cpu", torch.float32, 64, 32, 1024, 768, 48)
    assert prefers_masked("cpu", torch.float32, 64, 64, 1024, 768, 48)
    for tokens in (1, 4, 197, 1576):
        assert not prefers_masked("cpu", torch.float32, 6, 2, tokens, 384, 1536)
    assert prefers_masked("cuda", torch.float32, 24, 16, 1576, 384, 64)
    assert not prefers_masked("cuda", torch.float32, 24, 4, 1576, 384, 64)
    module = Experts(24, 384, 64)
    x = torch.zeros(1576, 384)
    assert not module.wants_masked(x, 4)
    with use_kernel("padded"):
        assert choose_rows("cpu", torch.float32, 6, 1576, 384, 1536).kernel == "padded"
        assert not module.wants_masked(x, 24)
        assert "forced: padded" in describe_choice()[0]
    with use_kernel("masked_dense"):
        assert module.wants_masked(x, 4)
        assert Experts(2, 8, 8)(rows(4), [2, 2]).shape == (4, 8)
    assert Experts(24, 384, 64, kernel="masked_dense").wants_masked(x, 1)
    lines = describe_choice()
    assert "forced: auto" in lines[0] and any("GMoE-S" in line and "loop" in line for line in lines)


def test_numbered_and_stacked_names():
    local = LocalExperts(8, 12, 3)
    module = Experts(3, 8, 12)
    state = {f"experts.{n}": v for n, v in local.state_dict().items()} | {"gate.weight": torch.zeros(3, 8)}
    stacked = stacked_state(state, 3, "experts.")
    assert set(stacked) == {"gate.weight", *(f"experts.{n}" for n in ("w1", "b1", "w2", "b2"))}
    back = numbered_state(stacked, "experts.")
    assert set(back) == set(state) and all(torch.equal(back[n], state[n]) for n in state)
    module.load_state_dict({n.removeprefix("experts."): v for n, v in stacked.items() if n != "gate.weight"})
    x = rows(5)
    torch.testing.assert_close(module(x, [2, 0, 3]), local(x, [2, 0, 3]))
    del state["experts.1.w2.weight"]
    with pytest.raises(CheckpointError, match=r"experts\.1\.w2\.weight"):
        stacked_state(state, 3, "experts.")
    state["experts.1.w2.weight"] = torch.zeros(12, 8)
    with pytest.raises(CheckpointError, match=r"experts\.1\.w2\.weight.*\[12, 8\]"):
        stacked_state(state, 3, "experts.")


def test_errors_name_tensor_and_shapes():
    w1, b1, w2, b2 = weights()
    x = rows(5)
    for parts, match in (
        ((w1, b1, w2.transpose(1, 2), b2), r"w2 is \[3, 12, 8\], expected \[3, 12, 12\]"),
        ((w1, b1[:2], w2, b2), r"b1 is \[2, 12\], expected \[3, 12\]"),
        ((w1, b1, w2, b2[:, :3]), r"b2 is \[3, 3\], expected \[3, 8\]"),
        ((w1[0], b1, w2, b2), r"w1 is \[12, 8\]"),
    ):
        with pytest.raises(SpecError, match=match):
            expert_ffn(x, [2, 2, 1], *parts)
    with pytest.raises(SpecError, match=r"x is \[5, 7\], expected \[5, 8\]"):
        expert_ffn(x[:, :7], [2, 2, 1], w1, b1, w2, b2)
    with pytest.raises(SpecError, match="2 counts for 3 experts"):
        expert_ffn(x, [2, 3], w1, b1, w2, b2)
    for counts in ([2, 2, 2], torch.tensor([2, 2, 2])):
        with pytest.raises(SpecError, match="sum to 6, but there are 5 rows"):
            expert_ffn(x, counts, w1, b1, w2, b2, kernel="loop")
    with pytest.raises(SpecError, match="at least 0"):
        expert_ffn(x, [6, -1, 0], w1, b1, w2, b2)
    with pytest.raises(SpecError, match=r"dropout_mask is \[5, 8\], expected \[5, 12\]"):
        expert_ffn(x, [2, 2, 1], w1, b1, w2, b2, dropout_mask=torch.ones(5, 8))
    with pytest.raises(SpecError, match="Did you mean 'grouped'"):
        expert_ffn(x, [2, 2, 1], w1, b1, w2, b2, kernel="groupd")
    with pytest.raises(SpecError, match="works on tokens"):
        expert_ffn(x, [2, 2, 1], w1, b1, w2, b2, kernel="masked_dense")
    with pytest.raises(SpecError, match=r"cannot compute torch\.float64"):
        expert_ffn(x.double(), [2, 2, 1], *(t.double() for t in (w1, b1, w2, b2)), kernel="grouped")
    with pytest.raises(SpecError, match="Did you mean 'gelu'"):
        Experts(2, 4, 4, activation="gelo")
    assert check_activation("gelu_new") == "gelu_tanh"
    for options in ({"dropout": 1.0}, {"kernel": "fast"}, {"out_dim": 0}):
        with pytest.raises(SpecError):
            Experts(2, 4, 4, **options)
