"""imagenet_r: 30,000 renditions (art, cartoons, sculptures) of 200 ImageNet classes; only for tests of its models.

Layout: ``imagenet-r/<wnid>/*.jpg``, as the official archive unpacks.
Source: Hendrycks et al. 2021, The Many Faces of Robustness (arXiv 2006.16241).
"""

from __future__ import annotations

from workers.datasets._class_folders import WNIDS
from workers.datasets._class_lists import class_lists
from workers.datasets._listed_images import PlainOptions, photo_info
from workers.datasets._renditions import RenditionSet

INFO = photo_info(
    "imagenet_r",
    200,
    "ImageNet-R: art, cartoons and other renditions of 200 classes of ImageNet; test only",
    licence="not stated; for research",
    source="official archive imagenet-r.tar",
    citation="Hendrycks et al. 2021, The Many Faces of Robustness",
)


class Options(PlainOptions):
    """What a user may choose: nothing."""


SET = RenditionSet(
    INFO, "imagenet-r", "imagenet-r", tuple(name for name in WNIDS if name in class_lists()["imagenet-r"])
)
load, missing, fingerprint = SET.load, SET.missing, SET.fingerprint
import_archive, miniature = SET.import_archive, SET.miniature
