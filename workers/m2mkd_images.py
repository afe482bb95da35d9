"""Batches of m2mKD's phases: rows of an epoch, augmented images, mixed labels. Everything is a function of the step.

The DeiT recipe (arXiv 2012.12877) of the public code (kamanphoebe/m2mKD): repeated augmentation, random crop and flip,
RandAugment, random erasing through timm, then mixup or CutMix of each piece of a batch with its mirror image. Where
RandAugment, jitter and erasing are all off, images are only resized and normalised, as the data set asks: digits must
not be flipped.

Known differences: timm draws from global generators; they are seeded from (seed, step, place) for each image and put
back, so that a resumed run continues bit-equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image as Pillow
from torch import Tensor

from moe.algorithms.m2mkd import Augmentation, Phase
from moe.errors import SpecError
from moe.mixup import draw_mix, mix
from workers.batches import ImageReader
from workers.datasets.base import DomainData, IntArray
from workers.engines.base import Weighted
from workers.few_shot import repeated_indices, selected_rows
from workers.loop import mix as mix_seed
from workers.sampling import EpochSampler
from workers.timm_draws import timm_draws
from workers.transforms import IMAGENET_MEAN, IMAGENET_STD, Transform, transform_for


def is_plain(augment: Augmentation) -> bool:
    """Whether training images are those of evaluation: nothing is drawn, so what a network says can be kept."""
    return augment.plain


def mixes(augment: Augmentation) -> bool:
    """Whether images of a batch are mixed."""
    return augment.mix_prob > 0 and max(augment.mixup, augment.cutmix) > 0


class TrainImages:
    """Which rows make up a step, and what they look like.

    Args:
        data: the data set.
        rows: training rows.
        side: of the images in pixels.
        phase: its batch size and accumulation.
        augment: see the module.
        seed: of order, augmentation and mixing.
        threads: decoding threads.
        rank: of ``world_size`` ranks that share every update; together they see what one alone would.
        world_size: see there.

    Raises:
        SpecError: augmentation of images that are not RGB.
        DataError: fewer rows than repeated augmentation needs.
    """

    def __init__(
        self,
        data: DomainData,
        rows: IntArray,
        side: int,
        phase: Phase,
        augment: Augmentation,
        seed: int,
        threads: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self.data, self.rows, self.phase, self.augment, self.seed = data, rows, phase, augment, seed
        self.classes = data.info.num_outputs
        self._labels = torch.from_numpy(np.ascontiguousarray(data.labels))
        self._sampler = EpochSampler(rows, phase.batch_size, mix_seed(seed, 1), drop_last=True)
        self._round = min(256, phase.batch_size, len(rows))
        self._repeated: tuple[int, IntArray] | None = None
        self.steps_per_epoch = self._sampler.steps_per_epoch
        if augment.repeats > 1:
            self.steps_per_epoch = max(1, selected_rows(len(rows), 1, self._round) // phase.batch_size)
        self.reader = eval_reader(data, side, augment, threads)
        self._augmented = None if is_plain(augment) else _deit(data, side, augment)

    def chosen(self, step: int) -> IntArray:
        """Row numbers of an update."""
        if self.augment.repeats == 1:
            return self._sampler.batch(step)
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._repeated is None or self._repeated[0] != epoch:
            order = np.random.default_rng((mix_seed(self.seed, 1), epoch)).permutation(self.rows)
            index = repeated_indices(len(order), 1, 0, epoch, self.augment.repeats, self._round)
            self._repeated = (epoch, order[index])
        size = self.phase.batch_size
        return self._repeated[1][place * size : (place + 1) * size]

    def images(self, rows: IntArray, step: int, places: IntArray | None = None) -> Tensor:
        """Training images ``[B, C, H, W]`` of ``rows`` in update ``step``, at their places in the piece (0, 1, ..)."""
        if self._augmented is None:
            return self.reader.read(rows)
        seeds = [mix_seed(self.seed, 2, step, int(p)) for p in (range(len(rows)) if places is None else places)]
        pixels = []
        with timm_draws() as seeded:
            for row, seed in zip(rows, seeds, strict=True):
                seeded(seed)
                pixels.append(self._augmented(np.asarray(self.data.images[int(row)])))
        return torch.stack(pixels)

    def targets(self, rows: IntArray) -> Tensor:
        """Classes ``[B]`` of ``rows``, smoothed to ``[B, K]`` where the recipe smooths labels."""
        labels = self._labels[torch.from_numpy(rows)]
        if self.augment.smoothing == 0:
            return labels
        off = self.augment.smoothing / self.classes
        soft = torch.full((len(labels), self.classes), off)
        return soft.scatter_(1, labels[:, None], 1 - self.augment.smoothing + off)

    def __call__(self, step: int) -> list[Weighted]:
        """This rank's part of the pieces of an update: images and targets, mixed piece by piece."""
        rows = self.chosen(step)
        pieces = np.array_split(rows, min(self.phase.accumulate, len(rows)))
        found = []
        for number, part in enumerate(pieces):
            places = mirrored_share(len(part), self.rank, self.world_size)
            weight = len(places) / len(rows)
            # A rank without a share goes along with weight 0, so that collective calls stay aligned.
            places = places if len(places) else np.zeros(1, dtype=np.int64)
            mine = part[places]
            found.append(Weighted(self._piece(mine, self.images(mine, step, places), step, number), weight))
        return found

    def _piece(self, rows: IntArray, images: Tensor, step: int, number: int) -> tuple[Tensor, Tensor]:
        augment = self.augment
        if not mixes(augment):
            return images, self.targets(rows)
        generator = np.random.default_rng((mix_seed(self.seed, 3), step, number))
        size = (images.shape[2], images.shape[3])
        draw = draw_mix(generator, size, augment.mixup, augment.cutmix, augment.mix_prob, augment.switch_prob)
        return mix(images, self._labels[torch.from_numpy(rows)], draw, self.classes, augment.smoothing)


def mirrored_share(count: int, rank: int, world_size: int) -> IntArray:
    """Places of one rank among ``count``, ascending: with every place its mirror image, which it may be mixed with."""
    half = (count + 1) // 2
    low = np.arange(half * rank // world_size, half * (rank + 1) // world_size)
    return np.unique(np.concatenate([low, count - 1 - low])).astype(np.int64)


def eval_reader(data: DomainData, side: int, augment: Augmentation, threads: int) -> ImageReader:
    """Images as evaluation sees them.

    The data set's own transform at ``side`` pixels. Differs: the public code crops the centre of larger images; here
    that is left to the data set's transform, so that nothing at the border is lost.
    """
    return ImageReader(data.images, eval_transform(data, side, augment), threads)


def eval_transform(data: DomainData, side: int, augment: Augmentation) -> Transform:
    """What :func:`eval_reader` does to an image.

    Raises:
        SpecError: ImageNet's normalisation of images that are not RGB.
    """
    if augment.normalisation == "data":
        return transform_for(data.info, side, train=False)
    if data.info.channels != len(IMAGENET_MEAN):
        raise SpecError(
            f"Images of {data.info.name} have {data.info.channels} channels; ImageNet's normalisation needs 3.",
            "Set augment.normalisation to data.",
        )
    return transform_for(data.info, side, train=False, normalisation=augment.normalisation)


def served_transform(data: DomainData, side: int, augment: Augmentation) -> dict[str, Any]:
    """:func:`eval_transform` for uploads of any colour, as JSON."""
    spec = eval_transform(data, side, augment).spec
    return spec.model_copy(update={"channels": spec.channels or data.info.channels}).model_dump(mode="json")


def _deit(data: DomainData, side: int, augment: Augmentation) -> Callable[[Any], Tensor]:
    from timm.data import create_transform

    kinds = {"imagenet": (IMAGENET_MEAN, IMAGENET_STD), "unit": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))}
    kind = data.info.normalisation if augment.normalisation == "data" else augment.normalisation
    if data.info.channels != 3 or kind not in kinds:
        raise SpecError(
            f"Images of {data.info.name} ({data.info.channels} channels, normalisation {kind}) "
            "cannot be augmented by the DeiT recipe.",
            "Set augment.randaugment to null and augment.erasing and augment.color_jitter to 0.",
        )
    mean, std = kinds[kind]
    transform = create_transform(
        input_size=side,
        is_training=True,
        color_jitter=augment.color_jitter or None,
        auto_augment=augment.randaugment,
        interpolation=augment.interpolation,
        re_prob=augment.erasing,
        re_mode="pixel",
        re_count=1,
        mean=mean,
        std=std,
    )

    def augmented(image: Any) -> Tensor:
        pixels: Tensor = transform(Pillow.fromarray(image))
        return pixels

    return augmented
