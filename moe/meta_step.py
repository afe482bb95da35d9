"""One meta-distillation step: from an episode of one domain to gradients for student and aggregator.

With theta = student features, h = head (and MoE block), phi = aggregator, o = expert that owns the domain::

    t      = A_phi({ M_e(x_support) : e != o })
    theta' = theta - alpha * grad_theta mean((t - f_theta(x_support))^2)
    L      = task_loss(h(f_theta'(x_query)), y_query)

L is minimised over theta, h (rate beta_s) and phi (rate beta_t). Source: Meta-DMoE (arXiv 2210.03885), algorithm 1 and
public code. Everything stays in evaluation mode: frozen BatchNorm statistics, no dropout.

Three orders (``MetaStepSpec.order``): ``second`` differentiates through the inner step. ``first`` takes the inner
gradient as a constant; the aggregator then gets no gradient. ``exact_aggregator`` does so for the student only and
computes the aggregator's gradient exactly: with ``v = dL/dtheta'`` and n = S * D, ``dL/dt = alpha * (2/n) * J v``
where J is the Jacobian of the support features (with several inner steps: summed, the steps taken as independent).

Shapes: S support images, Q query images, E experts, D feature width, P adapted tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from moe.aggregator import Aggregator, AggregatorOutput, mask_tokens
from moe.inner import Graph, InnerResult, adapted_parameters, inner_step, push_forward
from moe.losses import Losses, task_loss
from moe.specs import MetaStepSpec
from moe.student import Student


@dataclass(frozen=True)
class Episode:
    """One batch of one domain.

    Attributes:
        support: images ``[S, C, H, W]``, labels unused.
        query: images ``[Q, C, H, W]``.
        query_labels: targets of the query images, ``[Q]``.
        tokens_SED: features of the support images from all E frozen experts.
        owners_S: int64 ``[S]``, expert that owns the domain; None is allowed where nothing is excluded.
    """

    support: Tensor
    query: Tensor
    query_labels: Tensor
    tokens_SED: Tensor
    owners_S: Tensor | None = None

    def to(self, device: torch.device | str) -> Episode:
        """A copy on ``device``."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        arguments: dict[str, Any] = {name: None if x is None else x.to(device) for name, x in moved.items()}
        return Episode(**arguments)


class InnerRates(nn.Module):
    """One learned inner rate per adapted tensor, starting from ``inner_lr``.

    Rates are free to shrink to nothing or to change sign: the steps that help a tensor need not point where the
    distance to the teacher falls fastest. Source: per-layer rates of MAML++ (arXiv 1810.09502).
    """

    def __init__(self, names: Sequence[str], inner_lr: float) -> None:
        super().__init__()
        self.names = tuple(names)
        self.rate = nn.Parameter(torch.full((len(self.names),), float(inner_lr)))

    def forward(self) -> dict[str, Tensor]:
        """Student name -> rate, scalar with a graph."""
        return dict(zip(self.names, self.rate.unbind(), strict=True))

    def values(self) -> dict[str, float]:
        """Student name -> rate; what test-time adaptation needs (``distill`` option ``rates``)."""
        with torch.no_grad():
            return {name: float(rate) for name, rate in self().items()}


def meta_losses(
    student: Student,
    aggregator: Aggregator,
    episode: Episode,
    config: MetaStepSpec,
    task: str = "multiclass",
    rates: Mapping[str, Tensor] | None = None,
) -> Losses:
    """Losses of one episode; ``total.backward()`` gives the gradients of all parameters.

    Args:
        student: evaluation mode (its MoE block may be in training mode, where capacity applies).
        aggregator: evaluation mode.
        episode: the batch.
        config: inner step, order, exclusion.
        task: ``multiclass``, ``binary`` or ``regression``.
        rates: learned inner rates by student name; ``config.inner_lr`` for all when left out.

    Returns:
        ``total`` = query loss (+ weighted balance loss); parts ``query_loss``, ``inner_loss`` (before the first inner
        step), and where they apply ``balance`` (unweighted), ``inner_loss_last``, ``loss_before``.

    Raises:
        SpecError: shapes or owners that do not fit together.
    """
    chosen = adapted_parameters(student, config.adapt)
    given: Mapping[str, Tensor | float] = rates if rates is not None else dict.fromkeys(chosen, config.inner_lr)
    with _autocast(config, episode.support.device):
        target_SD = teacher(aggregator, episode, config)
        if config.order == "second" or not torch.is_grad_enabled():
            graph: Graph = "full" if torch.is_grad_enabled() else "none"
            inner = inner_step(student, episode.support, target_SD, given, config.inner_steps, graph)
            total, parts = _query(student, episode, inner.adapted, task)
        else:
            total, parts, inner = _stored_gradients(student, target_SD, episode, config, task, given)
    parts["inner_loss"] = inner.losses[0]
    if config.inner_steps > 1:
        parts["inner_loss_last"] = inner.losses[-1]
    if config.loss_before:
        # Differs: the public code runs this pass with a graph that nobody uses.
        with torch.no_grad(), _autocast(config, episode.support.device):
            parts["loss_before"] = task_loss(task, student(episode.query), episode.query_labels)
    return Losses(total, parts)


def teacher(aggregator: Aggregator, episode: Episode, config: MetaStepSpec) -> Tensor:
    """Teacher features ``[S, D]`` of the support images, with the owner's token hidden as configured."""
    tokens = mask_tokens(episode.tokens_SED, episode.owners_S, config.exclusion)
    # With a constant inner gradient nothing flows back to the aggregator.
    with torch.set_grad_enabled(torch.is_grad_enabled() and config.order != "first"):
        out: AggregatorOutput = aggregator(tokens)
    return out.feat_BD


def _query(
    student: Student, episode: Episode, adapted: Mapping[str, Tensor], task: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of the adapted student on the query images, with the weighted balance loss, and the parts."""
    out = student.run(episode.query, adapted)
    loss = task_loss(task, out.logits_BK, episode.query_labels)
    parts = {"query_loss": loss.detach()}
    if out.balance is None:
        return loss, parts
    parts["balance"] = out.balance.detach()
    return loss + balance_weight(student) * out.balance, parts


def balance_weight(student: Student) -> float:
    """Weight of the balance loss of the student's MoE block (0 without a block)."""
    spec = getattr(student.moe, "spec", None)
    return 0.0 if spec is None else float(spec.balance_weight)


def _stored_gradients(
    student: Student,
    target_SD: Tensor,
    episode: Episode,
    config: MetaStepSpec,
    task: str,
    rates: Mapping[str, Tensor | float],
) -> tuple[Tensor, dict[str, Tensor], InnerResult]:
    """Orders ``first`` and ``exact_aggregator``: gradients are computed here and handed out by ``backward``."""
    fixed = {name: rate.detach() if isinstance(rate, Tensor) else rate for name, rate in rates.items()}
    exact = config.order == "exact_aggregator"
    graph: Graph = "target" if exact else "none"
    inner = inner_step(student, episode.support, target_SD, fixed, config.inner_steps, graph)
    moved = {name: value.detach().requires_grad_() for name, value in inner.adapted.items()}
    own = dict(student.named_parameters())
    # Head, MoE block and whatever the inner step does not move are learned by their plain gradient.
    others = {name: p for name, p in own.items() if name not in moved and p.requires_grad}
    loss, parts = _query(student, episode, moved, task)
    found = torch.autograd.grad(loss, [*moved.values(), *others.values()], allow_unused=True, materialize_grads=True)
    sinks: list[Tensor] = [own[name] for name in [*moved, *others]]
    stored = list(zip(sinks, found, strict=True))
    slopes = dict(zip(moved, found, strict=False))
    for name, rate in rates.items():
        if isinstance(rate, Tensor):  # theta' = theta - rate * g, so dL/drate = -<dL/dtheta', g>
            stored.append((rate, -(slopes[name] * inner.gradients[name]).sum()))
    if exact:
        stored.append((target_SD, _teacher_gradient(inner, target_SD, slopes, fixed)))
    pairs = [(sink, g) for sink, g in stored if sink.requires_grad]
    total: Tensor = _Stored.apply(loss.detach(), [g for _, g in pairs], *(sink for sink, _ in pairs))  # type: ignore[no-untyped-call]
    return total, parts, inner


def _teacher_gradient(
    inner: InnerResult, target_SD: Tensor, slopes: Mapping[str, Tensor], rates: Mapping[str, Tensor | float]
) -> Tensor:
    """dL/dt from ``slopes``, v = dL/dtheta'.

    theta' = theta - alpha * J^T r with r = (2/n)(f - t), so dL/dt = (2/n) J (alpha v), summed over the inner steps.
    """
    direction = {name: slope * rates[name] for name, slope in slopes.items()}
    changes = [push_forward(probe, direction).to(target_SD.dtype) for probe in inner.probes]
    return torch.stack(changes).sum(0) * (2.0 / target_SD.numel())


class _Stored(torch.autograd.Function):
    """A scalar whose gradient with respect to each input was computed before."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *(g * grad_outputs[0].to(g.dtype) for g in ctx.gradients))


def _autocast(config: MetaStepSpec, device: torch.device) -> AbstractContextManager[Any]:
    """Autocast without its cache: a weight cast under ``no_grad`` must not serve a pass that needs its gradient."""
    if config.precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)


class EpisodeModule(nn.Module):
    """Student and aggregator as one module whose forward pass is the meta step; this is what an engine drives.

    ``train()`` leaves both in evaluation mode, as the method wants it; only a student's MoE block follows the mode,
    so that its capacity applies while training.

    Args:
        student: the student.
        aggregator: the aggregator.
        config: the step.
        task: ``multiclass``, ``binary`` or ``regression``.
    """

    def __init__(
        self, student: Student, aggregator: Aggregator, config: MetaStepSpec, task: str = "multiclass"
    ) -> None:
        super().__init__()
        self.student = student
        self.aggregator = aggregator
        self.config = config
        self.task = task
        names = adapted_parameters(student, config.adapt)
        self.rates = InnerRates(list(names), config.inner_lr) if config.learn_rates else None
        self.train()

    def train(self, mode: bool = True) -> EpisodeModule:
        """See the class."""
        super().train(False)
        self.training = mode
        if self.student.moe is not None:
            self.student.moe.train(mode)
        return self

    def forward(self, episode: Episode) -> Losses:
        """Losses of one episode, see :func:`meta_losses`."""
        rates = None if self.rates is None else self.rates()
        return meta_losses(self.student, self.aggregator, episode, self.config, self.task, rates)
