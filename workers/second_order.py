"""Convolution and frozen BatchNorm in a form whose second derivative is cheap. Same values, gradients and names.

Meta-training differentiates twice through networks in evaluation mode. Two things make that needlessly slow:

- The second derivative of a BatchNorm call is many passes over the activations, though with frozen statistics it is a
  constant affine map: ``bn(conv(x)) = conv'(x)`` with ``W' = W * s``, ``b' = bias - mean * s``,
  ``s = weight / sqrt(var + eps)``.
- PyTorch's double backward of a convolution computes the weight's part by convolving with activations as kernels, which
  CPU libraries are bad at. One call of the ordinary backward with the incoming second-order gradients in place of
  input and weight gives the same two results (:class:`_ConvBackward`).

Measured in ``benchmarks.meta_step``. In float64 gradients agree to 1e-14 (``tests/workers/test_second_order.py``).
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_TOLERANCE = 1e-3


class _Geometry(NamedTuple):
    """Stride, padding and dilation (height, width), and groups."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, g: _Geometry) -> Tensor:
    return F.conv2d(x, weight, bias, g.stride, g.padding, g.dilation, g.groups)


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: bool, g: _Geometry, mask: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and bias, as far as ``mask`` asks for them."""
    sizes = [weight.shape[0]] if bias else None
    found = torch.ops.aten.convolution_backward(
        grad, x, weight, sizes, g.stride, g.padding, g.dilation, False, [0, 0], g.groups, mask
    )
    return cast("tuple[Tensor | None, Tensor | None, Tensor | None]", found)


class _Conv(torch.autograd.Function):
    """A convolution whose backward is :class:`_ConvBackward`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: _Geometry) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.bias = geometry, bias is not None
        return _convolve(x, weight, bias, geometry)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs = tuple(ctx.needs_input_grad[:3])
        found = _ConvBackward.apply(grad_outputs[0], x, weight, ctx.bias, ctx.geometry, needs)  # type: ignore[no-untyped-call]
        return (*found, None)


class _ConvBackward(torch.autograd.Function):
    """``(grad, x, weight) -> gradients of x, weight, bias``; linear in each, so its own backward is two calls of it."""

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, bias: bool, geometry: _Geometry, mask: tuple[bool, ...]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        ctx.save_for_backward(grad, x, weight)
        ctx.geometry = geometry
        ctx.set_materialize_grads(False)
        return _backward(grad, x, weight, bias, geometry, list(mask))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        on_x, on_weight, on_bias = grad_outputs
        grad, x, weight = ctx.saved_tensors
        parts: list[Tensor] = []
        if ctx.needs_input_grad[0]:
            if on_x is not None:
                parts.append(_convolve(on_x, weight, None, ctx.geometry))
            if on_weight is not None:
                parts.append(_convolve(x, on_weight, None, ctx.geometry))
            if on_bias is not None:
                parts.append(on_bias.view(1, -1, 1, 1).expand_as(grad))
        # The gradient of x needs (grad, on_weight), that of weight (grad, on_x): one ordinary backward gives both.
        mask = [
            ctx.needs_input_grad[1] and on_weight is not None,
            ctx.needs_input_grad[2] and on_x is not None,
            False,
        ]
        of_x: Tensor | None = None
        of_weight: Tensor | None = None
        if any(mask):
            as_x, as_weight = x if on_x is None else on_x, weight if on_weight is None else on_weight
            of_x, of_weight, _ = _backward(grad, as_x, as_weight, False, ctx.geometry, mask)
        total = None
        for part in parts:
            total = part if total is None else total + part
        return total, of_x, of_weight, None, None, None


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: _Geometry) -> Tensor:
    """``F.conv2d`` with a cheap second derivative; follows autocast as that does."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return cast(Tensor, _Conv.apply(x, weight, bias, geometry))  # type: ignore[no-untyped-call]
    dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        low = None if bias is None else bias.to(dtype)
        return cast(Tensor, _Conv.apply(x.to(dtype), weight.to(dtype), low, geometry))  # type: ignore[no-untyped-call]


class SecondOrderConv2d(nn.Conv2d):
    """A convolution that may carry the BatchNorm after it while that one is frozen."""

    # A tuple, so that the BatchNorm is not registered a second time as a child of this module.
    carried: tuple[nn.BatchNorm2d, ...] = ()

    def forward(self, input: Tensor) -> Tensor:
        """As :class:`torch.nn.Conv2d`; includes the carried BatchNorm when that is in evaluation mode."""
        weight, bias = self.weight, self.bias
        if self.carried and not self.carried[0].training:
            scale, shift = _affine(self.carried[0])
            weight = weight * scale.view(-1, 1, 1, 1)
            bias = shift if bias is None else shift + bias * scale
        padding = cast("tuple[int, int]", self.padding)
        stride, dilation = cast("tuple[int, int]", self.stride), cast("tuple[int, int]", self.dilation)
        return convolution(input, weight, bias, _Geometry(stride, padding, dilation, self.groups))


class CarriedBatchNorm2d(nn.BatchNorm2d):
    """A BatchNorm that does nothing in evaluation mode, because the convolution before it does its work."""

    def forward(self, input: Tensor) -> Tensor:
        """The input in evaluation mode, BatchNorm in training mode."""
        return super().forward(input) if self.training else input


class AffineBatchNorm2d(nn.BatchNorm2d):
    """A BatchNorm that is one multiplication and one addition in evaluation mode."""

    def forward(self, input: Tensor) -> Tensor:
        """``input * scale + shift`` in evaluation mode, BatchNorm in training mode."""
        if self.training:
            return super().forward(input)
        scale, shift = (value.view(1, -1, 1, 1).to(input.dtype) for value in _affine(self))
        return input * scale + shift


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift per channel, differentiable in weight and bias."""
    mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    return scale, norm.bias - mean * scale


def prepare(module: nn.Module, probe: Tensor) -> int:
    """Rewrite convolutions and BatchNorms below ``module`` in place; returns how many BatchNorms were folded.

    Foldable pairs are found by construction (neighbours in a ``Sequential``, ``convN`` and ``bnN`` of one block) and
    checked on ``probe``: when the outputs differ by more than rounding, no BatchNorm is folded.

    Args:
        module: images to features; stays in its mode. Names, state dict and training mode do not change.
        probe: a few inputs.
    """
    was_training = module.training
    module.eval()
    norms = [child for child in module.modules() if type(child) is nn.BatchNorm2d and _frozen(child)]
    pairs = [(conv, norm) for conv, norm in _pairs(module) if norm in norms]
    with torch.no_grad():
        expected = module(probe)
        for child in module.modules():
            if type(child) is nn.Conv2d and _plain(child):
                child.__class__ = SecondOrderConv2d
        pairs = [(conv, norm) for conv, norm in pairs if isinstance(conv, SecondOrderConv2d)]
        for conv, norm in pairs:
            cast(SecondOrderConv2d, conv).carried = (norm,)
            norm.__class__ = CarriedBatchNorm2d
        found = module(probe)
    if float((found - expected).abs().max()) > _TOLERANCE * float(expected.abs().max()):
        for conv, norm in pairs:
            cast(SecondOrderConv2d, conv).carried = ()
            norm.__class__ = nn.BatchNorm2d
        pairs = []
    for norm in norms:
        if type(norm) is nn.BatchNorm2d:
            norm.__class__ = AffineBatchNorm2d
    module.train(was_training)
    return len(pairs)


def _frozen(norm: nn.BatchNorm2d) -> bool:
    return norm.running_mean is not None and norm.affine


def _plain(conv: nn.Conv2d) -> bool:
    return conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


def _pairs(module: nn.Module) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    found: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []
    for block in module.modules():
        children = dict(block.named_children())
        if isinstance(block, nn.Sequential):
            candidates = list(itertools.pairwise(children.values()))
        else:
            named = [(child, children.get(name.replace("conv", "bn"))) for name, child in children.items()]
            candidates = [(child, norm) for child, norm in named if norm is not None and norm is not child]
        found += [
            (conv, norm)
            for conv, norm in candidates
            if type(conv) is nn.Conv2d and isinstance(norm, nn.BatchNorm2d) and conv.out_channels == norm.num_features
        ]
    return found
