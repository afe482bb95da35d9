"""Graph regularisers: what signatures are drawn to besides the task.

- hinge repulsion: latents nearer than a hinge push each other away, so the graph stays sparse;
- block-model matching: the mediators' affinities, rows reordered at best, shall equal a block model (planted
  partition);
- distance mixture: likelihood of the pairwise distances under a Gaussian mixture that was fitted once.

``Parity:`` the matching permutes rows only, columns keep their order; a mixture's weights are renormalised.
``Differs:`` without any selected pair the mean of the hinge is 0, not NaN; the matching is solved as a transport
problem (same value, see ``moe.models.nac.matching``).

Shapes: n latents, Z signature width, L kernels, k clusters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from moe.errors import SpecError
from moe.models.nac.circuit import Circuit
from moe.models.nac.graph_specs import KernelSpec
from moe.models.nac.kernel import DotProductKernel, cosine_distance
from moe.models.nac.matching import row_costs, transport
from moe.models.nac.specs import CircuitSpec

Reduction = Literal["sum", "mean"]


def signature_hinge(signatures_nZ: Tensor, hinge: float = 0.4, reduction: Reduction = "sum") -> Tensor:
    """``-reduce(d)`` over the pairs of latents with cosine distance d below ``hinge``; which pairs is constant.

    Args:
        signatures_nZ: signatures of all latents: inputs, mediators, outputs.
        hinge: distance from which latents leave each other alone.
        reduction: ``sum`` or ``mean`` over the pairs (0 when there is none).
    """
    d = cosine_distance(signatures_nZ, signatures_nZ)
    near = (d.detach() < hinge).tril(-1).to(d.dtype)
    total = (d * near).sum()
    return -total if reduction == "sum" else -total / near.sum().clamp_min(1)


def block_model(count: int, num_clusters: int, p_in: float, p_out: float) -> Tensor:
    """The target affinities ``[n, n]``: ``p_in`` inside equal consecutive diagonal blocks, ``p_out`` elsewhere.

    Raises:
        SpecError: the clusters cannot be of equal size.
    """
    if num_clusters < 1 or count % num_clusters:
        raise SpecError(
            f"{count} latents cannot form {num_clusters} clusters of equal size.",
            "Choose num_clusters among the divisors of the number of latents.",
        )
    cluster = torch.arange(count) // (count // num_clusters)
    return torch.where(cluster[:, None] == cluster[None, :], p_in, p_out)


def match_rows(target_nn: Tensor, affinities_nn: Tensor, num_clusters: int) -> Tensor:
    """The row of ``affinities`` for each row of a block model, at the least total squared difference; int64 ``[n]``."""
    n = len(target_nn)
    size = n // num_clusters
    distinct = target_nn[::size].double().cpu().numpy()
    cluster = transport(row_costs(distinct, affinities_nn.detach().double().cpu().numpy()))
    return torch.from_numpy(np.argsort(cluster, kind="stable")).to(affinities_nn.device)


def block_model_loss(
    signatures_nZ: Tensor,
    bandwidths: Sequence[Tensor],
    *,
    num_clusters: int = 8,
    p_in: float = 0.9,
    p_out: float = 0.2,
    clip: float | None = None,
    truncation: float | None = 0.9,
) -> Tensor:
    """Squared difference of each layer's affinities, rows matched, to a block model, summed over layers.

    Args:
        signatures_nZ: signatures, usually the mediators'.
        bandwidths: scalars, one per kernel. Constant equal ones count once.
        num_clusters: clusters k of the target.
        p_in: target affinity inside a cluster.
        p_out: target affinity elsewhere.
        clip: squared differences below it are replaced by it.
        truncation: cut-off of the affinities.

    Raises:
        SpecError: unequal clusters, or values that are not finite.
    """
    used = list(bandwidths)
    if used and not any(b.requires_grad for b in used) and all(torch.equal(b, used[0]) for b in used):
        used = used[:1]
    target = block_model(len(signatures_nZ), num_clusters, p_in, p_out).to(signatures_nZ)
    kernel = DotProductKernel(KernelSpec(truncation=truncation)).to(signatures_nZ.device)
    loss = signatures_nZ.new_zeros(())
    for bandwidth in used:
        affinities = torch.func.functional_call(kernel, {"bandwidth": bandwidth}, (signatures_nZ, signatures_nZ))
        error = (affinities[match_rows(target, affinities, num_clusters)] - target).square()
        if clip is not None:
            error = torch.where(error < clip, clip, error)
        loss = loss + error.mean()
    return loss


def mixture_loss(
    signatures_nZ: Tensor, weights: Tensor, means: Tensor, sigmas: Tensor, reduction: Reduction = "mean"
) -> Tensor:
    """Negative log-likelihood of the pairwise cosine distances under a Gaussian mixture.

    Args:
        signatures_nZ: signatures of all latents.
        weights: of the components, brought to sum 1.
        means: of the components.
        sigmas: standard deviations, above 0.
        reduction: over the pairs.
    """
    d = cosine_distance(signatures_nZ, signatures_nZ)
    rows, columns = torch.tril_indices(len(d), len(d), -1, device=d.device)
    pairs = d[rows, columns].unsqueeze(-1)
    log_weights = (weights / weights.sum()).log()
    log_density = -0.5 * ((pairs - means) / sigmas).square() - sigmas.log() - 0.5 * math.log(2 * math.pi)
    nll = -torch.logsumexp(log_weights + log_density, dim=-1)
    return nll.sum() if reduction == "sum" else nll.mean()


def fit_mixture(signatures_nZ: Tensor, num_components: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, means and standard deviations of a Gaussian mixture of the pairwise distances (scikit-learn's EM).

    Raises:
        SpecError: fewer pairs than components.
    """
    from sklearn.mixture import GaussianMixture

    d = cosine_distance(signatures_nZ.detach(), signatures_nZ.detach())
    rows, columns = torch.tril_indices(len(d), len(d), -1)
    if len(rows) < num_components:
        raise SpecError(f"{len(rows)} pairs of latents are too few for a mixture of {num_components} components.")
    pairs = d[rows, columns].double().cpu().numpy()[:, None]
    mixture = GaussianMixture(num_components, random_state=seed).fit(pairs)
    parts = (mixture.weights_, mixture.means_[:, 0], np.sqrt(mixture.covariances_[:, 0, 0]))
    weights, means, sigmas = (torch.from_numpy(np.asarray(part)).to(signatures_nZ) for part in parts)
    return weights, means, sigmas


class RegularizerKwargs(BaseModel):
    """``criterion.graph_sparsity.kwargs``: which latents, and the block model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_clusters: int = Field(default=8, ge=1, description="Clusters of the block model, or mixture components.")
    p_in: float = Field(default=0.9, ge=0, le=1, description="Affinity inside a cluster.")
    p_out: float = Field(default=0.2, ge=0, le=1, description="Affinity between clusters.")
    clip: float | None = Field(default=None, ge=0, description="Squared differences below it count as much as it.")
    truncation: float = Field(default=0.9, gt=0, le=2, description="Cut-off of the affinities.")
    regularize_input_latents: bool = Field(default=False, description="Include the input latents.")
    regularize_mediator_latents: bool = Field(default=True, description="Include the mediators.")
    regularize_output_latents: bool = Field(default=False, description="Include the output latents.")


class RegularizerSpec(BaseModel):
    """``criterion.graph_sparsity`` of the published configurations."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal[
        "signature_hinge_repulsion", "stochastic_block_model_regularization", "signature_distribution_regularization"
    ] = Field(default="signature_hinge_repulsion", description="Kind of regulariser.")
    use: bool = Field(default=True, description="Whether it is used at all.")
    weight: float = Field(default=1.0, ge=0, le=1e6, description="Factor of the loss.")
    hinge: float = Field(default=0.4, ge=0, le=2, description="Hinge of the repulsion.")
    reduction: Reduction = Field(default="sum", description="Of the repulsion, over pairs.")
    kwargs: RegularizerKwargs = Field(default_factory=RegularizerKwargs, description="Block model.")


def graph_regularizer(circuit: Circuit, spec: RegularizerSpec, mixture: Sequence[Tensor] = ()) -> Tensor:
    """The unweighted regulariser of a circuit (0 when it is not used); training adds ``spec.weight`` times it.

    Args:
        circuit: whose signatures and bandwidths are drawn to the target.
        spec: which regulariser.
        mixture: for ``signature_distribution_regularization``, what :func:`fit_mixture` returned, once, at the start.

    Raises:
        SpecError: as :func:`block_model_loss`; no latents, or no mixture.
    """
    signatures = circuit.signatures()
    if not spec.use:
        return signatures["mediator"].new_zeros(())
    if spec.type == "signature_hinge_repulsion":
        return signature_hinge(torch.cat(list(signatures.values())), spec.hinge, spec.reduction)
    if spec.type == "signature_distribution_regularization":
        if len(mixture) != 3:
            raise SpecError("The distance regulariser needs its mixture.", "Pass fit_mixture(signatures) as mixture.")
        weights, means, sigmas = mixture
        return mixture_loss(torch.cat(list(signatures.values())), weights, means, sigmas)
    own = spec.kwargs
    chosen = [value for role, value in signatures.items() if getattr(own, f"regularize_{role}_latents")]
    if not chosen:
        raise SpecError("Block-model matching regularises no latents.", "Set regularize_mediator_latents: true.")
    return block_model_loss(
        torch.cat(chosen),
        circuit.bandwidths(),
        num_clusters=own.num_clusters,
        p_in=own.p_in,
        p_out=own.p_out,
        clip=own.clip,
        truncation=own.truncation,
    )


def regularizer_warnings(circuit: CircuitSpec, spec: RegularizerSpec) -> list[str]:
    """What is legal but probably not meant: a block model with another number of clusters than the graph prior."""
    prior = circuit.latent_graph_kwargs.mediator_latent_kwargs
    groups = prior.graph_generator_kwargs.get("l")
    matched = spec.use and spec.type == "stochastic_block_model_regularization"
    if not matched or prior.graph_preset != "planted-partition" or groups in (None, spec.kwargs.num_clusters):
        return []
    return [
        f"The graph prior has {groups} groups, the regulariser {spec.kwargs.num_clusters} clusters, as in the official "
        f"configuration; kwargs.num_clusters={groups} makes them agree."
    ]
