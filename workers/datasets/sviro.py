"""SVIRO: what is on the back seat, in ten cars; one car unseen.

About 56,000 rendered grey images, 7 classes.
Reference: Dias Da Cruz et al. 2020, SVIRO: Synthetic Vehicle Interior Rear Seat Occupancy.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from workers.datasets._domain_splits import DomainOptions
from workers.datasets._image_folders import FolderSet, folder_info
from workers.domainbed.benchmark_sets import benchmark_set

Domain = Literal["aclass", "escape", "hilux", "i3", "lexus", "tesla", "tiguan", "tucson", "x5", "zoe"]

INFO = folder_info(
    "sviro",
    "SVIRO",
    "SVIRO: what is on the back seat, in ten cars; one car unseen",
    "CC BY-NC-SA 4.0",
    "Dias Da Cruz et al. 2020, SVIRO: Synthetic Vehicle Interior Rear Seat Occupancy",
)


class Options(DomainOptions):
    """What a user may choose."""

    target: Domain | tuple[Domain, ...] = Field("aclass", description="domain (or domains) held out for testing")
    validation: Domain | None = Field(
        None, description="domain held out of training as `val`; without it `val` is `id_val`"
    )


SET = FolderSet(INFO, benchmark_set("SVIRO"), ("0", "1", "2", "3", "4", "5", "6"))
load, missing, fingerprint = SET.load, SET.missing, SET.fingerprint
import_archive, miniature = SET.import_archive, SET.miniature
