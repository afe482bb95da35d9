"""Who talks to whom: the affinity of signatures.

The cosine distance d of a receiver's and a sender's signature, divided by a learned bandwidth, is a negative
log-affinity. Edges beyond a cut-off distance are closed. In training each edge may be a relaxed Bernoulli sample.

``Parity:`` as in the official code, a closed edge keeps the probability eps = 2^-23 when edges are sampled, so that a
softmax still sees it; in evaluation it is truly closed.
``Differs:`` a receiver all of whose edges are closed gets affinities of 0 (log -inf), not NaN.

Shapes: B batch, U receivers, V senders, Z signature width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.errors import SpecError
from moe.models.nac.draws import Draws, draws_or_default
from moe.models.nac.graph_specs import KernelSpec
from moe.models.nac.modfc import L2_EPS
from moe.models.nac.products import log_probability, worth_it

OPERATIONS_OF_AN_EDGE = 20
"""About what an exponential and a logarithm cost, in multiplications."""


def cosine_distance(receiver_UZ: Tensor, sender_VZ: Tensor) -> Tensor:
    """``1 - cosine`` of all pairs, ``[U, V]``, in float32 or wider whatever the autocast state.

    Raises:
        SpecError: signatures of different widths.
    """
    if receiver_UZ.shape[-1] != sender_VZ.shape[-1]:
        raise SpecError(f"Signatures of shapes {tuple(receiver_UZ.shape)} and {tuple(sender_VZ.shape)} do not compare.")
    wide = torch.promote_types(receiver_UZ.dtype, torch.float32)
    with torch.autocast(receiver_UZ.device.type, enabled=False):
        receiver = F.normalize(receiver_UZ.to(wide), dim=-1, eps=L2_EPS)
        sender = F.normalize(sender_VZ.to(wide), dim=-1, eps=L2_EPS)
        return 1 - receiver @ sender.transpose(-1, -2)


def relaxed_edges(log_p: Tensor, uniform_BUV: Tensor, temperature: float) -> Tensor:
    """Logarithm of relaxed Bernoulli samples with probabilities ``exp(log_p)``.

    Args:
        log_p: ``[U, V]``, -inf for a closed edge.
        uniform_BUV: draws in [0, 1).
        temperature: of the relaxation.

    Returns:
        ``[B, U, V]``, each at most ``log(1 - eps)``.
    """
    limits = torch.finfo(log_p.dtype)
    p = log_p.exp()
    # Rounding may lift a self-connection above 1; that clamp passes gradients, the next ones do not.
    p = p + (p.clamp(0, 1) - p).detach()
    p = p.clamp(limits.eps, 1 - limits.eps)
    z = (torch.logit(uniform_BUV, eps=limits.eps) + (p.log() - torch.log1p(-p))) / temperature
    if worth_it(z, OPERATIONS_OF_AN_EDGE * z.numel()):
        return log_probability(z)
    return F.logsigmoid(z).clamp(math.log(limits.tiny), math.log1p(-limits.eps))


def log_normalize(log_affinity: Tensor) -> Tensor:
    """Subtract the log-sum over senders; rows without an open edge stay -inf."""
    is_open = (log_affinity > -math.inf).any(dim=-1, keepdim=True)
    normal = torch.where(is_open, log_affinity, 0.0).log_softmax(dim=-1)
    return torch.where(is_open, normal, -math.inf)


class DotProductKernel(nn.Module):
    """Affinities of signatures; see the module's text.

    Tensor: the scalar ``bandwidth`` (a parameter, or a buffer if it is not learnable).

    Args:
        spec: cut-off, sampling, bandwidth.
        normalize_along_senders: affinities of a receiver sum to 1.
    """

    bandwidth: Tensor

    def __init__(self, spec: KernelSpec, normalize_along_senders: bool = False) -> None:
        super().__init__()
        self.spec = spec
        self.normalize_along_senders = normalize_along_senders
        start = torch.tensor(spec.initial_bandwidth)
        if spec.learnable_bandwidth:
            self.bandwidth = nn.Parameter(start)
        else:
            self.register_buffer("bandwidth", start)

    def distance(self, receiver_UZ: Tensor, sender_VZ: Tensor) -> Tensor:
        """Scaled distances ``d / bandwidth``, +inf where cut."""
        scaled = cosine_distance(receiver_UZ, sender_VZ) / self.bandwidth
        if self.spec.truncation is None or self.spec.truncation_implementation == "masked":
            return scaled
        cut = scaled.detach() > self.spec.truncation / self.bandwidth.detach()
        return scaled.masked_fill(cut, math.inf)

    def log(
        self,
        receiver_UZ: Tensor,
        sender_VZ: Tensor,
        batch: int = 1,
        draws: Draws | None = None,
        *,
        for_softmax: bool = False,
    ) -> Tensor:
        """Log-affinities ``[U, V]``; ``[B, U, V]`` when edges are sampled (training, ``stochastic_kernel``).

        Draw: ``uniform`` (``[B, U, V]``), when edges are sampled.

        Args:
            receiver_UZ: signatures.
            sender_VZ: signatures.
            batch: samples B.
            draws: random numbers.
            for_softmax: leave out the normalisation along senders, which a softmax over them undoes.
        """
        normalize = self.normalize_along_senders and not for_softmax
        y = -self.distance(receiver_UZ, sender_VZ)
        if self.spec.truncation is not None and self.spec.truncation_implementation == "masked":
            y = y.masked_fill(self._cut(receiver_UZ, sender_VZ), -math.inf)
        if self.training and self.spec.stochastic_kernel:
            u = draws_or_default(draws).uniform("uniform", (batch, *y.shape), y)
            y = relaxed_edges(y, u, self.spec.stochastic_sampling_temperature)
            return y.log_softmax(dim=-1) if normalize else y
        return log_normalize(y) if normalize else y

    def plain(self, receiver_UZ: Tensor, sender_VZ: Tensor) -> Tensor:
        """Affinities ``[U, V]``, never sampled."""
        y = (-self.distance(receiver_UZ, sender_VZ)).exp()
        if self.spec.truncation is not None and self.spec.truncation_implementation == "masked":
            kept = y.detach().masked_fill(self._cut(receiver_UZ, sender_VZ), 0.0)
            y = kept + (y - y.detach())
        if not self.normalize_along_senders:
            return y
        total = y.sum(dim=-1, keepdim=True)
        return y / torch.where(total == 0, 1.0, total)

    def forward(self, receiver_UZ: Tensor, sender_VZ: Tensor) -> Tensor:
        """As :meth:`plain`."""
        return self.plain(receiver_UZ, sender_VZ)

    def _cut(self, receiver_UZ: Tensor, sender_VZ: Tensor) -> Tensor:
        """Edges that the ``masked`` form closes: those not nearer than the cut-off."""
        return ~(cosine_distance(receiver_UZ, sender_VZ).detach() < (self.spec.truncation or math.inf))
