"""The inner step: pull the student's features of an unlabelled support batch to the teacher by gradient descent.

``theta' = theta - alpha * d/dtheta mean((t - f_theta(x))^2)`` on the feature parameters; head and MoE block stay.
Nothing is changed in place: the adapted tensors are returned by name. Used with a graph in meta-training and without
one at test time. Source: Meta-DMoE (arXiv 2210.03885), equation 3.

Shapes: S support images, D feature width, P adapted tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from moe.errors import SpecError
from moe.losses import l2_loss
from moe.student import Student

Graph = Literal["full", "target", "none"]


@dataclass(frozen=True)
class InnerResult:
    """Outcome of the inner steps.

    Attributes:
        adapted: student name -> adapted tensor, for the parameters that move.
        losses: scalar inner loss before each step, without a graph.
        features_SD: features of the support batch before the first step, without a graph.
        gradients: student name -> inner gradient, summed over the steps, without a graph; empty with graph ``full``.
        probes: with graph ``target``: per step, the residual that the inner gradient was computed from (a leaf) and the
            gradient as a function of it; see :func:`push_forward`.
    """

    adapted: dict[str, Tensor]
    losses: list[Tensor]
    features_SD: Tensor
    gradients: dict[str, Tensor]
    probes: list[tuple[Tensor, dict[str, Tensor]]]


def adapted_parameters(student: Student, adapt: str = "all") -> dict[str, nn.Parameter]:
    """The feature parameters that the inner step moves, by student name.

    Args:
        student: the model; parameters that do not require gradients never move.
        adapt: ``all``, or ``norm`` for weights and biases of normalisation layers.

    Raises:
        SpecError: nothing is left to adapt.
    """
    chosen = {name: p for name, p in student.features.named_parameters(prefix="features") if p.requires_grad}
    if adapt == "norm":
        norms = {name for name, module in student.features.named_modules(prefix="features") if is_norm(module)}
        chosen = {name: p for name, p in chosen.items() if name.rpartition(".")[0] in norms}
    if not chosen:
        raise SpecError(
            f"The student has no feature parameters to adapt (adapt={adapt!r}).",
            "Use adapt: all, or a backbone with normalisation layers, and do not freeze it.",
        )
    return chosen


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a normalisation layer (batch, layer, group, instance, RMS, and timm's relatives)."""
    return "norm" in type(module).__name__.lower() and bool(list(module.parameters(recurse=False)))


def inner_step(
    student: Student,
    support: Tensor,
    target_SD: Tensor,
    rates: Mapping[str, Tensor | float],
    steps: int = 1,
    graph: Graph = "none",
    parameters: Mapping[str, Tensor] | None = None,
) -> InnerResult:
    """Take ``steps`` gradient steps towards the target.

    Args:
        student: in evaluation mode; neither its parameters nor its statistics are touched.
        support: images ``[S, C, H, W]``.
        target_SD: teacher features ``[S, D]``.
        rates: student name -> inner rate; exactly these feature parameters move.
        steps: inner steps, >= 1.
        graph: ``full`` keeps everything for second-order gradients; ``target`` keeps what :func:`push_forward` needs;
            ``none`` keeps nothing and gives leaves without gradients.
        parameters: start from these tensors instead of the student's own.

    Raises:
        SpecError: the teacher's width is not the student's.
    """
    own = dict(student.features.named_parameters(prefix="features"))
    start = {name: (parameters or own)[name] for name in rates}
    if graph != "full":
        start = {name: value.detach().requires_grad_() for name, value in start.items()}
    losses: list[Tensor] = []
    probes: list[tuple[Tensor, dict[str, Tensor]]] = []
    seen: list[Tensor] = []
    sums: dict[str, Tensor] = {}
    current = start
    # Only the plain attention kernel can be differentiated twice.
    kernel = nullcontext() if graph == "none" else sdpa_kernel(SDPBackend.MATH)
    with torch.enable_grad(), kernel:
        for _ in range(steps):
            features_SD = student.extract(support, current)
            seen.append(features_SD.detach())
            loss, gradient, probe = _gradient(features_SD, target_SD, current, graph)
            losses.append(loss.detach())
            probes.extend(probe)
            current = {name: value - rates[name] * gradient[name] for name, value in current.items()}
            if graph != "full":
                sums = {name: sums[name] + g if name in sums else g for name, g in gradient.items()}
                current = {name: value.detach().requires_grad_() for name, value in current.items()}
    if graph == "none":
        current = {name: value.detach() for name, value in current.items()}
    return InnerResult(current, losses, seen[0], sums, probes)


def _gradient(
    features_SD: Tensor, target_SD: Tensor, current: Mapping[str, Tensor], graph: Graph
) -> tuple[Tensor, dict[str, Tensor], list[tuple[Tensor, dict[str, Tensor]]]]:
    """Inner loss, its gradient by name, and the probe of graph ``target``."""
    if features_SD.shape != target_SD.shape:
        raise SpecError(
            f"Teacher features have shape {tuple(target_SD.shape)}, the student's {tuple(features_SD.shape)}.",
            "Experts, aggregator and student must share one feature width.",
        )
    tensors = list(current.values())
    if graph == "full":
        loss = l2_loss(features_SD, target_SD)
        found = torch.autograd.grad(loss, tensors, create_graph=True, allow_unused=True)
        return loss, _named(current, found), []
    loss = l2_loss(features_SD.detach(), target_SD.detach())
    wide = features_SD.detach().to(loss.dtype)
    residual_SD = ((wide - target_SD.detach()) * (2.0 / features_SD.numel())).to(features_SD.dtype)
    if graph == "none":
        found = torch.autograd.grad(features_SD, tensors, residual_SD, allow_unused=True)
        return loss, _named(current, found), []
    residual_SD.requires_grad_()
    found = torch.autograd.grad(features_SD, tensors, residual_SD, create_graph=True, allow_unused=True)
    gradient = _named(current, found)
    return loss, {name: value.detach() for name, value in gradient.items()}, [(residual_SD, gradient)]


def push_forward(probe: tuple[Tensor, dict[str, Tensor]], direction: Mapping[str, Tensor]) -> Tensor:
    """``J u``: how the support features ``[S, D]`` change when the parameters move along ``direction``.

    The inner gradient is ``J^T r``, linear in the residual r; differentiating ``<J^T r, u>`` with respect to r gives
    ``J u``. It needs no forward-mode differentiation, so it also works through collective calls.
    """
    residual_SD, gradient = probe
    pairs = [(value, direction[name]) for name, value in gradient.items() if value.requires_grad]
    (change_SD,) = torch.autograd.grad([g for g, _ in pairs], [residual_SD], [u for _, u in pairs])
    return change_SD


def _named(current: Mapping[str, Tensor], found: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
    """Gradients by name; parameters that do not reach the features get zeros."""
    return {
        name: torch.zeros_like(value) if g is None else g
        for (name, value), g in zip(current.items(), found, strict=True)
    }


def uniform_rates(student: Student, rate: float, adapt: str = "all") -> dict[str, Tensor | float]:
    """The same inner rate for every adapted parameter."""
    return dict.fromkeys(adapted_parameters(student, adapt), rate)
