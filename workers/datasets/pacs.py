"""PACS: photos, paintings, cartoons and sketches of seven classes; one style unseen.

9,991 images of 227 x 227 pixels, 7 classes.
Reference: Li et al. 2017, Deeper, Broader and Artier Domain Generalization.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from workers.datasets._domain_splits import DomainOptions
from workers.datasets._image_folders import FolderSet, folder_info
from workers.domainbed.benchmark_sets import benchmark_set

Domain = Literal["art_painting", "cartoon", "photo", "sketch"]

INFO = folder_info(
    "pacs",
    "PACS",
    "PACS: photos, paintings, cartoons and sketches of seven classes; one style unseen",
    "not stated; for research",
    "Li et al. 2017, Deeper, Broader and Artier Domain Generalization",
)


class Options(DomainOptions):
    """What a user may choose."""

    target: Domain | tuple[Domain, ...] = Field("sketch", description="domain (or domains) held out for testing")
    validation: Domain | None = Field(
        None, description="domain held out of training as `val`; without it `val` is `id_val`"
    )


SET = FolderSet(INFO, benchmark_set("PACS"), ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person"))
load, missing, fingerprint = SET.load, SET.missing, SET.fingerprint
import_archive, miniature = SET.import_archive, SET.miniature
