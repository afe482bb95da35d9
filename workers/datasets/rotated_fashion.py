"""rotated_fashion: Fashion-MNIST at six angles on disjoint images, leave one angle out (DomainBed's design).

Known: the gap is largest at 0 and 75 degrees, and larger than on MNIST.
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
    name="rotated_fashion",
    title="Fashion-MNIST at six angles (0 to 75 degrees), leave one out, 28x28 grey",
    source="Debian package dataset-fashion-mnist (IDX files)",
    licence="MIT",
    extra="",
    citation="Xiao et al. 2017 (data); design after DomainBed, ICLR 2021",
    files=_idx.FASHION.files,
)


class Options(RotatedOptions):
    """What a user may choose."""


def load(root: Path, options: Options) -> DomainData:
    """See :func:`workers.datasets._rotated.load_environments`; raises NotFoundError, DataError and SpecError."""
    return load_environments(root, INFO, options, _idx.FASHION)


def missing(root: Path) -> list[Missing]:
    """The IDX files that are not there."""
    return _idx.missing_files(root, _idx.FASHION)


def import_archive(root: Path, archive: Path) -> Path:
    """Take the four IDX files out of a folder or an archive; see :mod:`workers.datasets._idx_archive`."""
    return _idx_archive.import_archive(root, archive, _idx.FASHION)


def miniature(root: Path, seed: int) -> None:
    """Write generated IDX files for ``source: miniature``."""
    _idx.write_miniature(root, _idx.FASHION, seed)
