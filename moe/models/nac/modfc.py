"""Modulated linear layers: one weight matrix for all latents, scaled per latent by its code.

A latent's code decides what it computes: the input is scaled channel by channel with a normalised linear map of the
code, then goes through the weight matrix that all latents share (Neural Attentive Circuits, NeurIPS 2022, section 3).

- ``ModFC``: ``y = W n(s * x) + b`` with ``s = gain * norm(V code) (+ 1)``.
- ``FC``: ``y = W x + b``, the code is ignored.
- ``WModFC``: the weight is scaled instead and each of its rows brought to norm 1, as in StyleGAN2.

Because all latents share ``W``, a latent's projection of a token need not be computed token by token: see
``moe.models.nac.read_in``, which uses :meth:`ModLinear.scale` and the weight directly.

Known differences: none for ModFC (golden vectors); WModFC follows StyleGAN2's definition.

Shapes: B batch, U latents, I input width, O output width, C code width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.errors import SpecError
from moe.models.nac.graph_specs import ModFCSpec, Normalization
from moe.models.nac.products import linear, modulated, worth_it

EPS = 1e-5
"""Epsilon of all layer norms of a circuit."""

L2_EPS = 1e-12
DEMODULATION_EPS = 1e-8


def normalize(x: Tensor, kind: Normalization) -> Tensor:
    """``ln`` (no affine part), ``l2``, ``sigmoid``, ``tanh`` or ``none``, over the last axis."""
    if kind == "ln":
        return F.layer_norm(x, x.shape[-1:], eps=EPS)
    if kind == "l2":
        return F.normalize(x, dim=-1, eps=L2_EPS)
    if kind == "sigmoid":
        return torch.sigmoid(x)
    return torch.tanh(x) if kind == "tanh" else x


class ModLinear(nn.Module):
    """A linear layer under the control of codes.

    Tensors: ``native_weight`` [O, I], ``native_bias`` [O], and but for ``FC`` ``scale.weight`` [I, C] and, if it is
    trained, the scalar ``scale_gain``.

    Args:
        in_features: input width I.
        out_features: output width O.
        context_features: code width C.
        spec: kind and options.
        bias: whether there is a bias.
    """

    def __init__(
        self, in_features: int, out_features: int, context_features: int, spec: ModFCSpec, bias: bool = True
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.context_features = in_features, out_features, context_features
        self.spec = spec
        self.native_weight = nn.Parameter(torch.empty(out_features, in_features))
        self.native_bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        nn.init.kaiming_uniform_(self.native_weight, a=math.sqrt(5))
        self.scale_gain: nn.Parameter | float = spec.scale_gain
        if spec.kind != "FC":
            self.scale = nn.Linear(context_features, in_features, bias=False)
            if spec.learnable_scale_gain:
                self.scale_gain = nn.Parameter(torch.tensor(spec.scale_gain))

    def input_scale(self, code: Tensor) -> Tensor | None:
        """The factor of the input, ``[..., I]`` for codes ``[..., C]``; None where codes do not matter (``FC``).

        Raises:
            SpecError: codes of another width.
        """
        if self.spec.kind == "FC":
            return None
        if code.shape[-1] != self.context_features:
            raise SpecError(f"Codes of shape {tuple(code.shape)} cannot modulate a layer made for width "
                            f"{self.context_features}.")  # fmt: skip
        weight = self.scale.weight
        fast = code.ndim == 2 and worth_it(code, code.numel() * self.in_features)
        mapped = linear(code, weight) if fast else F.linear(code, weight)
        s = self.scale_gain * normalize(mapped, self.spec.scale_normalization_type)
        return s + 1 if self.spec.add_one_to_scale else s

    def demodulation(self, scale: Tensor) -> Tensor:
        """Row norms of the scaled weight, ``[..., O]`` for scales ``[..., I]`` (``WModFC``)."""
        return ((scale**2) @ (self.native_weight**2).T + DEMODULATION_EPS).sqrt()

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        """Map states.

        Args:
            x: ``[B, U, I]``.
            code: ``[U, C]``, or ``[1, C]`` for one code of all latents.

        Returns:
            ``[B, U, O]``.

        Raises:
            SpecError: the width of ``x`` or of the code does not fit.
        """
        if x.shape[-1] != self.in_features:
            raise SpecError(f"A modulated layer of input width {self.in_features} got states of {tuple(x.shape)}.")
        scale = self.input_scale(code)
        if scale is None:
            return F.linear(x, self.native_weight, self.native_bias)
        plain = self.spec.kind == "ModFC" and self.spec.scale_times_input_normalization_type == "none"
        if plain and x.ndim == 3 and scale.ndim == 2 and worth_it(x, x.numel() * self.out_features):
            return modulated(x, scale, self.native_weight, self.native_bias)
        h = normalize(x * scale, self.spec.scale_times_input_normalization_type)
        if self.spec.kind == "ModFC":
            return F.linear(h, self.native_weight, self.native_bias)
        y = F.linear(h, self.native_weight) / self.demodulation(scale)
        return y if self.native_bias is None else y + self.native_bias

    def extra_repr(self) -> str:
        """Widths and kind."""
        return f"{self.spec.kind}, {self.in_features} -> {self.out_features}, code {self.context_features}"


class LayerScale(nn.Module):
    """Channel-wise learned factor ``gamma`` of a residual branch; without a start value it does nothing.

    Args:
        dim: channels.
        initial: start of every factor; None for no factor (and no tensor).
    """

    def __init__(self, dim: int, initial: float | None) -> None:
        super().__init__()
        self.gamma = None if initial is None else nn.Parameter(torch.full((dim,), float(initial)))

    def forward(self, x: Tensor) -> Tensor:
        """``x * gamma``."""
        return x if self.gamma is None else x * self.gamma
