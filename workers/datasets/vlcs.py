"""VLCS: five object classes from four photo collections; one collection unseen.

10,729 images, 5 classes. Reference: Fang et al. 2013, Unbiased Metric Learning.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from workers.datasets._domain_splits import DomainOptions
from workers.datasets._image_folders import FolderSet, folder_info
from workers.domainbed.benchmark_sets import benchmark_set

Domain = Literal["Caltech101", "LabelMe", "SUN09", "VOC2007"]

INFO = folder_info(
    "vlcs",
    "VLCS",
    "VLCS: five object classes from four photo collections; one collection unseen",
    "not stated; for research",
    "Fang et al. 2013, Unbiased Metric Learning",
)


class Options(DomainOptions):
    """What a user may choose."""

    target: Domain | tuple[Domain, ...] = Field("LabelMe", description="domain (or domains) held out for testing")
    validation: Domain | None = Field(
        None, description="domain held out of training as `val`; without it `val` is `id_val`"
    )


SET = FolderSet(INFO, benchmark_set("VLCS"), ("bird", "car", "chair", "dog", "person"))
load, missing, fingerprint = SET.load, SET.missing, SET.fingerprint
import_archive, miniature = SET.import_archive, SET.miniature
