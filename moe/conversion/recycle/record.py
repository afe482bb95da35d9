"""Finished activation statistics, and which images they look at.

Source: MoE Jetpack (arXiv 2406.04801), section 3.2.

Shapes: d width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.errors import DataError, SpecError


@dataclass(frozen=True)
class StatisticsRecord:
    """Finished statistics: ``values[place, metric][layer]`` is ``[d]``, or ``[d, d]`` for ``co_act``."""

    values: Mapping[tuple[str, str], Mapping[int, Tensor]]

    def of(self, place: str, metric: str) -> Mapping[int, Tensor]:
        """One metric of one place, by layer.

        Raises:
            SpecError: it was not collected.
        """
        if (place, metric) not in self.values:
            have = ", ".join(sorted(f"{a}/{b}" for a, b in self.values)) or "nothing"
            raise SpecError(
                f"The statistics hold no {metric!r} of place {place!r}; they hold {have}.",
                f"Collect them with metrics including {metric!r}.",
            )
        return self.values[place, metric]

    def to_tensors(self) -> dict[str, Tensor]:
        """Flat names ``place.metric.layer``, for a safetensors file."""
        return {
            f"{place}.{metric}.{layer}": value
            for (place, metric), layers in self.values.items()
            for layer, value in layers.items()
        }

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> StatisticsRecord:
        """Inverse of :meth:`to_tensors`.

        Raises:
            DataError: a name that is not ``place.metric.layer``.
        """
        values: dict[tuple[str, str], dict[int, Tensor]] = {}
        for name, value in tensors.items():
            parts = name.rsplit(".", 2)
            if len(parts) != 3 or not parts[2].isdecimal():
                raise DataError(f"Statistics hold a tensor {name!r}.", "Names are place.metric.layer, as mlp_act.L2.0.")
            values.setdefault((parts[0], parts[1]), {})[int(parts[2])] = value
        return StatisticsRecord({key: dict(sorted(layers.items())) for key, layers in values.items()})


def sample_rows(total: int, images: int, order: str = "first", generator: torch.Generator | None = None) -> Tensor:
    """Which images of a data set the statistics look at: int64, ascending.

    Args:
        total: images in the set.
        images: images wanted; all of them when there are fewer.
        order: ``first`` takes the first ones in the set's order (released tool: on ImageNet sorted by folder these
            cover some 30 classes), ``random`` a sample without replacement.
        generator: source of the random sample.

    Raises:
        SpecError: another order, a missing generator, or nothing to sample.
    """
    if total < 1 or images < 1:
        raise SpecError(f"A sample of {images} out of {total} images is empty.")
    count = min(images, total)
    if order == "first":
        return torch.arange(count)
    if order != "random" or generator is None:
        raise SpecError(f"order={order!r} with generator={generator}: use 'first', or 'random' with a generator.")
    return torch.randperm(total, generator=generator)[:count].sort().values
