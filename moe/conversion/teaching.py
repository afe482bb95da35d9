"""Teaching pairs: a teacher module and a student module in the same place of one frozen meta model.

For position i of a meta model M of n stages, teacher hybrid and student hybrid are M with stage i replaced by the
teacher's stage T_i or by the student S_i. The student is trained on the label and on the teacher hybrid's logits:

- ``h = M_{i-1} o .. o M_0(embed(x))``, the prefix: frozen, no gradient, the same for both hybrids;
- ``z_T = head o M_{n-1} o .. o M_{i+1}(T_i(h))`` without gradient, ``z_S`` likewise with S_i, where gradients flow
  through the frozen tail; position 0 takes images, the last ends in logits by itself;
- ``loss = kd_loss(z_S, z_T, y)``.

Source: m2mKD (arXiv 2402.16918), section 4, and its public code.

- Differs: all pairs of one teacher in one process share the prefix (:class:`TeachingPairs`); values are the same.
- Differs: the tail starts at the end of the replaced stage's blocks, whatever a stage's depth; the reference counts
  stages as if each had one block.
- Differs: the meta model is in evaluation mode; there it is in training mode with drop rates of 0, which is the same.

Shapes: B batch, T tokens, D width of meta and teacher, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from moe.conversion.kd import kd_loss
from moe.conversion.kd_specs import KDSpec
from moe.errors import SpecError
from moe.losses import Losses
from moe.models.vit_specs import position_of
from moe.models.vit_stages import ViTStages


class PairOutput(NamedTuple):
    """What one pair computes on one batch.

    Attributes:
        student_BK: logits of the student hybrid, with a graph.
        teacher_BK: logits of the teacher hybrid, without.
        hidden_BTD: the prefix' tokens, None at position 0.
    """

    student_BK: Tensor
    teacher_BK: Tensor
    hidden_BTD: Tensor | None


class FrozenPart(nn.Module):
    """A network that is never trained, never in training mode, and whose weights are nobody's checkpoint.

    Kept outside of the registered submodules, so that a pair's state dict, parameters and ``train()`` are the student's
    alone; ``to`` and ``float`` reach it all the same.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._held = [network.requires_grad_(False).eval()]

    @property
    def network(self) -> Any:
        """The network."""
        return self._held[0]

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenPart:
        self._held[0]._apply(fn)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


class TeachingPair(nn.Module):
    """Teacher module and student module at one position of a meta model. Its state dict is ``student.*`` alone.

    Args:
        meta: the whole frozen meta model.
        teacher: the teacher's stage at this position, a part of its own (:meth:`ViTSpec.stage`); None if its logits
            will be given.
        student: takes images (position 0) or tokens ``[B, T, D]``, gives tokens ``[B, T, D]`` or logits (last).
        position: 0-based; -1 is the last.
        loss: weights of the two terms.

    Raises:
        SpecError: position, widths, parts or classes that do not fit.
    """

    def __init__(
        self, meta: ViTStages, teacher: ViTStages | None, student: nn.Module, position: int, loss: KDSpec | None = None
    ) -> None:
        super().__init__()
        count = len(meta.spec.depths)
        self.position = position_of(position, count)
        self.span = meta.spec.spans[self.position]
        self.last = self.position == count - 1
        self.loss = loss or KDSpec()
        _check_pair(meta, teacher, student, self.position)
        self._meta = FrozenPart(meta)
        self._teacher = FrozenPart(teacher) if teacher is not None else None
        self.student = student

    @property
    def meta(self) -> ViTStages:
        """The frozen meta model."""
        network: ViTStages = self._meta.network
        return network

    def prefix(self, images: Tensor) -> Tensor | None:
        """Tokens that reach this position (None at position 0), without a graph."""
        return prefixes(self.meta, images, [self.position])[self.position]

    def forward(
        self,
        images: Tensor,
        hidden_BTD: Tensor | None = None,
        teacher_BK: Tensor | None = None,
        inputs: Mapping[str, Any] | None = None,
    ) -> PairOutput:
        """Logits of both hybrids.

        Args:
            images: ``[B, C, H, W]``.
            hidden_BTD: the prefix, if it has been computed already.
            teacher_BK: the teacher hybrid's logits, if they are known (a cache).
            inputs: further keyword arguments of the student, e.g. injected draws.

        Raises:
            SpecError: the student's output does not fit this position, or no teacher and no logits.
        """
        if hidden_BTD is None:
            hidden_BTD = self.prefix(images)
        entering = images if hidden_BTD is None else hidden_BTD
        if teacher_BK is None:
            teacher_BK = self.teach(entering)
        leaving = self.student(entering, **(inputs or {}))
        return PairOutput(self._tail(leaving, "student"), teacher_BK, hidden_BTD)

    def teach(self, entering: Tensor) -> Tensor:
        """Logits ``[B, K]`` of the teacher hybrid, without a graph, given what enters this position."""
        if self._teacher is None:
            raise SpecError(f"Pair {self.position} has no teacher module.", "Give one, or the teacher's logits.")
        with torch.no_grad():
            return self._tail(self._teacher.network(entering), "teacher")

    def losses(self, output: PairOutput, target: Tensor) -> Losses:
        """The pair's loss."""
        return kd_loss(output.student_BK, output.teacher_BK, target, self.loss)

    def _tail(self, leaving: Tensor, who: str) -> Tensor:
        """The meta model's blocks after this position, and its head."""
        spec = self.meta.spec
        fits = (
            leaving.ndim == 2 and leaving.shape[1] == spec.num_classes
            if self.last
            else leaving.ndim == 3 and leaving.shape[2] == spec.dim
        )
        if not fits:
            wanted = f"[B, {spec.num_classes}]" if self.last else f"[B, T, {spec.dim}]"
            raise SpecError(
                f"The {who} at position {self.position} gives {tuple(leaving.shape)}, the meta model needs {wanted}.",
                "Give it a stitch of the meta model's width, or its number of classes.",
            )
        return leaving if self.last else self.meta(leaving, self.span[1])


class TeachingPairs(nn.Module):
    """Several pairs of one teacher that share one pass through the meta model's prefix.

    One after the other, n pairs of an n-stage meta model run ``0 + 1 + .. + (n - 1)`` prefix stages; together n - 1.
    Losses and gradients are the same; the state dict is ``pairs.<position>.student.*``.

    Args:
        pairs: pairs with the same meta model object, different positions.

    Raises:
        SpecError: no pairs, different meta models, or a position twice.
    """

    def __init__(self, pairs: Sequence[TeachingPair]) -> None:
        super().__init__()
        positions = [pair.position for pair in pairs]
        if not pairs or len(set(positions)) != len(positions):
            raise SpecError(f"Teaching pairs at positions {positions}.", "Give at least one pair, each position once.")
        if any(pair.meta is not pairs[0].meta for pair in pairs):
            raise SpecError("The pairs have different meta models.", "Build them on the same ViTStages object.")
        self.pairs = nn.ModuleDict({str(pair.position): pair for pair in pairs})

    def members(self) -> dict[int, TeachingPair]:
        """The pairs by position."""
        return {int(name): cast("TeachingPair", pair) for name, pair in self.pairs.items()}

    def forward(
        self,
        images: Tensor,
        teacher_logits: Mapping[int, Tensor] | None = None,
        inputs: Mapping[int, Mapping[str, Any]] | None = None,
    ) -> dict[int, PairOutput]:
        """Outputs by position; arguments as :meth:`TeachingPair.forward`, by position."""
        known, extra = teacher_logits or {}, inputs or {}
        members = self.members()
        hidden = prefixes(next(iter(members.values())).meta, images, list(members))
        return {p: pair(images, hidden[p], known.get(p), extra.get(p)) for p, pair in members.items()}

    def losses(self, outputs: Mapping[int, PairOutput], target: Tensor) -> Losses:
        """Sum of the pairs' losses; students share no weights, so each gets exactly its own gradient. Parts by pair."""
        members = self.members()
        found = {p: members[p].losses(output, target) for p, output in outputs.items()}
        parts = {f"pair{p}/{name}": value for p, losses in found.items() for name, value in losses.parts.items()}
        return Losses(torch.stack([losses.total for losses in found.values()]).sum(), parts)


def prefixes(meta: ViTStages, images: Tensor, positions: Sequence[int]) -> dict[int, Tensor | None]:
    """What reaches each position of the meta model: one pass, as far as the last position needs it, without a graph.

    Returns:
        Tokens ``[B, T, D]`` by position, None for position 0.
    """
    found: dict[int, Tensor | None] = {0: None} if 0 in positions else {}
    hidden = images
    with torch.no_grad():
        for position, (start, end) in enumerate(meta.spec.spans[: max(positions)]):
            hidden = meta(hidden, start, end)
            if position + 1 in positions:
                found[position + 1] = hidden
    return found


_NAC_PARTS = {"readin": "first", "mediator": "middle", "readout": "last"}


def _check_pair(meta: ViTStages, teacher: ViTStages | None, student: nn.Module, position: int) -> None:
    """What can be seen before anything runs: kinds of parts, widths of teacher and stitches, classes."""
    own, count = meta.spec, len(meta.spec.depths)
    if own.part != "whole":
        raise SpecError(f"The meta model is a {own.part} part.", "A teaching pair needs the whole meta model.")
    wanted = own.stage(position).part
    for name, module in (("teacher", teacher), ("student", student)):
        spec = getattr(module, "spec", None)
        part = getattr(spec, "part", None) or _NAC_PARTS.get(getattr(spec, "student", ""), wanted)
        if part != wanted:
            raise SpecError(
                f"The {name} module is a {part} part, position {position} of {count} needs a {wanted} part.",
                "Build it with ViTSpec.stage, student_specs or StudentSpec for this position.",
            )
        stitch = getattr(spec, "stitch_dim", None)
        if stitch is not None and count > 1 and stitch != own.dim:
            raise SpecError(
                f"The {name} module at position {position} has stitches of width {stitch}, the meta model {own.dim}.",
                "stitch_dim is the meta model's width.",
            )
    if teacher is None:
        return
    theirs = teacher.spec
    if theirs.dim != own.dim or (theirs.classifies and theirs.num_classes != own.num_classes):
        raise SpecError(
            f"The teacher module has width {theirs.dim} and {theirs.num_classes} classes, the meta model {own.dim} and "
            f"{own.num_classes}.",
            "Teacher and meta model must share width and classes.",
        )
