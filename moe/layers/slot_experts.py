"""Experts that each process the same number of slots: parallel MLPs, a parallel convolution and a parallel LayerNorm.

Source: MoE Jetpack (arXiv 2406.04801) and its released code; names of parameters are those of its checkpoints
(``vit_fc1``, ``vit_fc2``, and ``eva_*`` for gated experts).

Known differences: experts start like ``nn.Linear`` by default. Parity: ``init="official"`` repeats the released bound
``1 / sqrt(in x out)``, which comes from a fan-in over three dimensions.

Shapes: B batch, E experts, S slots per expert, D width, H hidden, M = B * S rows per expert, I inputs, O outputs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.errors import SpecError
from moe.jetpack_specs import ExpertInit
from moe.layers.draws import NO_DRAWS, Draws, dropout
from moe.layers.slot_product import slot_linear


class ExpertLinear(nn.Module):
    """E linear maps; ``weight`` [E, O, I], ``bias`` [E, O]."""

    def __init__(self, num_experts: int, inputs: int, outputs: int, init: ExpertInit = "linear") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(num_experts, outputs))
        self.init: ExpertInit = init
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform weights within ``1 / sqrt(I)`` (linear) or ``1 / sqrt(I * O)`` (official); biases zero."""
        outputs, inputs = self.weight.shape[1:]
        bound = 1 / math.sqrt(max(1, inputs * outputs if self.init == "official" else inputs))
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.zeros_(self.bias)

    def forward(self, x_EMI: Tensor) -> Tensor:
        """``[E, M, I]`` to ``[E, M, O]``."""
        return slot_linear(x_EMI, self.weight, self.bias)


class ExpertLayerNorm(nn.Module):
    """LayerNorm with a weight and a bias per expert, and ``eps`` added to the standard deviation.

    Args:
        num_experts: E.
        dim: normalised width.
        eps: added to the (biased) standard deviation, not to the variance.
    """

    def __init__(self, num_experts: int, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_experts, dim))
        self.bias = nn.Parameter(torch.zeros(num_experts, dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """``[E, M, dim]`` of the same shape."""
        centred = x - x.mean(-1, keepdim=True)
        # The norm has a gradient of zero where all entries are equal; the root of a variance would give NaN there.
        std = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / math.sqrt(x.shape[-1])
        out: Tensor = centred / (std + self.eps) * self.weight.unsqueeze(1) + self.bias.unsqueeze(1)
        return out


class Affine(nn.Module):
    """``x * gamma + beta`` over the last dimension."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))
        self.beta = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return x * self.gamma + self.beta


class ExpertMLP(nn.Module):
    """E two-layer networks side by side: ``w2 gelu(w1 x)``, or gated ``w2 norm(silu(g x) * (v x))``.

    Args:
        dim: width D.
        hidden: hidden width H.
        num_experts: E.
        glu: gated experts (``eva_*``).
        layer_scale: affine maps before and after, shared by all experts.
        inner_layernorm: LayerNorm over H before the second map, shared; not for gated experts, which have their own.
        drop: dropout of the result, and of the hidden layer when ``drop_act`` is None.
        drop_act: dropout of the hidden layer.
        init: start of the weights.

    Raises:
        SpecError: sizes below 1, or ``inner_layernorm`` with ``glu``.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        *,
        glu: bool = False,
        layer_scale: bool = False,
        inner_layernorm: bool = False,
        drop: float = 0.0,
        drop_act: float | None = None,
        init: ExpertInit = "linear",
    ) -> None:
        super().__init__()
        if min(dim, hidden, num_experts) < 1:
            raise SpecError(
                f"{num_experts} experts of width {dim} and hidden width {hidden} cannot be built.",
                "All three are at least 1; a small univ_factor or compress_ratio may round the hidden width to 0.",
            )
        if glu and inner_layernorm:
            raise SpecError("inner_layernorm is for plain experts; gated ones have a norm per expert.", "Leave it off.")
        self.dim, self.hidden, self.num_experts, self.glu = dim, hidden, num_experts, glu
        self.drop, self.drop_act = drop, drop if drop_act is None else drop_act
        if glu:
            self.eva_fc1_g = ExpertLinear(num_experts, dim, hidden, init)
            self.eva_fc1_x = ExpertLinear(num_experts, dim, hidden, init)
            self.eva_norm = ExpertLayerNorm(num_experts, hidden)
            self.eva_fc2 = ExpertLinear(num_experts, hidden, dim, init)
        else:
            self.vit_fc1 = ExpertLinear(num_experts, dim, hidden, init)
            self.vit_fc2 = ExpertLinear(num_experts, hidden, dim, init)
        self.norm = nn.LayerNorm(hidden) if inner_layernorm else nn.Identity()
        self.scale_in = Affine(dim) if layer_scale else nn.Identity()
        self.scale_out = Affine(dim) if layer_scale else nn.Identity()

    def forward(self, x_BESD: Tensor, draws: Draws = NO_DRAWS) -> Tensor:
        """Results of the experts, ``[B, E, S, D]`` like the input.

        Args:
            x_BESD: slots; expert e processes ``x[:, e]``.
            draws: dropout masks ``drop_1`` [B, E, S, H] and ``drop_2`` [B, E, S, D], when injected.

        Raises:
            SpecError: the input has another number of experts or another width.
        """
        if x_BESD.ndim != 4 or x_BESD.shape[1] != self.num_experts or x_BESD.shape[3] != self.dim:
            raise SpecError(
                f"Slots have shape {tuple(x_BESD.shape)}.",
                f"Expected [B, {self.num_experts}, S, {self.dim}]: {self.num_experts} experts of width {self.dim}.",
            )
        x_EMD = by_expert(self.scale_in(x_BESD))
        if self.glu:
            h_EMH = F.silu(self.eva_fc1_g(x_EMD)) * self.eva_fc1_x(x_EMD)
            h_EMH = self._drop(h_EMH, "drop_1", self.drop_act, draws)
            y_EMD = self.eva_fc2(self.eva_norm(h_EMH))
        else:
            h_EMH = self._drop(F.gelu(self.vit_fc1(x_EMD)), "drop_1", self.drop_act, draws)
            y_EMD = self.vit_fc2(self.norm(h_EMH))
        y_EMD = self._drop(y_EMD, "drop_2", self.drop, draws)
        batch, experts, slots, dim = x_BESD.shape
        out: Tensor = self.scale_out(y_EMD.view(experts, batch, slots, dim).transpose(0, 1))
        return out

    def _drop(self, x_EMX: Tensor, name: str, rate: float, draws: Draws) -> Tensor:
        mask = draws.masks.get(name)
        return dropout(x_EMX, rate, self.training, None if mask is None else by_expert(mask))


def by_expert(x_BESD: Tensor) -> Tensor:
    """``[B, E, S, X]`` as rows by expert ``[E, B * S, X]``."""
    return x_BESD.transpose(0, 1).flatten(1, 2)


class ExpertConv2d(nn.Module):
    """The released convolution over experts: one kernel per expert, **summed** over the experts.

    Parity: it is a 3-D convolution whose depth is the number of experts, so one map is left, to which every expert's
    bias is added. No released model uses it.

    Args:
        in_channels: Cin.
        out_channels: Cout.
        num_experts: E.
        kernel: side of the square kernel.
        stride: of height and width.
        padding: of height and width.
        bias: a bias per expert and channel.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_experts: int,
        kernel: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, num_experts, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(num_experts, out_channels)) if bias else None
        self.stride, self.padding = (1, stride, stride), (0, padding, padding)
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, Cin, E, h, w]`` to ``[B, Cout, E, h', w']`` with bias and ``[B, Cout, 1, h', w']`` without."""
        summed = F.conv3d(x, self.weight, stride=self.stride, padding=self.padding)
        return summed if self.bias is None else summed + self.bias.t()[:, :, None, None]
