"""Training images of MoE Jetpack's recipe: random crop, flip, RandAugment, random erasing.

Source: MoE Jetpack (arXiv 2406.04801), appendix, and its public code: crops of 8 to 100 % of the area (bicubic), two
operations of RandAugment's increasing set at level 9 (deviation 0.5), erasing of 2 to 33 % of the area in every fourth
image with pixel noise. The operations are timm's. A batch is a function of its seed.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moe.errors import SpecError
from workers.batches import ImageReader
from workers.datasets.base import DomainData, IntArray
from workers.timm_draws import timm_draws
from workers.transforms import IMAGENET_MEAN, Transform, TransformSpec

Augmentation = Literal["none", "crop", "rand"]
_POLICY = "rand-m9-mstd0.5-inc1"
_GREY = (128, 128, 128)


class TrainingImages:
    """Augmented batches of a data set.

    Args:
        data: the data set; augmentation needs uint8 images of one or three channels.
        transform: of evaluation; without augmentation it makes the training images as well.
        augment: ``none``, ``crop`` (crop and flip) or ``rand``.
    """

    def __init__(self, data: DomainData, transform: Transform, augment: Augmentation) -> None:
        self._images, self._augment = data.images, augment
        self._reader = ImageReader(data.images, transform)
        self._steps: list[Any] = []
        self._erase: Any = None
        if augment == "none":
            return
        from PIL.Image import Resampling
        from timm.data.auto_augment import rand_augment_transform
        from timm.data.random_erasing import RandomErasing
        from timm.data.transforms import RandomResizedCropAndInterpolation
        from torchvision.transforms import RandomHorizontalFlip

        side = transform.spec.size[0] if transform.spec.size else data.info.image_size[0]
        self._normalise = Transform(TransformSpec(normalisation=transform.spec.normalisation))
        self._steps = [RandomResizedCropAndInterpolation(side, interpolation="bicubic"), RandomHorizontalFlip()]
        if augment == "rand":
            imagenet = transform.spec.normalisation == "imagenet"
            fill = tuple(round(255 * value) for value in IMAGENET_MEAN) if imagenet else _GREY
            hints = {"img_mean": fill, "interpolation": Resampling.BICUBIC}
            self._steps.append(rand_augment_transform(_POLICY, hints))
            self._erase = RandomErasing(0.25, mode="pixel", device="cpu")

    def read(self, rows: IntArray, seed: int) -> Tensor:
        """Images of ``rows``, float32 ``[B, 3, H, W]``; augmented from ``seed``.

        Raises:
            SpecError: images that cannot be augmented.
            DataError: a corrupt or missing image.
        """
        if not self._steps:
            return self._reader.read(rows)
        with timm_draws() as seeded:
            seeded(seed)
            pictures = np.stack([self._one(np.asarray(self._images[int(row)])) for row in rows])
            images = self._normalise.batch(pictures)
            return images if self._erase is None else self._erase(images)  # type: ignore[no-any-return]

    def close(self) -> None:
        """End the reader."""
        self._reader.close()

    def _one(self, image: NDArray[Any]) -> NDArray[np.uint8]:
        from PIL import Image

        plain = image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image
        if plain.dtype != np.uint8 or (plain.ndim == 3 and plain.shape[-1] != 3) or plain.ndim not in (2, 3):
            raise SpecError(
                f"Images of type {image.dtype} and shape {image.shape} cannot be augmented.", "Set augment to none."
            )
        picture = Image.fromarray(plain).convert("RGB")
        for step in self._steps:
            picture = step(picture)
        return np.asarray(picture, np.uint8)
