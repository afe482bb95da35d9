"""What the methods share that move normalisation layers: their opening, the loop of steps, memory of the optimiser.

Shapes: S support images, B images of one step, C classes (2 for a binary task), K outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moe.adaptation.base import require_support
from moe.adaptation.bn import estimate
from moe.errors import SpecError
from moe.inner import adapted_parameters, is_norm

if TYPE_CHECKING:
    from moe.student import Student


def opening(
    model: Student,
    support_images: Tensor,
    statistics: bool,
    names: Sequence[str] | None = None,
    prior: float = 0.0,
    batch_size: int = 256,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Statistics of the support images, and leaves of the norm parameters that are going to move.

    Args:
        model: not changed.
        support_images: ``[S, C, H, W]``.
        statistics: estimate BatchNorm statistics, where there are any.
        names: norm parameters to move, by student name; None: all of them.
        prior: weight of the model's own statistics, as a number of images.
        batch_size: images per pass of the estimate.

    Raises:
        SpecError: no image, no normalisation layer to move, or too few images for statistics.
    """
    require_support(support_images)
    fixed = estimate(model, support_images, prior, batch_size) if statistics else {}
    if names is not None and not names:
        return fixed, {}
    moved = {n: p.detach().clone().requires_grad_() for n, p in adapted_parameters(model, "norm").items()}
    return fixed, moved if names is None else {name: moved[name] for name in names}


def has_statistics(model: Student) -> bool:
    """Whether the features hold BatchNorm statistics."""
    return any(
        isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
        for module in model.features.modules()
    )


def no_entropy(model: Student, task: str) -> str | None:
    """Why entropy minimisation over norm layers makes no sense for ``model``; None when it does."""
    if task == "regression":
        return "a regression model predicts no distribution, so there is no entropy to minimise"
    if not any(is_norm(module) for module in model.features.modules()):
        return "the model has no normalisation layers to adapt"
    return None


def descend(
    moved: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    steps: int,
    loss: Callable[[Tensor, Tensor], Tensor | None],
    support_images: Tensor,
    batch_size: int,
    generator: torch.Generator,
    tick: Callable[[int, int], None],
) -> None:
    """Take ``steps`` steps on random support images; a step whose loss is None is left out.

    Args:
        moved: leaves, changed in place.
        optimizer: over ``moved``.
        steps: draws.
        loss: of the drawn images ``[B, C, H, W]``, with a graph; is also told their rows, int64 ``[B]``.
        support_images: ``[S, C, H, W]``.
        batch_size: B, at most S.
        generator: draws the rows.
        tick: told (done, steps) after each.
    """
    for step in range(steps):
        rows = torch.randperm(support_images.shape[0], generator=generator, device=generator.device)[:batch_size]
        with torch.enable_grad():
            value = loss(support_images[rows.to(support_images.device)], rows)
        if value is not None:
            gradients = torch.autograd.grad(value, list(moved.values()), allow_unused=True)
            for parameter, gradient in zip(moved.values(), gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
        tick(step + 1, steps)


class Opening:
    """Predictions before the first step: of the first step's own pass where that sees every image, else of a pass.

    Args:
        model: not changed.
        images: the support images ``[S, C, H, W]``.
        adapted: tensors that replace the model's at the beginning.
        batch_size: images of a step; from S on no pass of its own is needed.
        chunk: images of the pass that is made otherwise; None: all at once.
    """

    def __init__(
        self, model: Student, images: Tensor, adapted: Mapping[str, Tensor], batch_size: int, chunk: int | None
    ) -> None:
        whole = batch_size >= images.shape[0]
        self._logits = None if whole else predict_in_chunks(model, images, adapted, chunk)

    def seen(self, logits_BK: Tensor, rows_B: Tensor) -> None:
        """Told the logits of every step; only the first one counts."""
        if self._logits is None:
            self._logits = torch.empty_like(logits_BK.detach())
            self._logits[rows_B.to(logits_BK.device)] = logits_BK.detach()

    @property
    def logits(self) -> Tensor:
        """Once the first step was taken: logits ``[S, K]``."""
        assert self._logits is not None
        return self._logits


def remember(optimizer: torch.optim.Optimizer, moved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The optimiser's moments, ``KEY/PARAMETER`` -> tensor."""
    return {
        f"{key}/{name}": value.detach()
        for name, parameter in moved.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def recall(optimizer: torch.optim.Optimizer, moved: Mapping[str, Tensor], memory: Mapping[str, Tensor] | None) -> None:
    """Put moments of :func:`remember` back (copies); names that do not belong to the optimiser are passed over."""
    keys = {"step", "exp_avg", "exp_avg_sq", "momentum_buffer"}
    for full, value in (memory or {}).items():
        key, _, name = full.partition("/")
        if key in keys and name in moved:
            optimizer.state[moved[name]][key] = value.clone()


def probabilities(task: str, logits_BK: Tensor) -> Tensor:
    """Predicted distribution ``[B, C]``, float32 or wider; a binary task has C = 2.

    Raises:
        SpecError: a regression has none.
    """
    return _log_probabilities(task, logits_BK).exp()


def _log_probabilities(task: str, logits_BK: Tensor) -> Tensor:
    """Logarithm of :func:`probabilities`; finite for finite logits."""
    wide_BK = logits_BK.float() if logits_BK.dtype in (torch.bfloat16, torch.float16) else logits_BK
    if task == "multiclass":
        return wide_BK.log_softmax(dim=-1)
    if task == "binary":
        return torch.nn.functional.logsigmoid(torch.cat([-wide_BK, wide_BK], dim=1))
    raise SpecError(f"Task {task!r} predicts no distribution, so it has no entropy.", "Use bn or distill instead.")


def entropy_rows(task: str, logits_BK: Tensor) -> Tensor:
    """Entropy of each row's predicted distribution in nats, ``[B]``; arguments as :func:`probabilities`."""
    log_BC = _log_probabilities(task, logits_BK)
    # Not torch.special.entr of the probabilities: its gradient is infinite where one is zero in floating point.
    return -(log_BC.exp() * log_BC).sum(dim=-1)


def predict_in_chunks(
    model: Student, images: Tensor, adapted: Mapping[str, Tensor] | None = None, chunk: int | None = None
) -> Tensor:
    """Logits ``[S, K]`` without a graph, in passes of at most ``chunk`` images (None: one pass)."""
    with torch.no_grad():
        if chunk is None or images.shape[0] <= chunk:
            return model.run(images, adapted).logits_BK
        return torch.cat([model.run(piece, adapted).logits_BK for piece in torch.split(images, chunk)])
