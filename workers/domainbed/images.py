"""The domains of a registry data set as DomainBed's environments: batches for evaluation and for training.

Evaluation: resized to exactly S x S (bilinear, aspect not kept), ImageNet's normalisation. Training: the augmentation
of :mod:`workers.domainbed.augment`, same normalisation; it starts from the images as stored, since random crops need
what lies beyond S x S, except for the WILDS sets, which DomainBed resizes first. Decoded images are kept in files
shared by all processes of a node, see :mod:`workers.domainbed.decoded`. Source: DomainBed's public code (commit
b93c22a1).

Sets that are not normalised as ImageNet keep their own normalisation, sets of arrays are not copied to disk, and token
maps or other floating-point "images" keep their size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moe.errors import SpecError
from workers.datasets._arrays import ArrayImages
from workers.datasets.base import DomainData, Images, IntArray
from workers.domainbed.augment import Pixels, mapped
from workers.domainbed.augment import augment as augmented
from workers.domainbed.decoded import LIMIT, ResizedImages, original_images, resized_images
from workers.transforms import Normalisation, Transform, TransformSpec

if TYPE_CHECKING:
    from torch import Tensor

RESIZED_FIRST = frozenset({"wilds_camelyon", "wilds_fmow"})


@dataclass(frozen=True)
class Sources:
    """Where pixels come from; shared by all environments of a set.

    Attributes:
        evaluation: images at the network's size.
        training: images that are augmented.
        size: side S in pixels; None where images keep theirs.
        transform: normalisation, and channels where they are changed.
        threads: images worked on at a time.
    """

    evaluation: Images
    training: Images
    size: int | None
    transform: Transform
    threads: int


class FolderEnvironment:
    """One domain; follows ``workers.domainbed.environments.Environment``.

    Attributes:
        labels: int64 ``[n]``.
        rows: int64 ``[n]``, row of each image in the data set, ascending.
        name: of the domain.
    """

    def __init__(self, name: str, labels: IntArray, rows: IntArray, sources: Sources) -> None:
        self.name, self.labels, self.rows, self._sources = name, labels, rows, sources

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: IntArray, augment: bool, random: np.random.Generator) -> Tensor:
        """The images of some rows of this domain.

        Args:
            rows: B rows, 0 to n - 1, in any order, repeated or not.
            augment: the training augmentation instead of the plain resize.
            random: advanced only when augmenting.

        Returns:
            float32 ``[B, C, S, S]``.

        Raises:
            DataError: an image is corrupt or missing.
            SpecError: augmentation of images that are not 8-bit, or a row that does not exist.
        """
        wanted = np.asarray(rows, dtype=np.int64)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise SpecError(
                f"Rows {wanted.min()} to {wanted.max()} are asked of domain {self.name!r} with {len(self)} images."
            )
        found, sources = self.rows[wanted], self._sources
        if augment:
            images = mapped(
                lambda row: _three(np.asarray(sources.training[row]), sources), _plain(found), sources.threads
            )
            return sources.transform.batch(augmented(images, sources.size or 1, random, sources.threads))
        images = mapped(lambda row: np.asarray(sources.evaluation[row]), _plain(found), sources.threads)
        return sources.transform.batch(np.stack(images))


def image_environments(
    data: DomainData,
    image_size: int = 224,
    *,
    cache: Path | None = None,
    limit: int = LIMIT,
    threads: int = 1,
    channels: int | None = None,
    normalisation: Normalisation | None = None,
) -> list[FolderEnvironment]:
    """One environment per value of the set's domain column, in ascending order; rows in the set's order.

    Which split an image is in makes no difference here, but one that is in none (``per_domain``) is left out.

    Args:
        data: any registry set with classes for labels.
        image_size: side S in pixels that the network wants.
        cache: folder of this node for decoded images; None decodes each time. Processes may share it.
        limit: most bytes of a file of decoded images (there are two); a set above it is decoded each time.
        threads: images worked on at a time.
        channels: channels the network wants: 1 is repeated, 2 padded to 3. None keeps the set's.
        normalisation: instead of the set's own, e.g. ``imagenet`` for a pretrained network.

    Raises:
        SpecError: a set with real numbers for labels.
        DataError: while decoding for the cache, an image is corrupt.
    """
    if data.info.task == "regression":
        raise SpecError(
            f"DomainBed's protocol needs classes, and the labels of {data.info.name} are real numbers.",
            "Choose a data set with classes.",
        )
    sources = _sources(data, image_size, cache, limit, threads, channels, normalisation)
    domain = data.column(data.info.domain_field)
    names = data.value_names.get(data.info.domain_field, ())
    used = np.unique(np.concatenate(list(data.splits.values())))
    environments = []
    for value in np.unique(domain[used]):
        rows = used[domain[used] == value].astype(np.int64)
        name = names[value] if 0 <= value < len(names) else str(value)
        environments.append(FolderEnvironment(name, data.labels[rows].astype(np.int64), rows, sources))
    return environments


def _sources(
    data: DomainData,
    size: int,
    cache: Path | None,
    limit: int,
    threads: int,
    channels: int | None,
    normalisation: Normalisation | None,
) -> Sources:
    transform = Transform(TransformSpec(normalisation=normalisation or data.info.normalisation, channels=channels))
    if np.asarray(data.images[0]).dtype != np.uint8:
        return Sources(data.images, data.images, None, transform, threads)
    resize_first = data.info.name in RESIZED_FIRST
    if cache is None or isinstance(data.images, ArrayImages):
        small: Images = ResizedImages(data.images, size)
        return Sources(small, small if resize_first else data.images, size, transform, threads)
    originals = data.images if resize_first else original_images(data, cache, limit, threads)
    small = resized_images(data, originals, size, cache, limit, threads)
    return Sources(small, small if resize_first else originals, size, transform, threads)


def _plain(rows: IntArray) -> list[int]:
    return [int(row) for row in rows]


def _three(image: NDArray[np.generic], sources: Sources) -> Pixels:
    """A grey image as RGB where the network wants three channels, so that colours can be jittered."""
    if sources.transform.spec.channels == 3 and image.dtype == np.uint8 and image.shape[2] == 1:
        image = np.repeat(image, 3, axis=2)
    return image  # type: ignore[return-value]
