"""Rotated sets over MNIST-like digits: the 14-angle adaptation benchmark and DomainBed's six environments.

``rotated14`` follows the Rotated MNIST protocol of Adaptive Risk Minimization (Zhang et al., "Adaptive Risk
Minimization: Learning to Adapt to Domain Shift", NeurIPS 2021, section 5): angles 0, 10, ..., 130; 32292 training
images, of which 324 for each of 90, 100 and 110 degrees and 108 for each of 120 and 130; testing at every angle with
equally many images of the official test part; accuracy of the worst angle beside the mean. Ours: 24 angles over the
whole circle as an option; the nine large groups
share the rest equally (3456 each, so the sizes stand as 32 : 3 : 1), a training image is used at one angle only,
rotation is bilinear, positive angles turn counter-clockwise, and the test images of an angle are halved into
``test_support`` and ``test``, by the same digits at every angle. The Fashion-MNIST variant is ours altogether.

``environments`` follows DomainBed's RotatedMNIST (Gulrajani and Lopez-Paz, ICLR 2021): angles 0, 15, ..., 75 on
disjoint images drawn from both official parts, one angle held out.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from moe.errors import SpecError
from workers.datasets._arrays import Arrays, cached, domain_data, held_out
from workers.datasets._idx import IdxSource, Pools, read_pools
from workers.datasets._render import rotate_batch
from workers.datasets.base import DatasetInfo, DomainData, IntArray, data_root

RECIPE = "v1"
ANGLES14 = tuple(range(0, 140, 10))
UNITS14 = (32,) * 9 + (3,) * 3 + (1,) * 2  # published sizes 3456 (derived), 324, 108
PAPER_TOTAL = 32292
ANGLES6 = tuple(range(0, 90, 15))
CIRCLE = tuple(range(0, 360, 15))
HOLDOUT: dict[str, slice] = {"none": slice(0), "every_4th": slice(3, None, 4), "extreme": slice(-3, None)}


class Rotated14Options(BaseModel):
    """What a user may choose for the 14-angle sets."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    angles: Literal["published", "circle"] = Field(
        "published", description="published: 0, 10, ..., 130 degrees; circle (ours): 24 angles 0, 15, ..., 345"
    )
    holdout: Literal["none", "every_4th", "extreme"] = Field(
        "none",
        description="angles kept out of training and tested alone: none (published), every 4th (30, 70, 110 of the "
        "published ones), or the last three",
    )
    group_sizes: Literal["unequal", "equal"] = Field(
        "unequal", description="training images an angle: unequal as 32:3:1 (published) or equal"
    )
    train_size: int | None = Field(
        None, ge=600, le=60000, description="training images over all angles; default 32292 or what the source has"
    )

    @property
    def degrees(self) -> tuple[int, ...]:
        """The angles in degrees."""
        return CIRCLE if self.angles == "circle" else ANGLES14

    val_per_angle: int = Field(100, ge=10, le=2000, description="validation images an angle")
    test_per_angle: int = Field(1000, ge=20, le=10000, description="test images an angle, half of them as support")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="seed that draws the images")


class RotatedOptions(BaseModel):
    """What a user may choose for the six environments."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Literal["idx", "miniature"] = Field(
        "idx", description="the real files, or a generated stand-in (moepipe data miniature)"
    )
    target: Literal[0, 15, 30, 45, 60, 75] = Field(0, description="angle in degrees that is held out for testing")
    per_environment: int = Field(2000, ge=100, le=11666, description="images of each angle")
    id_fraction: float = Field(0.2, gt=0, lt=1, description="share of every source angle kept as `id_val`")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="seed that draws and splits the images")


def load14(root: Path, info: DatasetInfo, options: Rotated14Options, pools: Pools) -> DomainData:
    """The 14 angles with the splits of ``options``; images uint8 ``[28, 28, 1]``.

    Metadata: ``domain`` (index of the angle), ``y``, ``source_row`` (row of the pool; test rows count from the end of
    the train pool), ``angle`` in degrees. Without a hold-out ``val`` equals ``id_val``, and ``test`` covers all angles;
    with one, ``test`` and ``test_support`` cover the held-out angles and ``id_test`` the others.

    Raises:
        SpecError: the pools hold fewer images than asked for.
    """
    sizes = _train_sizes(options, len(pools.train_images))
    if options.test_per_angle > len(pools.test_images):
        raise SpecError(
            f"test_per_angle is {options.test_per_angle}, but the source has {len(pools.test_images)} test images.",
            f"Set test_per_angle to at most {len(pools.test_images)}.",
        )
    degrees = options.degrees
    key = [pools.digest, *sizes, options.val_per_angle, options.test_per_angle, options.seed]
    recipe = f"{RECIPE}-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}"
    arrays = cached(data_root(root, info), recipe, lambda: _draw14(pools, sizes, options))
    part, angle = arrays["part"], arrays["angle"]
    held = np.isin(angle, degrees[HOLDOUT[options.holdout]])
    seen = ~held
    tested = held if options.holdout != "none" else np.ones_like(held)
    splits = {
        "train": np.flatnonzero((part == 0) & seen),
        "id_val": np.flatnonzero((part == 1) & seen),
        "val": np.flatnonzero((part == 1) & seen),
        "test_support": np.flatnonzero((part == 2) & tested),
        "test": np.flatnonzero((part == 3) & tested),
    }
    if options.holdout != "none":
        splits["id_test"] = np.flatnonzero((part == 3) & seen)
    domain = np.searchsorted(np.array(degrees), angle)
    metadata = np.stack([domain, arrays["labels"], arrays["source_row"], angle], axis=1)
    names = {"domain": tuple(str(a) for a in degrees), "y": tuple("0123456789")}
    fields = ("domain", "y", "source_row", "angle")
    return domain_data(info, arrays["images"], arrays["labels"], metadata, fields, splits, names)


def _train_sizes(options: Rotated14Options, pool: int) -> list[int]:
    """Training images of each angle."""
    count = len(options.degrees)
    reserve = count * options.val_per_angle
    available = pool - reserve
    total = options.train_size if options.train_size is not None else min(PAPER_TOTAL, available)
    if total > available or total < count:
        raise SpecError(
            f"train_size {total} and {reserve} validation images do not fit into the {pool} images of the source.",
            f"Set train_size to at most {max(available, 0)}, or make val_per_angle smaller.",
        )
    if options.group_sizes == "unequal" and options.angles == "circle":
        raise SpecError("group_sizes is unequal, which is defined for the 14 published angles.", "Use equal.")
    units = UNITS14 if options.group_sizes == "unequal" else (1,) * count
    return [max(1, total * unit // sum(units)) for unit in units]


def _draw14(pools: Pools, sizes: list[int], options: Rotated14Options) -> Arrays:
    """Draw disjoint training and validation images, and the shared test images, and rotate them.

    ``part`` says where a row belongs: 0 train, 1 validation, 2 support, 3 test.
    """
    rng = np.random.default_rng([options.seed, 14])
    order = rng.permutation(len(pools.train_images))
    test_order = rng.permutation(len(pools.test_images))[: options.test_per_angle]
    support = options.test_per_angle // 2
    rows: list[IntArray] = []
    parts: list[IntArray] = []
    angles: list[IntArray] = []
    images: list[NDArray[np.uint8]] = []
    labels: list[IntArray] = []
    start = 0
    for angle, size in zip(options.degrees, sizes, strict=True):
        chosen = order[start : start + size + options.val_per_angle]
        start += len(chosen)
        rows += [chosen, test_order + len(pools.train_images)]
        parts.append(np.repeat([0, 1], [size, options.val_per_angle]))
        parts.append(np.repeat([2, 3], [support, len(test_order) - support]))
        angles.append(np.full(len(chosen) + len(test_order), angle))
        upright = np.concatenate([pools.train_images[chosen], pools.test_images[test_order]])
        images.append(rotate_batch(upright, angle))
        labels += [pools.train_labels[chosen], pools.test_labels[test_order]]
    return {
        "images": np.concatenate(images)[..., None],
        "labels": np.concatenate(labels).astype(np.int64),
        "source_row": np.concatenate(rows).astype(np.int64),
        "part": np.concatenate(parts).astype(np.int64),
        "angle": np.concatenate(angles).astype(np.int64),
    }


def load_environments(root: Path, info: DatasetInfo, options: RotatedOptions, source: IdxSource) -> DomainData:
    """Six angles on disjoint images, one held out and halved into ``test_support`` and ``test``.

    Metadata: ``domain`` (index of the angle), ``y``, ``source_row`` (row in train part then test part). ``val`` is
    ``id_val``.

    Raises:
        NotFoundError, DataError: see :func:`workers.datasets._idx.read_pools`.
        SpecError: the source holds too few images.
    """
    pools = read_pools(root, source, options.source == "miniature")
    chosen, images, labels = draw_environments(pools, len(ANGLES6), options.per_environment, options.seed)
    key = repr([pools.digest, options.per_environment, options.seed])
    recipe = f"{RECIPE}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"

    def rotate() -> Arrays:
        turned = [rotate_batch(part, angle) for part, angle in zip(images, ANGLES6, strict=True)]
        return {"images": np.concatenate(turned)[..., None]}

    arrays = cached(data_root(root, info), recipe, rotate)
    domain = np.repeat(np.arange(len(ANGLES6)), options.per_environment)
    y = np.concatenate(labels)
    metadata = np.stack([domain, y, np.concatenate(chosen)], axis=1)
    splits = split_target(domain, ANGLES6.index(options.target), options.id_fraction, options.seed)
    names = {"domain": tuple(str(angle) for angle in ANGLES6), "y": tuple("0123456789")}
    return domain_data(info, arrays["images"], y, metadata, ("domain", "y", "source_row"), splits, names)


def draw_environments(
    pools: Pools, count: int, size: int, seed: int
) -> tuple[list[IntArray], list[NDArray[np.uint8]], list[IntArray]]:
    """Rows, images and labels of ``count`` disjoint environments over train part followed by test part.

    Raises:
        SpecError: ``count * size`` exceeds the images there are.
    """
    images = np.concatenate([pools.train_images, pools.test_images])
    labels = np.concatenate([pools.train_labels, pools.test_labels])
    if count * size > len(images):
        raise SpecError(
            f"{count} environments of {size} images need {count * size}, but the source has {len(images)}.",
            f"Set per_environment to at most {len(images) // count}.",
        )
    order = np.random.default_rng([seed, 6]).permutation(len(images))[: count * size]
    chosen = [np.asarray(part, np.int64) for part in np.split(order, count)]
    return chosen, [images[rows] for rows in chosen], [labels[rows] for rows in chosen]


def split_target(domain: IntArray, target: int, id_fraction: float, seed: int) -> dict[str, IntArray]:
    """Splits of a leave-one-domain-out set: train, id_val and val of sources, test_support and test of the target."""
    rng = np.random.default_rng([seed, 7])
    train, id_val = [], []
    for number in np.unique(domain[domain != target]):
        rest, kept = held_out(np.flatnonzero(domain == number), id_fraction, rng)
        train.append(rest)
        id_val.append(kept)
    test, support = held_out(np.flatnonzero(domain == target), 0.5, rng)
    inside = np.concatenate(id_val)
    return {"train": np.concatenate(train), "id_val": inside, "val": inside, "test_support": support, "test": test}
