"""BatchNorm re-estimation: replace the running statistics by those of the support batch.

Paper: Schneider et al., "Improving robustness against common corruptions by covariate shift adaptation"
(arXiv 2006.16971), equation 3; with ``prior = 0`` it is AdaBN (arXiv 1603.04779).

Differs: the papers normalise every test batch by its own statistics; here they are estimated once per domain and then
fixed, so that a prediction does not depend on the other images of its batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moe.adaptation.base import Adaptation, AdaptationConfig, AdaptResult, Reset, require_support
from moe.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor

    from moe.aggregator import Aggregator
    from moe.student import Student

_MANY_VALUES = 32  # values a channel from which biased and unbiased variance are as good as the same


class Config(AdaptationConfig):
    """Options."""

    prior: float = Field(default=0.0, ge=0, description="Weight of the source statistics, as a number of images.")
    batch_size: int = Field(
        default=256, ge=1, description="Images per forward pass; statistics are averaged over them."
    )


class Method(Adaptation[Config]):
    """Statistics of all BatchNorm layers of the features, all layers at once.

    In a stream each batch moves the state's statistics; ``prior`` is then the weight of what was seen before.
    """

    Config = Config
    reset: ClassVar[Reset] = "follow"

    def adapt(
        self,
        model: Student,
        support_images: Tensor,
        tokens: Tensor | None = None,
        aggregator: Aggregator | None = None,
        generator: torch.Generator | None = None,
        memory: Mapping[str, Tensor] | None = None,
    ) -> AdaptResult:
        """See the base class. Raises SpecError for a model without BatchNorm."""
        require_support(support_images)
        statistics, near = estimate_and_predict(model, support_images, self.config.prior, self.config.batch_size)
        if not statistics:
            raise SpecError("The model has no BatchNorm statistics to re-estimate.", "Use none, tent or distill.")
        return AdaptResult(model, statistics, logits_near=near)

    def unfit(self, model: Student, has_teacher: bool = False) -> str | None:
        """See the base class."""
        from moe.adaptation._norm import has_statistics

        return None if has_statistics(model) else "the model has no BatchNorm statistics to re-estimate"


def estimate(model: Student, images: Tensor, prior: float = 0.0, batch_size: int = 256) -> dict[str, Tensor]:
    """The first of :func:`estimate_and_predict`."""
    return estimate_and_predict(model, images, prior, batch_size)[0]


def estimate_and_predict(
    model: Student, images: Tensor, prior: float = 0.0, batch_size: int = 256
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Running statistics of ``images``, by student name, and what the estimating pass predicted.

    The estimating pass normalises by the statistics that it estimates, only with the variance of the batch itself in
    place of its unbiased estimate: factor ``1 - 1/n`` for n values a channel. So its predictions are those of the
    adapted model up to rounding of that size.

    Args:
        model: not changed.
        images: ``[S, C, H, W]``.
        prior: weight of the model's own statistics, as a number of images.
        batch_size: images per forward pass.

    Returns:
        The statistics (empty when the features have no BatchNorm), and logits ``[S, K]``: None where they say nothing
        about the adapted model, with a prior, several passes, or fewer than 32 values a channel.

    Raises:
        SpecError: a layer sees a single value per channel (one image, one pixel), which has no variance.
    """
    import copy

    import torch
    from torch import nn

    # Parameters are shared, so that the copy costs next to nothing; the statistics are its own.
    features = copy.deepcopy(model.features, {id(value): value for value in model.features.parameters()}).eval()
    layers = {
        name: module
        for name, module in features.named_modules(prefix="features")
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    }
    if not layers:
        return {}, None
    fewest: list[int] = []
    for module in layers.values():
        module.train()
        module.reset_running_stats()
        module.momentum = None  # cumulative average over the passes
        module.register_forward_pre_hook(lambda layer, given: fewest.append(given[0].numel() // given[0].shape[1]))
    pieces = max(1, images.shape[0] // batch_size)
    near: Tensor | None = None
    with torch.no_grad():
        try:
            for piece in images.tensor_split(pieces):
                pooled = features(piece).flatten(1)
        except ValueError as error:
            raise SpecError(
                f"BatchNorm statistics cannot be estimated from {images.shape[0]} image(s): {error}",
                "Give more support images.",
            ) from error
        if pieces == 1 and prior == 0 and min(fewest) >= _MANY_VALUES:
            near = model.classifier(model.refine(pooled)[0])
    share = images.shape[0] / (images.shape[0] + prior)
    own = dict(model.features.named_buffers(prefix="features"))
    found: dict[str, Tensor] = {}
    for name, module in layers.items():
        for key in ("running_mean", "running_var"):
            source = own[f"{name}.{key}"]
            found[f"{name}.{key}"] = torch.lerp(source, getattr(module, key), share)
    return found, near
