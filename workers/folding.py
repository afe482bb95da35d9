"""BatchNorm with frozen statistics, computed as what it is: a constant affine map per channel.

In evaluation mode ``bn(conv(x)) = conv'(x)`` with ``W' = W * s`` and ``b' = bias - mean * s``, ``s = weight / sqrt(var +
eps)``. Meta-training keeps the statistics frozen and differentiates twice, and the second derivative of a BatchNorm
call is many passes over the activations; that of the folded convolution is none. Values and gradients of every
parameter stay the same up to rounding, names and state dict are untouched, and training mode behaves as before.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

_TOLERANCE = 1e-3


class FoldedConv2d(nn.Conv2d):
    """A convolution that carries the BatchNorm after it while that one is frozen. Made by :func:`fold_batchnorm`."""

    # A tuple, so that the BatchNorm is not registered a second time as a child of this module.
    folded: tuple[nn.BatchNorm2d]

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own argument name
        """As :class:`torch.nn.Conv2d`, followed by the affine map when the BatchNorm is in evaluation mode."""
        norm = self.folded[0]
        if norm.training:
            return super().forward(input)
        scale, shift = _affine(norm)
        if self.bias is not None:
            shift = shift + self.bias * scale
        return self._conv_forward(input, self.weight * scale.view(-1, 1, 1, 1), shift)


class CarriedBatchNorm2d(nn.BatchNorm2d):
    """A BatchNorm that does nothing in evaluation mode, because the convolution before it does its work."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own argument name
        """The input in evaluation mode, BatchNorm in training mode."""
        return super().forward(input) if self.training else input


class AffineBatchNorm2d(nn.BatchNorm2d):
    """A BatchNorm that is one multiplication and one addition in evaluation mode."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own argument name
        """``input * scale + shift`` in evaluation mode, BatchNorm in training mode."""
        if self.training:
            return super().forward(input)
        scale, shift = _affine(self)
        wide = input.dtype
        return input * scale.view(1, -1, 1, 1).to(wide) + shift.view(1, -1, 1, 1).to(wide)


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift per channel, differentiable in weight and bias."""
    mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    return scale, norm.bias - mean * scale


def fold_batchnorm(module: nn.Module, probe: Tensor) -> int:
    """Rewrite the BatchNorms below ``module`` in place; returns how many were folded into a convolution.

    Pairs are found by construction (neighbours in a ``Sequential``, ``convN`` and ``bnN`` of one block) and checked on
    ``probe``: when the outputs differ by more than rounding, nothing is changed.

    Args:
        module: images to features; left in the mode that it was in.
        probe: a few inputs.
    """
    was_training = module.training
    module.eval()
    norms = [child for child in module.modules() if type(child) is nn.BatchNorm2d and _frozen(child)]
    pairs = [pair for pair in _pairs(module) if pair[1] in norms]
    with torch.no_grad():
        before = module(probe)
        for conv, norm in pairs:
            conv.__class__, norm.__class__ = FoldedConv2d, CarriedBatchNorm2d
            cast(FoldedConv2d, conv).folded = (norm,)
        for norm in norms:
            if type(norm) is nn.BatchNorm2d:
                norm.__class__ = AffineBatchNorm2d
        after = module(probe)
    if float((after - before).abs().max()) > _TOLERANCE * float(before.abs().max()):
        for conv, _ in pairs:
            conv.__class__ = nn.Conv2d
        for norm in norms:
            norm.__class__ = nn.BatchNorm2d
        pairs = []
    module.train(was_training)
    return len(pairs)


def _frozen(norm: nn.BatchNorm2d) -> bool:
    return norm.running_mean is not None and norm.affine


def _pairs(module: nn.Module) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    found: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []
    for block in module.modules():
        children = dict(block.named_children())
        if isinstance(block, nn.Sequential):
            order = list(children.values())
            candidates = list(zip(order, order[1:], strict=False))
        else:
            candidates = [
                (child, children[name.replace("conv", "bn")])
                for name, child in children.items()
                if name.startswith("conv") and name.replace("conv", "bn") in children
            ]
        found += [
            (conv, norm)
            for conv, norm in candidates
            if type(conv) is nn.Conv2d and isinstance(norm, nn.BatchNorm2d) and conv.out_channels == norm.num_features
        ]
    return found
