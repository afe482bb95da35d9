"""Terra Incognita: animals at four camera traps; one camera unseen.

About 24,788 images, 10 classes; locations 38, 43, 46 and 100 of Caltech Camera Traps.
Reference: Beery et al. 2018, Recognition in Terra Incognita.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from workers.datasets._domain_splits import DomainOptions
from workers.datasets._image_folders import FolderSet, folder_info
from workers.domainbed.benchmark_sets import benchmark_set

Domain = Literal["location_100", "location_38", "location_43", "location_46"]

INFO = folder_info(
    "terraincognita",
    "TerraIncognita",
    "Terra Incognita: animals at four camera traps; one camera unseen",
    "CDLA-Permissive-1.0",
    "Beery et al. 2018, Recognition in Terra Incognita",
)


class Options(DomainOptions):
    """What a user may choose."""

    target: Domain | tuple[Domain, ...] = Field("location_46", description="domain (or domains) held out for testing")
    validation: Domain | None = Field(
        None, description="domain held out of training as `val`; without it `val` is `id_val`"
    )


SET = FolderSet(
    INFO,
    benchmark_set("TerraIncognita"),
    ("bird", "bobcat", "cat", "coyote", "dog", "empty", "opossum", "rabbit", "raccoon", "squirrel"),
)
load, missing, fingerprint = SET.load, SET.missing, SET.fingerprint
import_archive, miniature = SET.import_archive, SET.miniature
