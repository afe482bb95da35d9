"""Batches that are structured by source domain, and the one forward pass that all supervised algorithms share.

A batch is one of: a list of ``(images, labels)``, one per source domain (DomainBed's minibatches); ``(images, labels,
domains)`` with an int64 column that says where each row comes from; ``(images, labels)``, rows of one domain.

Shapes: B images, D feature width, K outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from moe.errors import SpecError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from moe.losses import Losses


class Rows(NamedTuple):
    """Rows of one domain, or of all."""

    images: Tensor
    labels: Tensor


class Pass(NamedTuple):
    """What a pass of the network gives.

    Attributes:
        features_BD: input of the head; None for a network that is not a student.
        logits_BK: outputs.
        extra: weighted auxiliary losses to be added (0-dimensional), or None for a network without experts.
        parts: the same by name for records: ``balance`` (not weighted) of a student's MoE block, ``aux`` (weighted sum)
            of sparse transformer blocks.
    """

    features_BD: Tensor | None
    logits_BK: Tensor
    extra: Tensor | None
    parts: dict[str, Tensor]


def domains_of(batch: Any) -> list[Rows]:
    """The rows of each domain; a domain column is sorted out in ascending order.

    Raises:
        SpecError: the batch has none of the three forms, or no rows.
    """
    import torch

    if not isinstance(batch, Sequence) or not batch:
        raise SpecError(f"A batch by domain is a list of (images, labels), not {type(batch).__name__}.")
    if not isinstance(batch[0], torch.Tensor):
        return [Rows(*rows) for rows in batch]
    if len(batch) == 2:
        return [Rows(*batch)]
    if len(batch) == 3:
        images, labels, column = batch
        return [Rows(images[column == domain], labels[column == domain]) for domain in column.unique()]
    raise SpecError(f"A batch of {len(batch)} tensors is neither (images, labels) nor (images, labels, domains).")


def joined(rows: Sequence[Rows]) -> Rows:
    """All rows, domain after domain."""
    import torch

    if len(rows) == 1:
        return rows[0]
    return Rows(torch.cat([r.images for r in rows]), torch.cat([r.labels for r in rows]))


def forward(module: nn.Module, images: Tensor) -> Pass:
    """Run a network, best a student, and collect the auxiliary losses of its experts, wherever they are."""
    from moe.meta_step import balance_weight
    from moe.models.surgery import aux_loss
    from moe.student import Student

    parts: dict[str, Tensor] = {}
    out = module.run(images) if isinstance(module, Student) else None
    logits_BK = module(images) if out is None else out.logits_BK
    extra = aux_loss(module)
    if extra is not None:
        parts["aux"] = extra.detach()
    if out is None:
        return Pass(None, logits_BK, extra, parts)
    if isinstance(module, Student) and out.balance is not None:
        parts["balance"] = out.balance.detach()
        weighted = balance_weight(module) * out.balance
        extra = weighted if extra is None else extra + weighted
    return Pass(out.features_BD, logits_BK, extra, parts)


def losses(task: Tensor, terms: dict[str, Tensor], passes: Sequence[Pass]) -> Losses:
    """Task loss plus weighted terms plus the mean auxiliary loss over the passes, as the record of an algorithm.

    Args:
        task: mean task loss.
        terms: name -> weighted term of the algorithm.
        passes: all passes of the network that the step made.
    """
    import torch

    from moe.losses import Losses

    total = sum(terms.values(), task)
    parts = {"task": task.detach(), **{name: value.detach() for name, value in terms.items()}}
    extras = [run.extra for run in passes if run.extra is not None]
    if extras:
        total = total + torch.stack(extras).mean()
    for name in passes[0].parts:
        parts[name] = torch.stack([run.parts[name] for run in passes]).mean()
    return Losses(total, parts)
