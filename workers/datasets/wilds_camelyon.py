"""Camelyon17 (WILDS) under DomainBed's protocol: tumour or not, a domain per hospital, all WILDS splits pooled.

The files are those of the data set ``camelyon17``. Reference: Bandi et al. 2018; Koh et al. 2021; DomainBed's public
code (commit b93c22a1), ``WILDSCamelyon``.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from workers.datasets import camelyon17
from workers.datasets._domain_splits import DomainOptions
from workers.datasets._wilds_pooled import PooledSet, pooled_info

Domain = Literal["hospital_0", "hospital_1", "hospital_2", "hospital_3", "hospital_4"]

INFO = pooled_info(
    "wilds_camelyon",
    "WILDSCamelyon",
    camelyon17.INFO,
    "Camelyon17 (WILDS) as DomainBed uses it: tumour in tissue, five hospitals; one hospital unseen",
    "hospital",
)


class Options(DomainOptions):
    """What a user may choose."""

    target: Domain | tuple[Domain, ...] = Field("hospital_2", description="domain (or domains) held out for testing")
    validation: Domain | None = Field(
        None, description="domain held out of training as `val`; without it `val` is `id_val`"
    )


SET = PooledSet(INFO, camelyon17, ("hospital_0", "hospital_1", "hospital_2", "hospital_3", "hospital_4"))
load, missing, fingerprint = SET.load, SET.missing, SET.fingerprint
import_archive, miniature = SET.import_archive, SET.miniature
