"""A WILDS set under DomainBed's protocol: the rows of all its splits together, dealt to domains by one metadata column.

Source: ``WILDSEnvironment`` of DomainBed's public code (commit b93c22a1): a domain per value of the column, rows in the
order of the WILDS table. Files, checks and stand-in are those of the WILDS set itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np

from moe.errors import DataError
from workers.datasets._arrays import digest_arrays
from workers.datasets._domain_splits import DomainOptions, domain_splits
from workers.datasets.base import DatasetInfo, DomainData, Missing
from workers.domainbed.benchmark_sets import benchmark_set


def pooled_info(name: str, official: str, wilds: DatasetInfo, title: str, column: str) -> DatasetInfo:
    """The record: the WILDS set's licence and source, domains of ``column``, classes of DomainBed's table."""
    entry = benchmark_set(official)
    return replace(
        wilds,
        name=name,
        title=title,
        task="multiclass",
        num_outputs=entry.classes,
        image_size=(entry.image_size, entry.image_size),
        domain_field=column,
        group_fields=(column,),
        metrics=("accuracy", "worst_domain_accuracy", "macro_f1"),
        selection_metric="accuracy",
        files=(),
    )


@dataclass(frozen=True)
class PooledSet:
    """The functions of the dataset contract.

    Attributes:
        info: the record.
        wilds: module of the WILDS set.
        domains: name of every value of the domain column.
    """

    info: DatasetInfo
    wilds: ModuleType
    domains: tuple[str, ...]

    def load(self, root: Path, options: DomainOptions) -> DomainData:
        """Read the WILDS set below ``root`` and pool its splits.

        Raises:
            NotFoundError: it is not there.
            DataError: a table or an image breaks the official layout, or a domain has no row.
        """
        data: DomainData = self.wilds.load(root, self.wilds.Options())
        column = data.column(self.info.domain_field)
        stray = sorted({int(value) for value in np.unique(column)} - set(range(len(self.domains))))
        if stray:
            raise DataError(
                f"{self.info.name}: column {self.info.domain_field!r} has the values {stray}, expected 0 to "
                f"{len(self.domains) - 1}.",
                "Restore the tables from the official archive.",
            )
        splits = domain_splits(self.info.name, column, self.domains, options)
        digest = digest_arrays(
            {f"split/{name}": rows for name, rows in splits.items()}, name=self.info.name, wilds=data.digest
        )
        value_names = {**data.value_names, self.info.domain_field: self.domains}
        return replace(data, info=self.info, splits=splits, digest=digest, value_names=value_names)

    def missing(self, root: Path) -> list[Missing]:
        """What the WILDS set lacks, and how to get it."""
        gaps: list[Missing] = self.wilds.missing(root)
        return gaps

    def fingerprint(self, root: Path, options: DomainOptions) -> str:
        """What the files are, for cache keys while planning; NotFoundError when they are not there."""
        print_: str = self.wilds.fingerprint(root, self.wilds.Options())
        return print_

    def import_archive(self, root: Path, archive: Path) -> Path:
        """Take the official archive (or an unpacked folder) of the WILDS set into ``root``."""
        folder: Path = self.wilds.import_archive(root, archive)
        return folder

    def miniature(self, root: Path, seed: int) -> None:
        """Write the generated stand-in of the WILDS set."""
        self.wilds.miniature(root, seed)
