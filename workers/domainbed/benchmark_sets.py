"""What the protocol knows of its data sets without their files: environments, labels, classes, folders.

Source: tables of the DomainBed paper and public code (commit b93c22a1) and of GMoE's (0689d557, ``CUB``). An
environment is a domain; its number is the position of its folder in sorted order.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from moe.errors import SpecError, nearest

SMALL_IMAGES = frozenset({"Debug28", "RotatedMNIST", "ColoredMNIST"})


@dataclass(frozen=True)
class BenchmarkSet:
    """One data set of the benchmark.

    Attributes:
        name: official name.
        folder: below the data root; empty where there are no files.
        labels: short name of each environment, as in result tables.
        domains: folder of each environment; empty where environments are not folders.
        classes: number of classes.
        channels: of an image.
        image_size: side in pixels.
        in_fork: GMoE's code and EMoE's copy of it know it; ``in_head``: DomainBed's today; ``in_2020``: the published
            study.
    """

    name: str
    folder: str
    labels: tuple[str, ...]
    domains: tuple[str, ...]
    classes: int
    channels: int = 3
    image_size: int = 224
    in_2020: bool = True
    in_head: bool = True
    in_fork: bool = True

    @property
    def small(self) -> bool:
        """28 x 28 inputs: hyper-parameters of their own, no augmentation."""
        return self.name in SMALL_IMAGES


def _debug(name: str, side: int) -> BenchmarkSet:
    return BenchmarkSet(name, "", ("0", "1", "2"), (), 2, image_size=side)


def _wilds(name: str, prefix: str, count: int, classes: int) -> BenchmarkSet:
    labels = tuple(f"{prefix}_{number}" for number in range(count))
    return BenchmarkSet(name, "", labels, (), classes, in_2020=False)


def _spawrious(kind: str, level: str) -> BenchmarkSet:
    labels = ("Test", "SC_group_1", "SC_group_2")
    return BenchmarkSet(f"Spawrious{kind}_{level}", "spawrious224", labels, (), 4, in_2020=False, in_fork=False)


_SVIRO = ("aclass", "escape", "hilux", "i3", "lexus", "tesla", "tiguan", "tucson", "x5", "zoe")
_TERRA = ("location_100", "location_38", "location_43", "location_46")

# In the order of the official tables.
SETS = MappingProxyType(
    {
        entry.name: entry
        for entry in (
            _debug("Debug28", 28),
            _debug("Debug224", 224),
            BenchmarkSet("ColoredMNIST", "MNIST", ("+90%", "+80%", "-90%"), (), 2, 2, 28),
            BenchmarkSet("RotatedMNIST", "MNIST", ("0", "15", "30", "45", "60", "75"), (), 10, 1, 28),
            BenchmarkSet("VLCS", "VLCS", ("C", "L", "S", "V"), ("Caltech101", "LabelMe", "SUN09", "VOC2007"), 5),
            BenchmarkSet("PACS", "PACS", ("A", "C", "P", "S"), ("art_painting", "cartoon", "photo", "sketch"), 7),
            BenchmarkSet(
                "OfficeHome", "office_home", ("A", "C", "P", "R"), ("Art", "Clipart", "Product", "Real World"), 65
            ),
            BenchmarkSet("TerraIncognita", "terra_incognita", ("L100", "L38", "L43", "L46"), _TERRA, 10),
            BenchmarkSet(
                "DomainNet",
                "domain_net",
                ("clip", "info", "paint", "quick", "real", "sketch"),
                ("clipart", "infograph", "painting", "quickdraw", "real", "sketch"),
                345,
            ),
            BenchmarkSet("SVIRO", "sviro", _SVIRO, _SVIRO, 7, in_2020=False),
            _wilds("WILDSCamelyon", "hospital", 5, 2),
            _wilds("WILDSFMoW", "region", 6, 62),
            *(_spawrious(kind, level) for kind in ("O2O", "M2M") for level in ("easy", "medium", "hard")),
            BenchmarkSet(
                "CUB",
                "CUB_DG",
                ("Candy", "Mosaic", "Natural", "Udnie"),
                ("Candy", "Mosaic", "Natural", "Udnie"),
                200,
                in_2020=False,
                in_head=False,
            ),
        )
    }
)


def benchmark_set(name: str) -> BenchmarkSet:
    """The record of a data set.

    Raises:
        SpecError: the protocol does not know it; the message suggests the nearest name.
    """
    try:
        return SETS[name]
    except KeyError:
        raise SpecError(f"DomainBed's protocol has no data set {name!r}.", nearest(name, SETS)) from None
