"""cifar10: small photographs of 10 classes, 50,000 to train on and 10,000 to test on, RGB 32x32; one domain."""

from __future__ import annotations

from workers.datasets._cifar import CifarOptions, CifarSet, cifar_info

INFO = cifar_info("cifar10", 10, "CIFAR-10: photographs of 10 classes, RGB 32x32, one domain")


class Options(CifarOptions):
    """What a user may choose."""


SET = CifarSet(
    INFO, "cifar-10-batches-py", tuple(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "labels"
)
load, missing = SET.load, SET.missing
import_archive, miniature = SET.import_archive, SET.miniature
