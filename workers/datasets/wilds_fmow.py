"""Functional Map of the World (WILDS) under DomainBed's protocol: a domain per region, all WILDS splits pooled.

The files are those of the data set ``fmow``. Reference: Christie et al. 2018; Koh et al. 2021; DomainBed's public code
(commit b93c22a1), ``WILDSFMoW``.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from workers.datasets import fmow
from workers.datasets._domain_splits import DomainOptions
from workers.datasets._wilds_pooled import PooledSet, pooled_info

Domain = Literal["region_0", "region_1", "region_2", "region_3", "region_4", "region_5"]

INFO = pooled_info(
    "wilds_fmow",
    "WILDSFMoW",
    fmow.INFO,
    "FMoW (WILDS) as DomainBed uses it: land use from satellite, six regions; one region unseen",
    "region",
)


class Options(DomainOptions):
    """What a user may choose."""

    target: Domain | tuple[Domain, ...] = Field("region_2", description="domain (or domains) held out for testing")
    validation: Domain | None = Field(
        None, description="domain held out of training as `val`; without it `val` is `id_val`"
    )


SET = PooledSet(INFO, fmow, ("region_0", "region_1", "region_2", "region_3", "region_4", "region_5"))
load, missing, fingerprint = SET.load, SET.missing, SET.fingerprint
import_archive, miniature = SET.import_archive, SET.miniature
