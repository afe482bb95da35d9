"""EMoE for SwiGLU layers (LLaMA): neurons permuted so that experts are blocks, and only the best blocks kept.

Source: EMoE (arXiv 2310.10908), its LLaMA form. The permutation leaves the layer's function as it is, so the weights
stay an ordinary LLaMA checkpoint; what makes the layer sparse is the forward pass, which zeroes all but the K best
blocks of the hidden vector. No gate, no noise, no capacity, no auxiliary loss: a token's result depends on nothing but
itself, and the cost is that of the dense layer.

Shapes: F neurons, D width, E blocks of s = F / E neurons, K kept blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.conversion.split import check_divides, check_labels
from moe.errors import SpecError, nearest

Select = Literal["gate", "up", "up_abs", "inter", "inter_abs"]
SELECTS: tuple[Select, ...] = ("gate", "up", "up_abs", "inter", "inter_abs")

_ROWS = ("gate_proj.weight", "gate_proj.bias", "up_proj.weight", "up_proj.bias")


def permute_swiglu(weights: Mapping[str, Tensor], labels_F: Tensor) -> dict[str, Tensor]:
    """Neurons in the order of their labels (stable), so that expert e owns the e-th block; same function as before.

    Args:
        weights: ``gate_proj.weight`` and ``up_proj.weight`` ``[F, D]``, ``down_proj.weight`` ``[D, F]``, biases if any.
        labels_F: int64 labels.

    Raises:
        SpecError: a name that is none of these, or a shape that does not fit the labels.
    """
    order_F = labels_F.argsort(stable=True)
    out = {}
    for name, value in weights.items():
        # Told apart by name: the public code compares dimensions and fails for F <= D.
        axis = 1 if name == "down_proj.weight" else 0
        if name == "down_proj.bias":
            out[name] = value
            continue
        if name not in _ROWS and name != "down_proj.weight":
            raise SpecError(f"{name!r} is not a tensor of a SwiGLU layer.", nearest(name, (*_ROWS, "down_proj.weight")))
        if value.shape[axis] != len(labels_F):
            raise SpecError(f"{name} has shape {tuple(value.shape)}; axis {axis} should have {len(labels_F)} neurons.")
        out[name] = value.index_select(axis, order_F.to(value.device))
    return out


def unpermute_swiglu(weights: Mapping[str, Tensor], labels_F: Tensor) -> dict[str, Tensor]:
    """Inverse of :func:`permute_swiglu`: the merged dense layer."""
    # The order's inverse, written as labels: neuron order[i] went to place i.
    return permute_swiglu(weights, labels_F.argsort(stable=True))


def block_mask(score_E: Tensor, top_k: int) -> Tensor:
    """1 for the K best blocks of each token, 0 for the others; equal scores: the lower number first. No gradient."""
    best = score_E.detach().sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    return torch.zeros_like(score_E).scatter(-1, best, 1.0)


class BlockMaskedSwiGLU(nn.Module):
    """``down(mask * silu(gate x) * up x)``; parameters carry LLaMA's names.

    Args:
        gate_proj: ``[F, D]`` layer, neurons ordered by expert.
        up_proj: likewise.
        down_proj: ``[D, F]`` layer.
        num_experts: E, a divisor of F.
        top_k: K; values above E mean E.
        select: whose mean over a block is its score: the gate's pre-activation (official default), ``up``, the hidden
            vector ``inter``, or absolute values.

    Raises:
        SpecError: E does not divide F, K < 1, or an unknown ``select``.
    """

    def __init__(
        self,
        gate_proj: nn.Linear,
        up_proj: nn.Linear,
        down_proj: nn.Linear,
        num_experts: int,
        top_k: int,
        select: Select = "gate",
    ) -> None:
        super().__init__()
        check_divides(gate_proj.weight.shape[0], num_experts)
        if select not in SELECTS:
            raise SpecError(f"There is no score {select!r}.", nearest(select, SELECTS))
        if top_k < 1:
            raise SpecError(f"top_k={top_k} must be at least 1.")
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj
        self.num_experts, self.top_k, self.select = num_experts, min(top_k, num_experts), select

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` to ``[..., D]``."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        hidden = F.silu(gate) * up
        if self.top_k < self.num_experts:
            keep_E = block_mask(self._scores(gate, up, hidden), self.top_k).to(hidden.dtype)
            blocks = torch.unflatten(hidden, -1, (self.num_experts, -1))
            hidden = (blocks * keep_E.unsqueeze(-1)).flatten(-2)
        out: Tensor = self.down_proj(hidden)
        return out

    def _scores(self, gate: Tensor, up: Tensor, hidden: Tensor) -> Tensor:
        source = {"gate": gate, "up": up, "inter": hidden}[self.select.removesuffix("_abs")].detach()
        wide = source.to(torch.promote_types(source.dtype, torch.float32))
        if self.select.endswith("_abs"):
            wide = wide.abs()
        return torch.unflatten(wide, -1, (self.num_experts, -1)).mean(dim=-1)


def convert_swiglu(mlp: nn.Module, labels_F: Tensor, top_k: int, select: Select = "gate") -> BlockMaskedSwiGLU:
    """A LLaMA-style layer (``gate_proj``, ``up_proj``, ``down_proj``) with its neurons permuted, in masked form.

    The weights are permuted in place.

    Raises:
        SpecError: the layer has other parts, or labels that are not an equal split.
    """
    layers = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(isinstance(layer, nn.Linear) for layer in layers):
        raise SpecError(f"{type(mlp).__name__} is not a SwiGLU layer: it lacks gate_proj, up_proj or down_proj.")
    gate, up, down = (layer for layer in layers if isinstance(layer, nn.Linear))
    count = int(labels_F.max()) + 1
    check_labels(labels_F, gate.weight.shape[0], count)
    names = {f"{name}.{kind}" for name in ("gate_proj", "up_proj", "down_proj") for kind in ("weight", "bias")}
    own = {name: value for name, value in mlp.named_parameters() if name in names}
    with torch.no_grad():
        for name, value in permute_swiglu(own, labels_F).items():
            own[name].copy_(value)
    return BlockMaskedSwiGLU(gate, up, down, count, top_k, select)
