"""The MoE block: dense equivalence, independence of the batch, capacity, kernels, parallel experts, DeepSpeed."""

import threading

import pytest
import torch
from torch.func import functional_call

from moe.backbones import build_student
from moe.errors import SpecError
from moe.layers.block import MoEBlock, deepspeed_names, hidden_width
from moe.layers.experts import Expert, ExpertParallel
from moe.layers.router import balance_loss, capacity, route
from moe.specs import BackboneSpec, StudentMoESpec
from tests.moe.helpers import wake

D = 8


def block(experts=4, k=2, seed=0, kernel="loop", dtype=torch.float64, **options):
    torch.manual_seed(seed)
    spec = StudentMoESpec(num_experts=experts, top_k=k, **options)
    return wake(MoEBlock(D, spec, kernel=kernel)).to(dtype).eval()


def features(n=11, seed=5, dtype=torch.float64):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_all_experts_chosen_is_the_dense_mixture():
    layer, z = block(k=4), features()
    x = layer.norm(z)
    p = layer.gate(x).softmax(-1)
    dense = z + sum(p[:, e : e + 1] * expert(x) for e, expert in enumerate(layer.experts))
    torch.testing.assert_close(layer(z).features_ND, dense)


def test_one_choice_is_weighted_by_its_probability():
    layer, z = block(k=1), features()
    x = layer.norm(z)
    p, chosen = layer.gate(x).softmax(-1).max(-1)
    rows = [z[i] + p[i] * layer.experts[int(chosen[i])](x[i]) for i in range(len(z))]
    out = layer(z)
    torch.testing.assert_close(out.features_ND, torch.stack(rows))
    assert out.counts_E.tolist() == torch.bincount(chosen, minlength=4).tolist()


def test_two_choices_are_renormalised():
    layer, z = block(k=2), features()
    x = layer.norm(z)
    top, chosen = layer.gate(x).softmax(-1).topk(2)
    top = top / top.sum(-1, keepdim=True)
    rows = [z[i] + sum(top[i, j] * layer.experts[int(chosen[i, j])](x[i]) for j in range(2)) for i in range(len(z))]
    torch.testing.assert_close(layer(z).features_ND, torch.stack(rows))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_dropless_results_do_not_depend_on_the_batch(k):
    layer, z = block(k=k), features(16)
    together = layer(z).features_ND
    alone = torch.cat([layer(row[None]).features_ND for row in z])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(z[order]).features_ND, together[order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", [(1, 1, 5), (4, 1, 1), (4, 4, 1), (3, 2, 0), (1, 1, 1)], ids=str)
def test_edge_sizes(case):
    experts, k, tokens = case
    layer, z = block(experts, k), features(tokens)
    z.requires_grad_()
    out = layer(z)
    assert out.features_ND.shape == (tokens, D) and int(out.counts_E.sum()) == tokens * k
    (out.features_ND.square().sum() + out.balance).backward()
    assert bool(torch.isfinite(z.grad).all())
    assert all(p.grad is not None for p in layer.experts.parameters())  # zeros for experts without tokens, never None


@pytest.mark.parametrize("kernel", ["loop", "padded"])
def test_everything_to_one_expert(kernel):
    layer, z = block(k=1, kernel=kernel), features(6)
    with torch.no_grad():
        layer.gate.weight.zero_()
    out = layer(z)
    assert out.counts_E.tolist() == [6, 0, 0, 0]  # equal scores go to the lowest number
    torch.testing.assert_close(out.features_ND, z + 0.25 * layer.experts[0](layer.norm(z)))
    assert float(out.balance.detach()) == pytest.approx(1.0)


@pytest.mark.parametrize("tokens", [0, 1, 9])
@pytest.mark.parametrize("k", [1, 3])
def test_kernels_agree_in_value_and_in_first_and_second_gradient(tokens, k):
    results = []
    for kernel in ("loop", "padded"):
        layer, z = block(k=k, kernel=kernel), features(tokens).requires_grad_()
        parameters = list(layer.parameters())
        out = layer(z).features_ND
        first = torch.autograd.grad(out.square().sum(), [z, *parameters], create_graph=True)
        total = sum(g.square().sum() for g in first)
        second = torch.autograd.grad(total, [z, *parameters], allow_unused=True, materialize_grads=True)
        results.append([out, *first, *second])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_second_order_gradients_are_right():
    layer, z = block(experts=3, k=2, hidden_ratio=0.25), features(3).requires_grad_()
    names = [name for name, _ in layer.named_parameters()]

    def function(x, *values):
        return functional_call(layer, dict(zip(names, values, strict=True)), (x,))[0]

    inputs = (z, *(p.detach().clone().requires_grad_() for p in layer.parameters()))
    assert torch.autograd.gradgradcheck(function, inputs, atol=1e-6, nondet_tol=0.0)


def test_functional_calls_leave_no_trace():
    layer, z = block(), features()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    twice = {name: value * 2 for name, value in before.items()}
    changed = functional_call(layer, twice, (z,)).features_ND
    plain = layer(z).features_ND
    assert not torch.allclose(changed, plain)
    assert torch.equal(layer(z).features_ND, plain)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_capacity_drops_later_tokens_first_choices_first():
    logits = torch.tensor([[2.0, 1.0, 0.0]] * 4)
    routing = route(logits, top_k=2, slots=3)
    assert routing.kept_NK.tolist() == [[True, True], [True, True], [True, True], [False, False]]
    assert routing.counts_E.tolist() == [3, 3, 0]
    assert routing.weights_NK[3].tolist() == [0.0, 0.0]
    torch.testing.assert_close(routing.weights_NK[:3].sum(-1), torch.ones(3))
    crossed = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    assert route(crossed, 2, slots=1).kept_NK.tolist() == [[True, False], [True, False]]
    assert capacity(10, 4, 2, 1.25) == 7 and capacity(1, 64, 1, 0.5) == 1


def test_dropped_tokens_pass_unchanged_and_only_while_training():
    layer, z = block(k=1, dropless=False, capacity_factor=0.5), features(8)
    with torch.no_grad():
        layer.gate.weight.zero_()
    out = layer.train()(z)
    assert out.counts_E.tolist() == [1, 0, 0, 0]
    assert torch.equal(out.features_ND[1:], z[1:]) and not torch.equal(out.features_ND[0], z[0])
    assert layer.eval()(z).counts_E.tolist() == [8, 0, 0, 0]


def test_balance_loss_is_one_when_uniform_and_larger_when_not():
    even = torch.eye(4).repeat(3, 1) * 50
    assert float(route(even, 1).balance) == pytest.approx(1.0)
    assert float(route(torch.eye(4)[:1].repeat(12, 1) * 50, 1).balance) == pytest.approx(4.0)
    gates = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]])
    chosen = gates.argsort(descending=True)
    first = 3 * (0.4 * 0.5 + 0.4 * 0.5)
    assert float(balance_loss(gates, chosen[:, :2])) == pytest.approx(first)
    assert float(balance_loss(gates, chosen)) == pytest.approx(1.0)


def test_gate_stays_float32_under_autocast():
    layer, z = block(dtype=torch.float32), features(dtype=torch.float32)
    expected = layer.gate(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.gate(z), expected)
        assert layer(z).features_ND.dtype == torch.float32


def test_a_new_block_leaves_the_dense_parent_unchanged():
    spec = BackboneSpec(name="tiny_cnn", channels=3, width=4)
    torch.manual_seed(0)
    dense = build_student(spec, 5).eval()
    torch.manual_seed(0)
    sparse = build_student(spec, 5, StudentMoESpec(num_experts=3, top_k=2)).eval()
    x = torch.randn(4, 3, 16, 16)
    assert torch.equal(dense(x), sparse(x)) and torch.equal(dense.extract(x), sparse.extract(x))
    names = [name for name in sparse.state_dict() if name.startswith("moe.")]
    experts = [f"moe.experts.{e}.{w}.{t}" for e in range(3) for w in ("w1", "w2") for t in ("weight", "bias")]
    assert names == ["moe.norm.weight", "moe.norm.bias", "moe.gate.weight", *experts]


class Lockstep:
    """All-to-all between threads, for forward passes."""

    def __init__(self, world):
        self.barrier, self.boxes, self.world = threading.Barrier(world, timeout=120), {}, world

    def rank(self, rank):
        outer = self

        class Exchange:
            def __call__(self, x, send, receive):
                outer.boxes[rank] = x.split(send)
                outer.barrier.wait()
                out = torch.cat([outer.boxes[r][rank] for r in range(outer.world)])
                outer.barrier.wait()
                assert len(out) == sum(receive)
                return out

            def counts(self, send):
                return self(send, [1] * outer.world, [1] * outer.world)

        return Exchange()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_parallel_experts_give_the_local_numbers(world):
    whole = block(k=2)
    lockstep, results, errors = Lockstep(world), {}, []

    def run(rank):
        try:
            hidden = hidden_width(D, whole.spec)
            experts = ExpertParallel(D, hidden, 4, rank, world, lockstep.rank(rank))
            part = MoEBlock(D, whole.spec, experts=experts).double().eval()
            part.load_state_dict({n: v for n, v in whole.state_dict().items() if n in part.state_dict()})
            with torch.no_grad():
                results[rank] = part(features(7 + rank, seed=rank)).features_ND
        except BaseException as error:
            errors.append(error)
            lockstep.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for rank in range(world):
        torch.testing.assert_close(results[rank], whole(features(7 + rank, seed=rank)).features_ND.detach())


def test_parallel_experts_need_an_equal_share():
    with pytest.raises(SpecError, match="shared equally"):
        ExpertParallel(D, 4, 5, 0, 2, Lockstep(2).rank(0))
    with pytest.raises(SpecError, match="shared equally"):
        deepspeed_names(5, 0, 2)
    assert deepspeed_names(4, 1, 2)["deepspeed_moe.experts.deepspeed_experts.1.w2.bias"] == "experts.3.w2.bias"


@pytest.mark.parametrize("k", [1, 2, 3])
def test_router_equals_deepspeeds_gate(k, monkeypatch):
    """The gating functions themselves, without process groups: values, balance loss and gradient."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    gating = pytest.importorskip("deepspeed.moe.sharded_moe")
    logits = torch.randn(13, 5, generator=torch.Generator().manual_seed(k))
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    if k == 1:
        out = gating.top1gating(theirs, 1.0, 0, drop_tokens=False, use_rts=False)
    elif k == 2:
        out = gating.top2gating(theirs, 1.0, 0, drop_tokens=False, top2_2nd_expert_sampling=False)
    else:
        out = gating.topkgating(theirs, k, 1.0, 0, drop_tokens=False)
    routing = route(ours, k)
    dense = torch.zeros(13, 5).scatter(1, routing.experts_NK, routing.weights_NK)
    combine = out[1].sum(dim=2)
    torch.testing.assert_close(dense, combine)
    torch.testing.assert_close(routing.balance, out[0])
    weight = torch.randn(13, 5, generator=torch.Generator().manual_seed(9))
    ((dense * weight).sum() + routing.balance).backward()
    ((combine * weight).sum() + out[0]).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_expert_is_a_plain_two_layer_network():
    expert = Expert(D, 5)
    assert expert(torch.randn(3, D)).abs().max() == 0
    assert [n for n, _ in expert.named_parameters()] == ["w1.weight", "w1.bias", "w2.weight", "w2.bias"]
