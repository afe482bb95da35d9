"""Which neurons of a dense feed-forward layer form an expert, and the experts made of them.

EMoE (arXiv 2310.10908; section 3.1): a feed-forward layer is a memory of keys (rows of its first matrix) and values
(columns of its second); balanced k-means on the normalised keys finds the groups that pretraining has formed.

Parity: keys are normalised per row, the bias is ignored, an expert's neurons keep their order, every expert carries
``b2 / K`` so that any K of them add the output bias once.
Differs: the public code's "random cluster" is ``neuron // s``; here that is ``contiguous``, and ``random`` is random.

Shapes: F neurons, D width, E experts, s = F / E neurons of an expert (times the repeat), K chosen experts.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.conversion import balanced
from moe.conversion.coactivation import coactivation_graph, partition_graph, rebalance
from moe.errors import SpecError, nearest

SplitMethod = Literal["balanced", "contiguous", "random", "coactivation"]
SPLITS: tuple[SplitMethod, ...] = ("balanced", "contiguous", "random", "coactivation")
Layout = Literal["linear", "conv1d"]


@dataclass(frozen=True)
class DenseFFN:
    """Weights of ``y = act(x k^T + b1) v^T + b2``, in the layout of linear layers.

    Attributes:
        keys_FD: first layer's weight.
        bias_F: its bias.
        values_DF: second layer's weight.
        bias_D: its bias.
    """

    keys_FD: Tensor
    bias_F: Tensor
    values_DF: Tensor
    bias_D: Tensor

    def __post_init__(self) -> None:
        """Refuse shapes that do not belong together; nothing is ever transposed silently."""
        if self.keys_FD.ndim != 2:
            raise SpecError(f"The first layer's weight has shape {tuple(self.keys_FD.shape)}, expected [F, D].")
        neurons, width = self.keys_FD.shape
        expected = {"bias_F": (neurons,), "values_DF": (width, neurons), "bias_D": (width,)}
        for name, shape in expected.items():
            seen = tuple(getattr(self, name).shape)
            if seen != shape:
                raise SpecError(
                    f"{name} has shape {seen}, expected {shape} beside keys of shape {(neurons, width)}.",
                    "Is the layer a GPT-2 convolution (layout conv1d), or are two layers mixed up?",
                )

    @classmethod
    def of(cls, first: nn.Module, second: nn.Module) -> DenseFFN:
        """Weights of two layers: ``nn.Linear``, or GPT-2's ``Conv1D`` with its weight stored ``[in, out]``.

        Absent biases count as zeros. The tensors are detached views; clone before changing them.
        """
        layout = layout_of(first)
        return cls.from_tensors(first.weight, first.bias, second.weight, second.bias, layout)  # type: ignore[arg-type]

    @classmethod
    def from_tensors(
        cls, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, layout: Layout = "linear"
    ) -> DenseFFN:
        """From raw tensors; ``conv1d`` means weights stored ``[in, out]``."""
        keys, values = (w1, w2) if layout == "linear" else (w1.t(), w2.t())
        bias_f = keys.new_zeros(keys.shape[0]) if b1 is None else b1
        bias_d = keys.new_zeros(values.shape[0]) if b2 is None else b2
        return cls(keys.detach(), bias_f.detach(), values.detach(), bias_d.detach())


class ExpertTensors(NamedTuple):
    """Stacked experts, in the layout of the public checkpoints.

    Attributes:
        fc1_EsD: keys.
        bias_Es: their biases.
        fc2_EsD: values, one row a neuron.
        bias_ED: each expert's share of the output bias.
    """

    fc1_EsD: Tensor
    bias_Es: Tensor
    fc2_EsD: Tensor
    bias_ED: Tensor


def layout_of(layer: nn.Module) -> Layout:
    """``conv1d`` for GPT-2's convolution (stored [in, out]), ``linear`` for ``nn.Linear``.

    Raises:
        SpecError: another kind of layer.
    """
    if isinstance(layer, nn.Linear):
        return "linear"
    if type(layer).__name__ == "Conv1D":
        return "conv1d"
    raise SpecError(f"A layer of type {type(layer).__name__} cannot be split.", "Expected nn.Linear or GPT-2's Conv1D.")


def split_keys(
    keys_FD: Tensor,
    num_experts: int,
    method: SplitMethod = "balanced",
    *,
    seed: int = 0,
    restarts: int = 10,
    hidden_TD: Tensor | None = None,
) -> Tensor:
    """Labels int64 ``[F]`` that put F/E neurons into each of E experts.

    Args:
        keys_FD: first layer's weight (of a SwiGLU layer: ``gate_proj``), any float type.
        num_experts: E, a divisor of F.
        method: ``balanced`` (k-means on normalised keys), ``contiguous`` (neuron // s), ``random`` (a random
            permutation), ``coactivation`` (METIS on the graph of neurons that fire together, then rebalanced).
        seed: of everything random.
        restarts: starts of k-means; the official value is 10.
        hidden_TD: inputs of the layer, for ``coactivation`` only.

    Raises:
        SpecError: E does not divide F, values that are not finite, an unknown method, or hidden inputs missing.
        EnvironmentProblem: ``coactivation`` without the extra ``graph``.
    """
    neurons = keys_FD.shape[0]
    check_divides(neurons, num_experts)
    if method == "contiguous":
        return torch.arange(neurons) // (neurons // num_experts)
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(neurons, generator=generator) // (neurons // num_experts)
    if method == "coactivation":
        if hidden_TD is None:
            raise SpecError("The co-activation split needs inputs of the layer.", "Pass hidden_TD.")
        edges = coactivation_graph(keys_FD, hidden_TD)
        labels = partition_graph(edges, num_experts, seed)
        return rebalance(labels, num_experts, torch.Generator().manual_seed(seed))
    if method != "balanced":
        raise SpecError(f"There is no split named {method!r}.", nearest(method, SPLITS))
    found = balanced.balanced_kmeans(normalized_rows(keys_FD).numpy(), num_experts, seed=seed, restarts=restarts)
    return torch.from_numpy(found.labels_N)


def normalized_rows(keys_FD: Tensor) -> Tensor:
    """Rows of unit length, float64 on the CPU (zero rows stay zero)."""
    return F.normalize(keys_FD.detach().cpu().double(), dim=1, eps=1e-12)


def split_objective(keys_FD: Tensor, labels_F: Tensor) -> float:
    """What balanced k-means minimises: summed squared distance of normalised keys to their group's mean."""
    return balanced.inertia(normalized_rows(keys_FD).numpy(), labels_F.cpu().numpy())


def split_digest(keys_FD: Tensor, num_experts: int, method: str = "balanced", seed: int = 0, restarts: int = 10) -> str:
    """Name under which labels may be kept: SHA-256 of the keys' bytes and of everything else that decides the split.

    Differs: the public caches are named by layer number and shape only, so that two models share labels silently.
    """
    keys = keys_FD.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{method} {num_experts} {seed} {restarts} {keys.dtype} {tuple(keys.shape)}".encode())
    digest.update(keys.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_labels(labels_F: Tensor, neurons: int, num_experts: int) -> None:
    """Refuse labels that are not an equal split.

    Raises:
        SpecError: wrong length or type, a label outside 0..E-1, or groups of unequal size.
    """
    check_divides(neurons, num_experts)
    if labels_F.shape != (neurons,) or labels_F.is_floating_point():
        raise SpecError(
            f"Labels have shape {tuple(labels_F.shape)} and type {labels_F.dtype}, expected {neurons} integers."
        )
    low, high = int(labels_F.min()), int(labels_F.max())
    if low < 0 or high >= num_experts:
        raise SpecError(f"Labels run from {low} to {high}, expected 0 to {num_experts - 1}.")
    sizes = torch.bincount(labels_F.long(), minlength=num_experts)
    if not bool((sizes == neurons // num_experts).all()):
        raise SpecError(
            f"The experts have {int(sizes.min())} to {int(sizes.max())} neurons, expected {neurons // num_experts}.",
            "Rebalance the labels first.",
        )


def check_divides(neurons: int, num_experts: int) -> None:
    """Raises SpecError unless E divides F."""
    if num_experts < 1 or neurons < 1 or neurons % num_experts:
        divisors = [e for e in range(1, neurons + 1) if neurons % e == 0]
        close = sorted(sorted(divisors, key=lambda e: abs(e - num_experts))[:4])
        raise SpecError(
            f"{neurons} neurons cannot be split into {num_experts} equal experts.",
            f"Divisors nearby: {', '.join(map(str, close))}." if close else "",
        )


def neurons_of_experts(labels_F: Tensor, num_experts: int, repeat: int = 1) -> Tensor:
    """Neuron numbers int64 ``[E, repeat * s]``, ascending within an expert.

    Expert e takes the groups ``e .. e + repeat - 1`` (modulo E); ``repeat = E`` gives every expert all neurons.

    Raises:
        SpecError: labels that are not an equal split, or a repeat outside 1..E.
    """
    check_labels(labels_F, labels_F.shape[0], num_experts)
    if not 1 <= repeat <= num_experts:
        raise SpecError(f"expert_repeat={repeat} is outside 1..{num_experts}, the number of experts.")
    groups_Es = labels_F.argsort(stable=True).view(num_experts, -1)
    member = (torch.arange(num_experts).unsqueeze(1) + torch.arange(repeat)) % num_experts
    return groups_Es[member].flatten(1).sort(dim=1).values


def gather_experts(
    dense: DenseFFN, labels_F: Tensor, num_experts: int, top_k: int, repeat: int = 1, *, copy: bool = False
) -> ExpertTensors:
    """Experts cut out of a dense layer; the sum over all E with K = E is the dense layer again (repeat 1).

    Args:
        dense: the layer.
        labels_F: :func:`split_keys`; ignored with ``copy``.
        num_experts: E.
        top_k: K as given; each expert carries ``bias_D / K``.
        repeat: groups per expert (parameters grow as much).
        copy: every expert is the whole layer, output bias undivided (GMoE's upcycling).

    Returns:
        New tensors; the dense layer is untouched.
    """
    if top_k < 1:
        raise SpecError(f"top_k={top_k} must be at least 1.")
    if copy:
        expand = [dense.keys_FD, dense.bias_F, dense.values_DF.t(), dense.bias_D]
        return ExpertTensors(*(x.unsqueeze(0).repeat(num_experts, *[1] * x.ndim) for x in expand))
    check_labels(labels_F, dense.keys_FD.shape[0], num_experts)
    index_Es = neurons_of_experts(labels_F.cpu(), num_experts, repeat).to(dense.keys_FD.device)
    share_D = dense.bias_D / top_k
    return ExpertTensors(
        dense.keys_FD[index_Es],
        dense.bias_F[index_Es],
        dense.values_DF.t()[index_Es],
        share_D.unsqueeze(0).repeat(num_experts, 1),
    )
