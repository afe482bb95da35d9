"""cifar100: small photographs of 100 classes, 50,000 to train on and 10,000 to test on, RGB 32x32; one domain."""

from __future__ import annotations

from workers.datasets._cifar import CifarOptions, CifarSet, cifar_info

INFO = cifar_info("cifar100", 100, "CIFAR-100: photographs of 100 classes, RGB 32x32, one domain")


class Options(CifarOptions):
    """What a user may choose."""


SET = CifarSet(INFO, "cifar-100-python", ("train",), "test", "fine_labels")
load, missing = SET.load, SET.missing
import_archive, miniature = SET.import_archive, SET.miniature
