"""CUB-DG: 200 bird species, photos and three painting styles; one style unseen.

47,152 images (4 x 11,788), 200 classes.
Reference: Min et al. 2022, Grounding Visual Representations with Texts for Domain Generalization;
Wah et al. 2011.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from workers.datasets._domain_splits import DomainOptions
from workers.datasets._image_folders import FolderSet, folder_info
from workers.domainbed.benchmark_sets import benchmark_set

Domain = Literal["Candy", "Mosaic", "Natural", "Udnie"]

INFO = folder_info(
    "cub_dg",
    "CUB",
    "CUB-DG: 200 bird species, photos and three painting styles; one style unseen",
    "non-commercial research",
    "Min et al. 2022, Grounding Visual Representations with Texts for Domain Generalization; Wah et al. 2011",
)


class Options(DomainOptions):
    """What a user may choose."""

    target: Domain | tuple[Domain, ...] = Field("Natural", description="domain (or domains) held out for testing")
    validation: Domain | None = Field(
        None, description="domain held out of training as `val`; without it `val` is `id_val`"
    )


SET = FolderSet(
    INFO,
    benchmark_set("CUB"),
    (
        "001.Black_footed_Albatross",
        "002.Laysan_Albatross",
        "003.Sooty_Albatross",
        "004.Groove_billed_Ani",
        "005.Crested_Auklet",
        "006.Least_Auklet",
    ),
)
load, missing, fingerprint = SET.load, SET.missing, SET.fingerprint
import_archive, miniature = SET.import_archive, SET.miniature
