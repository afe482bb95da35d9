"""SpheroMoE and entmax 1.5 against the official form, forward and backward, at the sizes of ViT-T and ViT-S.

The official form is built here as its description goes: scores, two scaled and noised copies, softmax, entmax by
sorting, experts by einsum, dropout by ``F.dropout``; single process, float32. Both sides get the same weights; outputs
are compared before anything is timed. The last row is our own second-order step (the gradient, then its derivative
along a direction, as in meta-learning) against the first-order one; its target is written as 1 / 4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.jetpack_whole import step_row
from benchmarks.measure import Row, alternate
from benchmarks.setting import Sizes
from moe.jetpack_specs import SpheroSpec
from moe.layers.entmax import entmax15
from moe.layers.sphero import SpheroMoE

TOKENS = 197


def run(sizes: Sizes) -> list[Row]:
    """Layer (training and without draws), forward alone, entmax, second order, a step of the whole network."""
    quick = sizes == Sizes.quick()
    core, repetitions = (3, 1) if quick else (98, 5)
    shapes = [(16, 2)] if quick else [(192, 8), (192, 32), (384, 8)]
    rows = []
    for dim, batch in shapes:
        rows += _layer(dim, batch, core, repetitions)
    rows += _entmax(2 if quick else 8, 3 * core, repetitions)
    rows += _second_order(*shapes[0], core, repetitions)
    return [*rows, step_row(quick)]


def _layer(dim: int, batch: int, core: int, repetitions: int) -> list[Row]:
    torch.manual_seed(0)
    univ = 2 * core
    spec = SpheroSpec(
        core_experts=core,
        univ_experts=univ,
        slot_layernorm=True,
        noise=True,
        noise_mult=1 / (core + univ),
        drop=0.4,
    )
    ours = SpheroMoE(dim, spec)
    official = Official(ours)
    x = torch.randn(batch, TOKENS, dim, requires_grad=True)
    cotangent = torch.randn(batch, TOKENS, dim)
    error = _difference(official.eval(), ours.eval(), x, cotangent)

    def step(layer: nn.Module) -> None:
        layer.zero_grad()
        x.grad = None
        layer(x).backward(cotangent)

    what = f"SpheroMoE {core}+{univ}, D {dim}, batch {batch}"
    note = f"largest relative difference {error:.0e}"
    rows = []
    for mode, training in (("noise and dropout", True), ("nothing drawn", False)):
        official.train(training)
        ours.train(training)
        base, own = alternate([lambda: step(official), lambda: step(ours)], repetitions)
        rows.append(Row(f"{what}: forward+backward, {mode}", base, own, 2.5, note))
    with torch.no_grad():
        base, own = alternate([lambda: official(x), lambda: ours(x)], repetitions)
    return [*rows, Row(f"{what}: forward, evaluation", base, own, None, note)]


def _difference(official: nn.Module, ours: nn.Module, x: Tensor, cotangent: Tensor) -> float:
    """Largest difference of outputs and input gradients, relative to their largest entry."""
    results = []
    for layer in (official, ours):
        y = layer(x)
        results.append((y.detach(), torch.autograd.grad(y, x, cotangent)[0]))
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(*results, strict=True))


def _entmax(batch: int, slots: int, repetitions: int) -> list[Row]:
    torch.manual_seed(0)
    keys, queries = torch.randn(batch, TOKENS, 192), torch.randn(slots, 192)
    x = (F.normalize(keys, dim=-1) @ F.normalize(queries, dim=-1).t() / 0.5).requires_grad_()
    cotangent = torch.randn_like(x)
    exact = SortedEntmax.apply(x.detach().double())
    error = float((entmax15(x.detach()).double() - exact).abs().max())

    def step(function: object) -> None:
        x.grad = None
        function(x).backward(cotangent)

    what, note = f"entmax 1.5, {batch} x {TOKENS} x {slots}", f"error {error:.0e} (limit 1e-6)"
    base, own = alternate([lambda: SortedEntmax.apply(x), lambda: entmax15(x)], repetitions)
    both = alternate([lambda: step(SortedEntmax.apply), lambda: step(entmax15)], repetitions)
    return [Row(f"{what}: forward", base, own, 5.0, note), Row(f"{what}: forward+backward", *both, 5.0, note)]


def _second_order(dim: int, batch: int, core: int, repetitions: int) -> list[Row]:
    torch.manual_seed(0)
    layer = SpheroMoE(dim, SpheroSpec(core_experts=core, univ_experts=2 * core, slot_layernorm=True)).eval()
    x = torch.randn(batch, TOKENS, dim)
    parameters = list(layer.parameters())

    def first() -> None:
        torch.autograd.grad(layer(x).square().mean(), parameters)

    directions = [torch.randn_like(p) for p in parameters]

    def second() -> None:
        gradients = torch.autograd.grad(layer(x).square().mean(), parameters, create_graph=True)
        torch.autograd.grad(gradients, parameters, directions)

    base, own = alternate([first, second], repetitions)
    what = f"SpheroMoE {core}+{2 * core}, D {dim}, batch {batch}: first-order step / second-order step"
    return [Row(what, base, own, 1 / 4, f"second order costs {own / base:.1f} first-order steps (limit 4)")]


class SortedEntmax(torch.autograd.Function):
    """Entmax 1.5 by sorting each row (arXiv 1905.05702, algorithm 2)."""

    @staticmethod
    def forward(ctx, x):
        """Rows along the last dimension."""
        z = (x - x.amax(-1, keepdim=True)) / 2
        ordered = z.sort(-1, descending=True).values
        count = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype)
        mean, square = ordered.cumsum(-1) / count, ordered.square().cumsum(-1) / count
        spread = ((1 - count * (square - mean.square())) / count).clamp_min(0)
        thresholds = mean - spread.sqrt()
        support = (thresholds <= ordered).sum(-1, keepdim=True)
        p = (z - thresholds.gather(-1, support - 1)).clamp_min(0).square()
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx, grad):
        """From the result alone."""
        (p,) = ctx.saved_tensors
        root = p.sqrt()
        weighted = grad * root
        return weighted - root * (weighted.sum(-1, keepdim=True) / root.sum(-1, keepdim=True))


class Official(nn.Module):
    """The official form of a SpheroMoE layer with one slot per expert, with the weights of one of ours."""

    def __init__(self, layer: SpheroMoE) -> None:
        super().__init__()
        self.spec = layer.spec
        for name, value in layer.named_parameters():
            self.register_parameter(name.replace(".", "_"), nn.Parameter(value.detach().clone()))

    def experts(self, group: str, slots: Tensor) -> Tensor:
        """One group of experts on its slots ``[B, E, S, D]``."""
        w1, b1, w2, b2 = (
            getattr(self, f"{group}_experts_vit_{name}")
            for name in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
        )
        hidden = F.gelu(torch.einsum("besd,ehd->besh", slots, w1) + b1[None, :, None])
        hidden = F.dropout(hidden, self.spec.drop, self.training)
        out = torch.einsum("besh,edh->besd", hidden, w2) + b2[None, :, None]
        return F.dropout(out, self.spec.drop, self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``[B, N, D]`` to the same shape."""

        def unit(v: Tensor) -> Tensor:
            return v / (v.norm(dim=-1, keepdim=True) + 1e-6)

        queries = unit(F.layer_norm(self.phi, self.phi.shape[-1:], self.slot_norm_weight, self.slot_norm_bias))
        scores = torch.einsum("bnd,esd->bnes", unit(x), queries)
        dispatch, combine = scores / self.scales_0, scores / self.scales_1
        if self.training:
            noise = torch.randn_like(scores) * self.spec.noise_mult
            dispatch, combine = dispatch + noise, combine + noise
        dispatch = dispatch.softmax(dim=1)
        combine = SortedEntmax.apply(combine.flatten(2)).view(combine.shape)
        slots = torch.einsum("bnd,bnes->besd", x, dispatch)
        core = self.spec.core_experts
        out = torch.cat([self.experts("core", slots[:, :core]), self.experts("univ", slots[:, core:])], dim=1)
        return torch.einsum("besd,bnes->bnd", out, combine)
