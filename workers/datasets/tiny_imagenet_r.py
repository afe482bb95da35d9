"""tiny_imagenet_r: renditions of 62 classes of Tiny-ImageNet, 64x64; only for tests of models of ``tiny_imagenet``.

Layout: ``tiny-imagenet-r/<wnid>/*.jpg``: the class folders of ImageNet-R whose WordNet ids Tiny-ImageNet has (m2mKD,
arXiv 2402.16918, and the public code of neural attentive circuits prepare it so).
"""

from __future__ import annotations

from dataclasses import replace

from workers.datasets._listed_images import PlainOptions
from workers.datasets._renditions import RenditionSet
from workers.datasets.imagenet_r import INFO as WHOLE
from workers.datasets.tiny_imagenet import DRAWN, SIDE

INFO = replace(
    WHOLE,
    name="tiny_imagenet_r",
    title="Tiny-ImageNet-R: art, cartoons and other renditions of 62 classes of Tiny-ImageNet; test only",
    num_outputs=62,
    image_size=(SIDE, SIDE),
    source="class folders of ImageNet-R that Tiny-ImageNet has",
)


class Options(PlainOptions):
    """What a user may choose: nothing."""


SET = RenditionSet(INFO, "tiny-imagenet-r", "tiny-imagenet-r", DRAWN[::2])
load, missing, fingerprint = SET.load, SET.missing, SET.fingerprint
import_archive, miniature = SET.import_archive, SET.miniature
