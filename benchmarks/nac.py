"""Neural attentive circuit: read-in and block-model matching against their official forms, and second-order steps.

Official forms, built here from the method's description: the read-in projects every token once per latent, under that
latent's code; the matching fills an n x n x n tensor with the differences of all rows and hands its mean to a linear
assignment. Baseline and ours take turns in one process and compute the same numbers (the note says how closely).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from benchmarks.measure import Row, alternate
from benchmarks.nac_whole import step_rows
from benchmarks.setting import Sizes
from moe.models.nac.attention import LatentAttention, Nodes
from moe.models.nac.ffn import ModFFN
from moe.models.nac.graph_specs import AttentionOptions, KernelSpec, ModFCSpec
from moe.models.nac.kernel import DotProductKernel
from moe.models.nac.read_in import ReadInAttention
from moe.models.nac.regularizers import block_model, match_rows
from moe.models.nac.signatures import prior_signatures

MOD = ModFCSpec(add_one_to_scale=True, learnable_scale_gain=True, scale_gain=0.1)


def run(sizes: Sizes) -> list[Row]:
    """All rows."""
    quick = sizes.pixels < 64
    torch.manual_seed(0)
    if quick:
        rows = [*read_in("tiny sizes", 2, 8, 9, 16, 12, 2, 1.0, 1), matching(16, 4, 1)]
        return [*rows, *second_order(1, 8, 12, 16, 2), *step_rows(quick)]
    rows = read_in("Tiny-ImageNet", 2, 64, 64, 384, 256, 6, 8.0, sizes.repetitions)
    rows += read_in("ImageNet", 1, 192, 784, 512, 320, 8, 40.0, 1)
    rows += [matching(256, 8, sizes.repetitions), matching(768, 8, 1)]
    return rows + second_order(2, 256, 320, 384, sizes.repetitions) + step_rows(quick)


def official_read_in(layer: ReadInAttention, states: Tensor, codes: Tensor, tokens: Tensor) -> Tensor:
    """The read-in's attention with keys and values of every (token, latent) pair."""
    heads = layer.num_heads
    x_BV1N = layer.sender_layernorm(tokens).unsqueeze(2)
    q_BUHD = layer.query_compiler(layer.receiver_layernorm(states), codes).unflatten(-1, (heads, -1))
    k_BVUHD, v_BVUHD = (
        compiler(x_BV1N.expand(-1, -1, len(codes), -1), codes).unflatten(-1, (heads, -1))
        for compiler in (layer.key_compiler, layer.value_compiler)
    )
    weights = (torch.einsum("buhd,bvuhd->buhv", q_BUHD, k_BVUHD) / math.sqrt(q_BUHD.shape[-1])).softmax(-1)
    message = torch.einsum("buhv,bvuhd->buhd", weights, v_BVUHD).flatten(2)
    return states + layer.layer_scale(layer.exit_layer(message, codes))


def read_in(
    name: str, batch: int, latents: int, tokens: int, width: int, input_dim: int, heads: int, target: float, times: int
) -> list[Row]:
    """Forward and backward of the read-in attention; one row."""
    layer = ReadInAttention(input_dim, width, width, heads, width // heads, mod=MOD)
    states, codes = torch.randn(batch, latents, width), torch.randn(latents, width)
    inputs, cotangent = torch.randn(batch, tokens, input_dim), torch.randn(batch, latents, width)
    answers: dict[str, list[Tensor]] = {}

    def side(label: str, forward: Callable[..., Tensor]) -> Callable[[], None]:
        def step() -> None:
            leaves = [x.clone().requires_grad_() for x in (states, codes, inputs)]
            y = forward(*leaves)
            grads = torch.autograd.grad((y * cotangent).sum(), [*leaves, *layer.parameters()])
            answers[label] = [y.detach(), *grads]

        return step

    official = side("official", lambda *leaves: official_read_in(layer, *leaves))
    base, ours = alternate([official, side("ours", layer)], times)
    error = (answers["ours"][0] - answers["official"][0]).abs().max()
    relative = max(
        float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))
        for a, b in zip(answers["ours"][1:], answers["official"][1:], strict=True)
    )
    note = f"batch {batch}, {latents} latents, {tokens} tokens; output off by {error:.0e}, gradients by {relative:.0e}"
    return [Row(f"read-in, {name}, forward+backward", base, ours, target, note)]


def matching(count: int, clusters: int, times: int) -> Row:
    """Rows of the mediators' affinities matched to a block model, after a short fit of the signatures."""
    sizes = {"l": clusters, "k": count // clusters, "p_in": 0.9, "p_out": 0.2, "num_iters": 30}
    signatures = prior_signatures("planted-partition", count, 64, sizes).signatures
    kernel = DotProductKernel(KernelSpec(truncation=0.9))
    order = torch.randperm(count)
    affinities = kernel(signatures[order], signatures[order]).detach()
    target = block_model(count, clusters, 0.9, 0.2)
    totals: dict[str, float] = {}

    def total(rows: Tensor) -> float:
        return float((affinities[rows] - target).square().mean())

    def official() -> None:
        cost = (target.unsqueeze(1) - affinities.unsqueeze(0)).square().mean(dim=-1)
        totals["official"] = total(torch.from_numpy(linear_sum_assignment(cost.numpy())[1]))

    def ours() -> None:
        totals["ours"] = total(match_rows(target, affinities, clusters))

    base, mine = alternate([official, ours], times)
    note = f"{clusters} clusters; value {totals['ours']:.6f}, official {totals['official']:.6f}"
    return Row(f"block-model matching, {count} mediators, one layer", base, mine, 20.0, note)


def second_order(batch: int, receivers: int, senders: int, width: int, times: int) -> list[Row]:
    """A gradient of a gradient against four times a first-order step; a row per layer."""
    heads, codes = max(1, width // 64), torch.randn(senders, width)
    reader = ReadInAttention(width, width, width, heads, width // heads, mod=MOD)
    ffn = ModFFN(width, width, 2.0, use_geglu=True, layer_scale=0.1, mod=MOD)
    options = AttentionOptions(kernel_kwargs=KernelSpec(truncation=0.9, stochastic_kernel=True), share_layernorm=True)
    propagator = LatentAttention(width, width, heads, width // heads, options, mod=MOD, layer_scale=0.1)
    states, inputs, signatures = (
        torch.randn(batch, senders, width),
        torch.randn(batch, 64, width),
        torch.randn(senders, 64),
    )
    some = slice(0, receivers)
    to = Nodes(states[:, some], codes[some], signatures[some])
    calls: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {
        "read-in": (reader, lambda: reader(states[:, :64], codes[:64], inputs)),
        "feed-forward block": (ffn, lambda: ffn(states[:, some], codes[some])),
        "latent attention": (propagator, lambda: propagator(to, Nodes(states, codes, signatures))),
    }
    rows = []
    for name, (layer, forward) in calls.items():
        parameters = list(layer.parameters())

        def first(forward: Callable[[], Tensor] = forward, parameters: list[nn.Parameter] = parameters) -> None:
            torch.autograd.grad(forward().square().mean(), parameters)

        def second(forward: Callable[[], Tensor] = forward, parameters: list[nn.Parameter] = parameters) -> None:
            grads = torch.autograd.grad(forward().square().mean(), parameters, create_graph=True)
            torch.autograd.grad(torch.stack([g.square().sum() for g in grads]).sum(), parameters)

        base, ours = alternate([first, second], times)
        note = f"a second-order step costs {ours / base:.2f} first-order steps"
        rows.append(Row(f"{name}: second order within 4 first-order steps", 4 * base, ours, 1.0, note))
    return rows
