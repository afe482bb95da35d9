"""From a decoded image to the tensor a network reads: crop, resize, augmentation, normalisation.

The official pipelines of the WILDS sets (Meta-DMoE's public code, ``initialize_image_base_transform``) are all of this
shape: optional centre crop, Pillow bilinear resize on 8-bit data, scaling to [0, 1], normalisation. Only RxRx1
augments, by one of eight rotations and flips, so every transform is deterministic up to :attr:`Transform.variants` and
features of frozen networks can be cached under :attr:`Transform.identity`. Torch is imported when it is needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from moe.errors import DataError, SpecError
from workers.datasets.base import DatasetInfo

if TYPE_CHECKING:
    from torch import Tensor

Normalisation = Literal["imagenet", "unit", "instance", "none"]
Image = NDArray[Any]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_VARIANTS = 8
# Side in pixels that the official pipeline resizes to; absent where images keep the size they are stored in.
_DOMAINBED = ("pacs", "vlcs", "officehome", "terraincognita", "domainnet", "sviro", "cub_dg")
_PHOTOS = ("flowers102", "oxford_pets", "dtd", "food101", "imagenet", "imagenet21k")
_RESIZED = {
    "iwildcam": 448,
    "camelyon17": 96,
    "wilds_camelyon": 224,
    "wilds_fmow": 224,
    **dict.fromkeys((*_DOMAINBED, *_PHOTOS), 224),
}
_FORMAT = 1  # raise when the numbers that a spec stands for change: it enters cache keys


class TransformSpec(BaseModel):
    """What a transform does; everything that decides its numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    normalisation: Normalisation = Field(
        description="imagenet: ImageNet's mean and deviation; unit: [0,1]; instance: per image; none: as stored."
    )
    crop: int | None = Field(default=None, ge=1, description="Side of a square centre crop, before the resize; pixels.")
    size: tuple[int, int] | None = Field(default=None, description="(height, width) after the resize; None keeps it.")
    short_edge: int | None = Field(
        default=None, ge=1, description="Resize the short edge to this, bicubic, and take the centre of `size`; pixels."
    )
    channels: int | None = Field(
        default=None,
        ge=1,
        le=64,
        description="Channels wanted: 1 is repeated, 2 padded with zeros to 3. None keeps them.",
    )
    augment: bool = Field(default=False, description="One of 8 rotations by quarter turns and flips, drawn per image.")
    variant: int = Field(
        default=0, ge=0, lt=_VARIANTS, description="Fixed variant where nothing is drawn; 0 is upright."
    )

    @model_validator(mode="after")
    def _fits(self) -> TransformSpec:
        if self.short_edge is not None and (self.size is None or self.short_edge < max(self.size)):
            raise ValueError(f"short_edge={self.short_edge} needs a size of at most that, not {self.size}.")
        return self


class Transform:
    """A callable made from a :class:`TransformSpec`.

    Attributes:
        identity: stable text that two transforms share exactly when they give the same numbers; for cache keys.
        variants: number of different results one image can have: 8 when augmenting, else 1.
    """

    def __init__(self, spec: TransformSpec) -> None:
        self.spec = spec
        unused = {"short_edge"} if spec.short_edge is None else set()
        fields = spec.model_dump(mode="json", exclude=unused)
        self.identity = f"transform-{_FORMAT}:" + json.dumps(fields, sort_keys=True)
        self.variants = _VARIANTS if spec.augment else 1

    def fixed(self, variant: int) -> Transform:
        """The deterministic transform that always applies ``variant`` (0..7: quarter turns + 4 * flipped)."""
        return Transform(self.spec.model_copy(update={"augment": False, "variant": variant % _VARIANTS}))

    def __call__(self, image: Image, rng: np.random.Generator | None = None) -> Tensor:
        """Transform one image.

        Args:
            image: uint8 ``[H, W, C]`` or ``[H, W]``, or float ``[C, H, W]``.
            rng: draws the variant; needed when augmenting.

        Returns:
            float32 ``[C, H', W']``.

        Raises:
            DataError: neither of these forms.
        """
        return self.batch(np.asarray(image)[None], rng)[0]

    def batch(self, images: Image | Sequence[Image], rng: np.random.Generator | None = None) -> Tensor:
        """Transform several images; fastest for one uint8 array ``[B, H, W, C]``.

        Args:
            images: an array with a leading batch axis, or images as in :meth:`__call__`, of any sizes if resized.
            rng: draws one variant per image, in order; needed when augmenting.

        Returns:
            float32 ``[B, C, H', W']``, contiguous.

        Raises:
            DataError: an image of another form, or images of different sizes with no resize.
            SpecError: an augmenting transform was called without ``rng``.
        """
        variants = self._variants(len(images), rng)
        if isinstance(images, np.ndarray) and images.ndim >= 3:
            prepared = self._prepare_stack(images)
        else:
            prepared = self._stack([self._prepare_stack(np.asarray(image)[None])[0] for image in images])
        if any(variants):
            prepared = self._stack([_turn(image, variant) for image, variant in zip(prepared, variants, strict=True)])
        return self._normalise(prepared)

    def _variants(self, count: int, rng: np.random.Generator | None) -> list[int]:
        if not self.spec.augment:
            return [self.spec.variant] * count
        if rng is None:
            raise SpecError(
                "A transform with random augmentation was called without a generator.",
                "Pass rng, or choose one of its variants with fixed(variant).",
            )
        return [int(v) for v in rng.integers(_VARIANTS, size=count)]

    def _prepare_stack(self, images: Image) -> Image:
        """Channels-first ``[B, C, H, W]`` in the stored type, cropped and resized."""
        if images.dtype == np.uint8 and images.ndim in (3, 4):
            stack = images[..., None] if images.ndim == 3 else images
            stack = stack.transpose(0, 3, 1, 2)
        elif images.dtype.kind == "f" and images.ndim == 4:
            stack = images
        else:
            raise DataError(
                f"An image of type {images.dtype} and shape {images.shape[1:]} cannot be transformed.",
                "Images are uint8 [H, W, C] or float [C, H, W].",
            )
        if self.spec.crop is not None:
            stack = _center_crop(stack, self.spec.crop)
        if self.spec.short_edge is not None and self.spec.size is not None:
            stack = np.stack([_centre(image, self.spec.short_edge, self.spec.size) for image in stack])
        if self.spec.size is not None and (stack.shape[2], stack.shape[3]) != self.spec.size:
            stack = np.stack([_resize(image, self.spec.size) for image in stack])
        return stack if self.spec.channels is None else _with_channels(stack, self.spec.channels)

    @staticmethod
    def _stack(images: list[Image]) -> Image:
        shapes = {image.shape for image in images}
        if len(shapes) > 1:
            raise DataError(
                f"Images of different sizes {sorted(shapes)} cannot form one batch.", "Set image_size to resize them."
            )
        return np.stack(images)

    def _normalise(self, stack: Image) -> Tensor:
        import torch

        if self.spec.normalisation == "instance":
            return torch.from_numpy(_standardise(stack))
        x = torch.from_numpy(np.ascontiguousarray(stack)).to(torch.float32)
        if self.spec.normalisation == "none":
            return x
        x = x / 255 if stack.dtype == np.uint8 else x
        if self.spec.normalisation == "unit":
            return x
        if x.shape[1] != len(IMAGENET_MEAN):
            raise DataError(
                f"ImageNet normalisation needs 3 channels and the image has {x.shape[1]}.", "Set channels to 3."
            )
        mean, std = (torch.tensor(v, dtype=torch.float32).view(1, -1, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        return (x - mean) / std


def transform_for(
    info: DatasetInfo,
    image_size: int | None,
    train: bool,
    official_rxrx1_eval: bool = False,
    *,
    normalisation: Normalisation | None = None,
    channels: int | None = None,
    original_resolution: tuple[int, int] | None = None,
) -> Transform:
    """The official transform of a data set, adapted to a backbone where asked.

    Args:
        info: the data set's record.
        image_size: square side in pixels that the network wants; None keeps the official size.
        train: the training transform; differs for rxrx1 only (random variants).
        official_rxrx1_eval: Parity: the public code evaluates rxrx1 with random variants; by default we do not.
        normalisation: overrides the record, e.g. ``imagenet`` for a pretrained backbone on a ``unit`` set.
        channels: overrides the number of channels (1 or 2 become 3).
        original_resolution: nominal (height, width); when not square, the centre square of the smaller side is taken.
    """
    side = image_size or _RESIZED.get(info.name)
    augment = info.name == "rxrx1" and (train or official_rxrx1_eval)
    square = original_resolution is None or original_resolution[0] == original_resolution[1]
    return Transform(
        TransformSpec(
            normalisation=normalisation or info.normalisation,
            crop=None if square or info.name == "rxrx1" else min(original_resolution or ()),
            size=None if side is None else (side, side),
            channels=channels,
            augment=augment,
        )
    )


def transform_after(meta: Mapping[str, Any], info: DatasetInfo, image_size: int | None, train: bool) -> Transform:
    """The preprocessing in which work on a stored network goes on: the one that its record names, where it names one.

    Args:
        meta: the network's record; without ``transform`` in it the data set's official preprocessing is meant.
        info: the data set's record.
        image_size: another side in pixels; colours stay as the record says.
        train: the training transform; see :func:`transform_for`.
    """
    official = transform_for(info, image_size, train)
    if "transform" not in meta:
        return official
    own = TransformSpec(**meta["transform"]).model_copy(update={"augment": official.spec.augment})
    if image_size is not None and own.size != (image_size, image_size):
        own = own.model_copy(update={"size": (image_size, image_size), "short_edge": None})
    return Transform(own)


def recorded(start: Mapping[str, Any], transform: Transform) -> dict[str, Any]:
    """What :func:`transform_after` adds to the record of a network that went on from ``start``; empty if nothing."""
    return {"transform": transform.spec.model_dump(mode="json")} if "transform" in start else {}


def _center_crop(stack: Image, side: int) -> Image:
    """Central square of ``[B, C, H, W]``; smaller images are padded with zeros, as in torchvision."""
    height, width = stack.shape[2], stack.shape[3]
    short, narrow = max(side - height, 0), max(side - width, 0)
    if short or narrow:
        pads = ((0, 0), (0, 0), (short // 2, (short + 1) // 2), (narrow // 2, (narrow + 1) // 2))
        stack = np.pad(stack, pads)
    top, left = (round((extent - side) / 2) for extent in stack.shape[2:])
    return stack[:, :, top : top + side, left : left + side]


def _centre(image: Image, short_edge: int, size: tuple[int, int]) -> Image:
    """The middle of ``[C, H, W]`` after its short edge was resized; the other edge is truncated, as in torchvision."""
    height, width = image.shape[1:]
    scaled = (short_edge, int(short_edge * width / height)) if height <= width else (
        int(short_edge * height / width), short_edge
    )  # fmt: skip
    resized = _resize(image, scaled, bicubic=True)
    top, left = (round((extent - side) / 2) for extent, side in zip(scaled, size, strict=True))
    return resized[:, top : top + size[0], left : left + size[1]]


def _resize(image: Image, size: tuple[int, int], bicubic: bool = False) -> Image:
    """Pillow's antialiased resize of ``[C, H, W]``, 8-bit arithmetic for uint8 and float for float."""
    from PIL import Image as Pillow

    target, kernel = (size[1], size[0]), Pillow.Resampling.BICUBIC if bicubic else Pillow.Resampling.BILINEAR
    if image.dtype == np.uint8 and image.shape[0] == 3:
        picture = Pillow.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
        return np.asarray(picture.resize(target, kernel)).transpose(2, 0, 1)
    kind = np.uint8 if image.dtype == np.uint8 else np.float32
    planes = [Pillow.fromarray(np.ascontiguousarray(plane, dtype=kind)) for plane in image]
    return np.stack([np.asarray(plane.resize(target, kernel)) for plane in planes])


def _with_channels(stack: Image, channels: int) -> Image:
    present = stack.shape[1]
    if present == channels:
        return stack
    if channels == 3 and present == 1:
        return np.repeat(stack, 3, axis=1)
    if channels == 3 and present == 2:
        return np.concatenate([stack, np.zeros_like(stack[:, :1])], axis=1)
    raise DataError(f"Images with {present} channels cannot be given {channels}.", "Use a backbone that reads them.")


def _turn(image: Image, variant: int) -> Image:
    """``[C, H, W]`` turned by ``variant % 4`` quarter turns counter-clockwise, then mirrored left-right from 4 on."""
    turned = np.rot90(image, variant % 4, axes=(1, 2))
    return turned[:, :, ::-1] if variant >= 4 else turned


def _standardise(stack: Image) -> Image:
    """Zero mean and unit (n - 1) deviation per image and channel; a constant channel becomes exactly 0.

    The division by 255 cancels out, so the statistics are taken in float64 on the stored values: the mean of a constant
    8-bit channel is then exact, where a float32 mean may be off in the last bit and blow up to about 1.
    """
    x = np.ascontiguousarray(stack, dtype=np.float64)  # one memory layout, so that sums do not depend on the batch
    count = x.shape[2] * x.shape[3]
    constant = x.max(axis=(2, 3), keepdims=True) == x.min(axis=(2, 3), keepdims=True)
    mean = np.where(constant, x[:, :, :1, :1], x.mean(axis=(2, 3), keepdims=True))
    deviation = np.sqrt(np.square(x - mean).sum(axis=(2, 3), keepdims=True) / max(count - 1, 1))
    return ((x - mean) / np.where(deviation == 0, 1, deviation)).astype(np.float32)
