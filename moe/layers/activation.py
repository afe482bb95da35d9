"""What all kernels share: the weights as one bundle, activations by name, the place of dropout.

The derivatives of the activations can be differentiated again.

Shapes: E experts, D width in, H hidden, O width out.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.errors import SpecError, nearest

Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)


class Weights(NamedTuple):
    """Stacked weights of E two-layer networks.

    Attributes:
        w1: ``[E, H, D]``.
        b1: ``[E, H]`` or None.
        w2: ``[E, O, H]``.
        b2: ``[E, O]`` or None.
    """

    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None


def check_activation(name: str) -> Activation:
    """The name itself, or ``gelu_tanh`` for its other name ``gelu_new``. Raises SpecError when there is none such."""
    for known in ACTIVATIONS:
        if name == known:
            return known
    if name == "gelu_new":
        return "gelu_tanh"
    raise SpecError(f"There is no activation {name!r}.", nearest(name, ACTIVATIONS))


def activate(h: Tensor, activation: Activation) -> Tensor:
    """``gelu`` is the exact one (erf), ``gelu_tanh`` the tanh approximation; any shape."""
    if activation == "gelu":
        return F.gelu(h)
    if activation == "gelu_tanh":
        return F.gelu(h, approximate="tanh")
    return F.relu(h) if activation == "relu" else F.silu(h)


def activation_gradient(grad: Tensor, h: Tensor, activation: Activation) -> Tensor:
    """``grad * activation'(h)``, itself differentiable with respect to both."""
    out: Tensor
    if activation in ("gelu", "gelu_tanh"):
        out = torch.ops.aten.gelu_backward(grad, h, approximate="none" if activation == "gelu" else "tanh")
    elif activation == "relu":
        out = torch.ops.aten.threshold_backward(grad, h, 0)
    elif torch.is_grad_enabled():  # the fused form has no derivative of its own
        gate = h.sigmoid()
        out = grad * gate * (1 + h * (1 - gate))
    else:
        out = torch.ops.aten.silu_backward(grad, h)
    return out


class Hidden(NamedTuple):
    """From pre-activations to hidden units.

    Attributes:
        activation: by name.
        dropout_first: multiply by the dropout factors before the activation instead of after it.
    """

    activation: Activation
    dropout_first: bool = False

    def __call__(self, h: Tensor, mask: Tensor | None) -> Tensor:
        """Hidden units of pre-activations ``h`` under dropout factors ``mask`` (same shape) or none."""
        if mask is None:
            return activate(h, self.activation)
        if self.dropout_first:
            return activate(h * mask, self.activation)
        return activate(h, self.activation) * mask

    def gradient(self, da: Tensor, h: Tensor, mask: Tensor | None) -> Tensor:
        """Gradient of the pre-activations from the gradient ``da`` of the hidden units; differentiable itself."""
        if mask is None:
            return activation_gradient(da, h, self.activation)
        if self.dropout_first:
            return activation_gradient(da, h * mask, self.activation) * mask
        return activation_gradient(da * mask, h, self.activation)
