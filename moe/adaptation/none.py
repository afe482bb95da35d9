"""No adaptation: the student as it is. The baseline of every table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe.adaptation.base import Adaptation, AdaptationConfig, AdaptResult, require_support

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor

    from moe.aggregator import Aggregator
    from moe.student import Student


class Method(Adaptation[AdaptationConfig]):
    """Returns an empty delta."""

    def adapt(
        self,
        model: Student,
        support_images: Tensor,
        tokens: Tensor | None = None,
        aggregator: Aggregator | None = None,
        generator: torch.Generator | None = None,
        memory: Mapping[str, Tensor] | None = None,
    ) -> AdaptResult:
        """See the base class."""
        require_support(support_images)
        return AdaptResult(model)
