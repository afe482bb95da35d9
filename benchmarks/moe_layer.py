"""The MoE layer: beside a dense network of equal activated work, other layers, and itself at second order.

Every row is forward and backward in float32 with gradients of tokens and weights, in CPU time of this process. A limit
"at most 1.10 x dense" is a target of 1/1.10 for dense / ours.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.baselines_moe import DeepSpeedLayer, GShardEinsum, NaiveLoop, dense
from benchmarks.measure import Row, alternate
from benchmarks.setting import Sizes
from moe.layers.experts import Experts
from moe.layers.kernel_choice import describe_choice
from moe.layers.kernels import expert_ffn
from moe.layers.layer import MoELayer
from moe.router_spec import RouterSpec

GMOE = (384, 1536, 6, 1576)
LIMITS = {1: 1.10, 2: 1.15}
# Name, width D, tokens, experts, choices, most that the layer may cost beside the dense one.
EMOE = (
    ("ViT-S", 384, 1576, 24, 4, 0.65),
    ("ViT-S", 384, 1576, 24, 12, 1.15),
    ("ViT-S", 384, 1576, 24, 24, 1.15),
    ("ViT-S", 384, 1576, 64, 11, 1.15),
    ("ViT-S", 384, 1576, 64, 32, 1.15),
    ("BERT-base", 768, 1024, 96, 16, 0.65),
    ("BERT-base", 768, 1024, 64, 16, 1.15),
    ("BERT-base", 768, 1024, 64, 48, 1.15),
)
KERNELS = ("loop", "grouped", "padded", "baddbmm")
SMALL = ((32, 192, 768, 3152), (98, 192, 384, 1576), (196, 192, 192, 1576))


class _SameProducts(nn.Module):
    """A dense network on the products that the experts use."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x_TD: Tensor) -> Tensor:
        one, two = self.one, self.two
        return expert_ffn(x_TD, [len(x_TD)], one.weight[None], one.bias[None], two.weight[None], two.bias[None])


def run(sizes: Sizes) -> list[Row]:
    """All rows; prints which kernels are chosen."""
    quick = sizes == Sizes.quick()
    for line in describe_choice():
        print(f"  {line}", file=sys.stderr)
    torch.manual_seed(0)
    rows = [row for top_k in LIMITS for row in gmoe(top_k, quick)]
    rows += [emoe(*setting, quick) for setting in EMOE]
    rows += second_order(quick)
    return rows + [small_experts(*setting, quick) for setting in SMALL]


def step(module: nn.Module, tokens: int, dim: int) -> Callable[[], object]:
    """Forward and backward on fixed tokens."""
    x_TD = torch.randn(tokens, dim).requires_grad_()
    dy_TD = torch.randn(tokens, dim)
    inputs = [x_TD, *(p for p in module.parameters() if p.requires_grad)]
    return lambda: torch.autograd.grad(module(x_TD), inputs, dy_TD)


def gmoe(top_k: int, quick: bool) -> list[Row]:
    """GMoE's layer beside the limit and the layers of others."""
    dim, hidden, experts, tokens = (16, 32, 6, 60) if quick else GMOE
    ours = {
        gate: MoELayer(dim, hidden, RouterSpec(gate=gate, top_k=top_k, balance="gshard"), experts)
        for gate in ("linear", "cosine")
    }
    others = {
        "naive loop": NaiveLoop(dim, hidden, experts, top_k),
        "GShard einsum, capacity 1.5": GShardEinsum(dim, hidden, experts, top_k),
        "DeepSpeed's layer, capacity 1.5": DeepSpeedLayer(dim, hidden, experts, top_k),
    }
    sides = [step(dense(dim, hidden), tokens * top_k, dim), step(_SameProducts(dim, hidden), tokens * top_k, dim)]
    sides += [step(module, tokens, dim) for module in (*ours.values(), *others.values())]
    limit, same, linear, cosine, *theirs = alternate(sides, 2 if quick else 7)
    what, most = f"moe layer, GMoE sizes, top-{top_k}", LIMITS[top_k]
    note = f"D {dim}, H {hidden}, {experts} experts, {tokens} tokens"
    rows = [
        Row(f"{what}: beside dense", limit, linear, 1 / most, f"{note}; at most {most:.2f} x dense"),
        Row(f"{what}, cosine gate: beside dense", limit, cosine, 1 / most, f"{note}; at most {most:.2f} x dense"),
        Row(f"{what}: beside dense on our products", same, linear, None, "what gate, routing and small groups cost"),
    ]
    for (name, _), seconds in zip(others.items(), theirs, strict=True):
        rows.append(Row(f"{what}: {name}", seconds, linear, 1.4 if "DeepSpeed" in name else None, note))
    return rows


def emoe(name: str, dim: int, tokens: int, experts: int, top_k: int, most: float, quick: bool) -> Row:
    """An FFN of 4 D hidden units that was split into experts, beside the dense one."""
    if quick:
        dim, tokens = 48, 40
    layer = MoELayer(dim, 4 * dim // experts, RouterSpec(gate="avg_k", one_score=True, top_k=top_k), experts)
    layer.update_gate()
    sides = [step(dense(dim, 4 * dim), tokens, dim), step(layer, tokens, dim)]
    limit, ours = alternate(sides, 1 if quick else 5)
    masked = layer.experts.wants_masked(torch.empty(tokens, dim), top_k)
    way = "masked dense" if masked else "grouped by expert"
    note = f"D {dim}, {tokens} tokens, {way}; at most {most:.2f} x dense"
    return Row(f"emoe ffn, {name}, {top_k} of {experts} experts: beside dense", limit, ours, 1 / most, note)


def second_order(quick: bool) -> list[Row]:
    """A step whose backward is differentiated again, beside a first-order step; the limit is 4 times."""
    dim, hidden, experts, tokens = (16, 32, 6, 60) if quick else GMOE
    layers = {
        "GMoE top-1": MoELayer(dim, hidden, RouterSpec(gate="cosine"), experts),
        "GMoE top-2": MoELayer(dim, hidden, RouterSpec(gate="cosine", top_k=2), experts),
        "EMoE 4 of 24": MoELayer(dim, hidden // 16, RouterSpec(gate="avg_k", one_score=True, top_k=4), 24),
        "EMoE 16 of 24": MoELayer(dim, hidden // 16, RouterSpec(gate="avg_k", one_score=True, top_k=16), 24),
    }
    rows = []
    for name, layer in layers.items():
        x_TD, target_TD = torch.randn(tokens, dim).requires_grad_(), torch.randn(tokens, dim)
        inputs = [x_TD, *(p for p in layer.parameters() if p.requires_grad)]
        directions = [torch.randn_like(t) for t in inputs]

        def first(graph: bool = False, layer=layer, x_TD=x_TD, target_TD=target_TD, inputs=inputs):
            return torch.autograd.grad((layer(x_TD) - target_TD).square().mean(), inputs, create_graph=graph)

        def second(first=first, inputs=inputs, directions=directions) -> object:
            return torch.autograd.grad(first(True), inputs, directions, materialize_grads=True)

        once, twice = alternate([first, second], 1 if quick else 5)
        rows.append(Row(f"second order, {name}: first order / second order", once, twice, 1 / 4, "at most 4 times"))
    return rows


def small_experts(experts: int, dim: int, hidden: int, rows_: int, quick: bool) -> Row:
    """The kernel that is chosen beside the fastest one."""
    if quick:
        rows_ = 2 * experts
    x_MD, dy_MD = torch.randn(rows_, dim).requires_grad_(), torch.randn(rows_, dim)
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.randint(0, experts, (rows_,), generator=generator), minlength=experts).tolist()
    module = Experts(experts, dim, hidden)

    def side(kernel: str) -> Callable[[], object]:
        def call() -> object:
            module.kernel = kernel  # type: ignore[assignment]
            return torch.autograd.grad(module(x_MD, counts), [x_MD, *module.parameters()], dy_MD)

        return call

    *all_, ours = alternate([side(name) for name in (*KERNELS, "auto")], 1 if quick else 5)
    note = ", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in zip(KERNELS, all_, strict=True))
    return Row(f"{experts} experts {dim} -> {hidden}, {rows_} rows: fastest / chosen", min(all_), ours, None, note)
