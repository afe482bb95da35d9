"""Office-Home: 65 everyday objects in four styles; one style unseen.

15,588 images, 65 classes. Reference: Venkateswara et al. 2017, Deep Hashing Network for Unsupervised Domain Adaptation.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from workers.datasets._domain_splits import DomainOptions
from workers.datasets._image_folders import FolderSet, folder_info
from workers.domainbed.benchmark_sets import benchmark_set

Domain = Literal["Art", "Clipart", "Product", "Real World"]

INFO = folder_info(
    "officehome",
    "OfficeHome",
    "Office-Home: 65 everyday objects in four styles; one style unseen",
    "non-commercial research",
    "Venkateswara et al. 2017, Deep Hashing Network for Unsupervised Domain Adaptation",
)


class Options(DomainOptions):
    """What a user may choose."""

    target: Domain | tuple[Domain, ...] = Field("Clipart", description="domain (or domains) held out for testing")
    validation: Domain | None = Field(
        None, description="domain held out of training as `val`; without it `val` is `id_val`"
    )


SET = FolderSet(
    INFO, benchmark_set("OfficeHome"), ("Alarm_Clock", "Backpack", "Batteries", "Bed", "Bike", "Bottle", "Bucket")
)
load, missing, fingerprint = SET.load, SET.missing, SET.fingerprint
import_archive, miniature = SET.import_archive, SET.miniature
