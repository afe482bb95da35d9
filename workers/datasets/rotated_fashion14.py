"""rotated_fashion14: Fashion-MNIST at 14 angles with unequal groups; the protocol of ``rotated14``, our own variant.

Angles 0, 10, ..., 130 with unequal training groups; every angle is tested with the same images, half of them as
support; the worst angle counts beside the mean. ``holdout`` keeps whole angles out of training.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import Field

from workers.datasets import _idx, _idx_archive, rotated14
from workers.datasets._rotated import Rotated14Options, load14
from workers.datasets.base import DomainData, Missing

INFO = replace(
    rotated14.INFO,
    name="rotated_fashion14",
    title="Fashion-MNIST at 14 angles (0 to 130 degrees) with unequal groups, 28x28 grey",
    licence="MIT",
    source="Debian package dataset-fashion-mnist (IDX files)",
    extra="",
    citation="Xiao et al. 2017 (data); protocol after Zhang et al., NeurIPS 2021",
    files=_idx.FASHION.files,
)


class Options(Rotated14Options):
    """What a user may choose."""

    source: Literal["idx", "miniature"] = Field(
        "idx", description="the real files, or a generated stand-in (moepipe data miniature)"
    )


def load(root: Path, options: Options) -> DomainData:
    """See :func:`workers.datasets._rotated.load14`; raises NotFoundError, DataError and SpecError as ``rotated14``."""
    return load14(root, INFO, options, _idx.read_pools(root, _idx.FASHION, options.source == "miniature"))


def missing(root: Path) -> list[Missing]:
    """The IDX files that are not there."""
    return _idx.missing_files(root, _idx.FASHION)


def import_archive(root: Path, archive: Path) -> Path:
    """Take the four IDX files out of a folder or an archive; see :mod:`workers.datasets._idx_archive`."""
    return _idx_archive.import_archive(root, archive, _idx.FASHION)


def miniature(root: Path, seed: int) -> None:
    """Write generated IDX files for ``source: miniature``."""
    _idx.write_miniature(root, _idx.FASHION, seed)
