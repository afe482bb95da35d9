"""Gates: how well each expert fits a token, as logits that are computed in float32 or wider.

- :class:`LinearGate`: ``x W^T (+ b)`` (GShard, Switch, fastmoe's gates, and EMoE's avg-k gate, whose rows are the mean
  keys of the experts: :func:`updated_gate`).
- :class:`CosineGate`: cosine between a projection of the token and a learned codebook (GMoE, arXiv 2206.04046; Chi et
  al., arXiv 2204.09179), times a learned scale.
- :class:`NoisyGate`: a clean logit and a learned standard deviation (Shazeer et al., arXiv 1701.06538, equation 4).

What becomes of the logits (noise, choice, weights, capacity, losses) is ``moe.layers.router``.

Known differences: the cosine gate divides by the token's norm after the product with the codebook, which spares a pass
over the projection; equal up to rounding.

Shapes: N tokens, D width, E experts, P projection width, H hidden width of an expert.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.errors import SpecError
from moe.layers.gemm import linear, matmul
from moe.router_spec import RouterSpec

_EPS = 1e-12  # the usual floor of a norm before dividing by it


class LinearGate(nn.Linear):
    """Linear gate that always computes in float32 (or wider), also under autocast.

    Args:
        dim: width D.
        num_experts: E.
        normalize_input: scale each token to unit length first.
        bias: add one number per expert (fastmoe's gates do).
    """

    def __init__(self, dim: int, num_experts: int, normalize_input: bool = False, bias: bool = False) -> None:
        super().__init__(dim, num_experts, bias=bias)
        self.normalize_input = normalize_input

    def forward(self, input: Tensor) -> Tensor:
        """Logits ``[N, E]`` of tokens ``[N, D]``."""
        wide = wider(input)
        with torch.autocast(input.device.type, enabled=False):
            x_ND = input.to(wide)
            if self.normalize_input:
                x_ND = F.normalize(x_ND, dim=-1, eps=_EPS)
            return F.linear(x_ND, self.weight.to(wide), None if self.bias is None else self.bias.to(wide))


class CosineGate(nn.Module):
    """``scale * cos(project(x), codebook column e)`` with ``scale = exp(min(temperature, ln max_scale))``.

    State: ``projector.{weight,bias}`` ``[P, D]``, ``[P]``; ``sim_matrix`` ``[P, E]``; ``temperature`` ``[1]``, the
    logarithm of the scale. Above ``max_scale`` the temperature gets no gradient.

    Args:
        dim: width D.
        num_experts: E.
        projection: width P in which token and codebook meet.
        temperature: initial temperature; the scale begins at its inverse.
        max_scale: largest scale.
    """

    def __init__(
        self, dim: int, num_experts: int, projection: int = 256, temperature: float = 0.5, max_scale: float = 100.0
    ) -> None:
        super().__init__()
        self.max_scale = max_scale
        self.temperature = nn.Parameter(torch.full((1,), math.log(1.0 / temperature)))
        self.projector = nn.Linear(dim, projection)
        self.sim_matrix = nn.Parameter(torch.empty(projection, num_experts))
        nn.init.normal_(self.sim_matrix, std=0.01)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Logits ``[N, E]`` of tokens ``[N, D]``."""
        wide = wider(x_ND)
        with torch.autocast(x_ND.device.type, enabled=False):
            scale = self.temperature.to(wide).clamp(max=math.log(self.max_scale)).exp()
            code_PE = F.normalize(self.sim_matrix.to(wide), dim=0, eps=_EPS) * scale
            u_NP = linear(x_ND.to(wide), self.projector.weight.to(wide), self.projector.bias.to(wide))
            # Not vector_norm: the second derivative of a norm is NaN at a token that is projected to zero.
            return matmul(u_NP, code_PE) * u_NP.square().sum(-1, keepdim=True).clamp_min(_EPS**2).rsqrt()


class NoisyGate(nn.Module):
    """Clean logits ``x w_gate`` and a learned noise ``softplus(x w_noise) + epsilon``.

    State: ``w_gate`` and ``w_noise``, both ``[D, E]``, zero at the start so that every expert is equally likely.

    Args:
        dim: width D.
        num_experts: E.
        noise_epsilon: smallest standard deviation of the noise.
    """

    def __init__(self, dim: int, num_experts: int, noise_epsilon: float = 1e-2) -> None:
        super().__init__()
        self.noise_epsilon = noise_epsilon
        self.w_gate = nn.Parameter(torch.zeros(dim, num_experts))
        self.w_noise = nn.Parameter(torch.zeros(dim, num_experts))

    def forward(self, x_ND: Tensor) -> Tensor:
        """Clean logits ``[N, E]`` of tokens ``[N, D]``."""
        return self._product(x_ND, self.w_gate)

    def deviation(self, x_ND: Tensor) -> Tensor:
        """Standard deviation ``[N, E]`` of the training noise of each logit."""
        return F.softplus(self._product(x_ND, self.w_noise)) + self.noise_epsilon

    def _product(self, x_ND: Tensor, weight_DE: Tensor) -> Tensor:
        wide = wider(x_ND)
        with torch.autocast(x_ND.device.type, enabled=False):
            return x_ND.to(wide) @ weight_DE.to(wide)


Gate = LinearGate | CosineGate | NoisyGate


def build_gate(spec: RouterSpec, dim: int, num_experts: int) -> Gate:
    """The gate that ``spec.gate`` names, freshly initialised.

    The avg-k gate is a linear gate outside the optimiser's reach (``requires_grad`` False): it follows the experts'
    keys through :func:`updated_gate`.
    """
    if spec.gate == "cosine":
        return CosineGate(dim, num_experts, spec.projection, spec.temperature, spec.max_scale)
    if spec.gate == "noisy":
        return NoisyGate(dim, num_experts, spec.noise_epsilon)
    gate = LinearGate(dim, num_experts, spec.normalize_input, bias=spec.gate in ("naive", "gshard", "switch"))
    return gate.requires_grad_(spec.gate != "avg_k")


def key_means(w1_EHD: Tensor, w2_EDH: Tensor | None = None, *, normalize: bool = False) -> Tensor:
    """Mean key of each expert ``[E, D]``: the rows of EMoE's avg-k gate (arXiv 2310.10908, section 3).

    Args:
        w1_EHD: first weights; a row is the key of one neuron.
        w2_EDH: second weights; given, each key counts in proportion to the norm of its value within the expert.
        normalize: scale the means to unit length.

    Raises:
        SpecError: the two weights do not belong together.
    """
    if w2_EDH is None:
        means_ED = w1_EHD.mean(dim=1)
    else:
        experts, hidden, dim = w1_EHD.shape
        if tuple(w2_EDH.shape) != (experts, dim, hidden):
            raise SpecError(
                f"Values of shape {tuple(w2_EDH.shape)} do not belong to keys of shape {tuple(w1_EHD.shape)}.",
                f"Expected [E, D, H] = {(experts, dim, hidden)}.",
            )
        norms_EH = torch.linalg.vector_norm(w2_EDH, dim=1)
        share_EH = norms_EH / norms_EH.sum(dim=1, keepdim=True)
        means_ED = torch.einsum("eh,ehd->ed", share_EH, w1_EHD)
    return F.normalize(means_ED, dim=-1, eps=_EPS) if normalize else means_ED


def updated_gate(
    gate_ED: Tensor,
    w1_EHD: Tensor,
    w2_EDH: Tensor | None = None,
    *,
    momentum: float = 0.0,
    normalize: bool = False,
) -> Tensor:
    """The avg-k gate after an optimiser step: ``momentum * gate + (1 - momentum) * key_means``; see :func:`key_means`.

    Raises:
        SpecError: momentum outside [0, 1], or a gate of another shape.
    """
    if not 0.0 <= momentum <= 1.0:
        raise SpecError(f"The gate's momentum is {momentum}.", "It must lie between 0 (no memory) and 1 (frozen).")
    means_ED = key_means(w1_EHD, w2_EDH, normalize=normalize).to(gate_ED.dtype)
    if means_ED.shape != gate_ED.shape:
        raise SpecError(f"A gate of shape {tuple(gate_ED.shape)} cannot follow keys {tuple(w1_EHD.shape)}.")
    return momentum * gate_ED + (1.0 - momentum) * means_ED


def wider(x: Tensor) -> torch.dtype:
    """float32, or the input's own type when that is wider."""
    return torch.promote_types(x.dtype, torch.float32)
