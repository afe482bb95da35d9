"""The environments of a benchmark set, opened for one run.

RotatedMNIST, ColoredMNIST and the debug sets are dealt from the run's own generator, as in the public code, so every
run has other images in its environments. Every other set is a registry data set (``workers.datasets``): one environment
per domain, whatever its own splits say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moe.errors import SpecError
from workers.domainbed.benchmark_sets import SETS

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from workers.transforms import Normalisation

IntArray = NDArray[np.int64]

REGISTRY_NAMES: Mapping[str, str] = {
    "VLCS": "vlcs",
    "PACS": "pacs",
    "OfficeHome": "officehome",
    "TerraIncognita": "terraincognita",
    "DomainNet": "domainnet",
    "SVIRO": "sviro",
    "CUB": "cub_dg",
    "WILDSCamelyon": "wilds_camelyon",
    "WILDSFMoW": "wilds_fmow",
}
"""Official name -> registry name; a name that is not here is a registry name already."""
SPLIT_OPTIONS = frozenset({"target", "validation", "id_fraction", "support_fraction", "names_fraction"})
"""Options of registry sets that only say what their own splits are, which the protocol does not look at."""
_DEBUG_SIZE = 16
DEALT = frozenset({"RotatedMNIST", "ColoredMNIST", "Debug28", "Debug224"})


class Environment(Protocol):
    """One domain."""

    @property
    def labels(self) -> IntArray:
        """Classes, int64 ``[n]``."""
        ...

    def __len__(self) -> int: ...

    def batch(self, rows: IntArray, augment: bool, random: np.random.Generator) -> Tensor:
        """Images ``[len(rows), C, H, W]``, float32, ready for a network.

        Args:
            rows: which.
            augment: apply the training augmentation.
            random: of the augmentation; not touched without it.
        """
        ...


@dataclass(frozen=True)
class PixelEnvironment:
    """Images that fit into memory and are never augmented.

    Attributes:
        pixels: uint8 (divided by 255) or float32 ``[n, C, H, W]``.
        labels: int64 ``[n]``.
    """

    pixels: NDArray[Any]
    labels: IntArray

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: IntArray, augment: bool, random: np.random.Generator) -> Tensor:
        """See :class:`Environment`."""
        import torch

        images = torch.from_numpy(self.pixels[rows])
        return images.float().div_(255) if images.dtype == torch.uint8 else images


@dataclass(frozen=True)
class EnvironmentSet:
    """All domains of a data set.

    Attributes:
        name: official or registry name.
        labels: short name of each environment.
        classes: number of classes K.
        channels: of an image.
        image_size: side in pixels.
        environments: in the official order.
        digest: of the source files.
    """

    name: str
    labels: tuple[str, ...]
    classes: int
    channels: int
    image_size: int
    environments: Sequence[Environment]
    digest: str

    @property
    def small(self) -> bool:
        """28 x 28 pixels: the small network and hyper-parameters of their own."""
        return self.image_size == 28


def open_environments(
    name: str,
    root: Path,
    generator: Generator,
    options: Mapping[str, Any] | None = None,
    image_size: int | None = None,
    normalisation: Normalisation | None = None,
    threads: int = 1,
) -> EnvironmentSet:
    """The environments of a set, for one run.

    Args:
        name: official name (``PACS``) or registry name (``digits5``).
        root: data root.
        generator: the run's, just seeded; sets that are dealt by chance advance it.
        options: of a registry data set.
        image_size: side in pixels, for sets whose images are resized; None takes the set's own.
        normalisation: instead of the set's own, e.g. ``imagenet`` for a pretrained network.
        threads: images worked on at a time.

    Raises:
        NotFoundError: files are missing; the hint is the command that fetches them.
        DataError: files are damaged or laid out otherwise.
        SpecError: an unknown name, or options for a set that has none.
    """
    if name in DEALT:
        if options or image_size or normalisation:
            raise SpecError(f"{name} has no options, image size or normalisation to choose.", "Leave them out.")
        return _debug(name, generator) if name.startswith("Debug") else _mnist(name, root, generator)
    from workers.data import load_data
    from workers.domainbed.images import image_environments

    data = load_data(REGISTRY_NAMES.get(name, name), dict(options or {}), root)
    official = SETS.get(name)
    side = image_size or (official.image_size if official else max(data.info.image_size))
    cache = root / "decoded"
    environments = image_environments(data, side, cache=cache, threads=threads, normalisation=normalisation)
    column = data.info.domain_field
    values = np.unique(data.column(column))
    names = data.value_names.get(column)
    shown = official.labels if official else tuple(names[value] if names else str(value) for value in values)
    if len(shown) != len(environments):
        raise SpecError(f"{name} has {len(environments)} domains here, and the benchmark's has {len(shown)}.")
    return EnvironmentSet(name, shown, data.info.num_outputs, data.info.channels, side, environments, data.digest)


def _mnist(name: str, root: Path, generator: Generator) -> EnvironmentSet:
    from workers.datasets._idx import MNIST, read_pools
    from workers.domainbed.mnist import colored_mnist, rotated_mnist

    pools = read_pools(root, MNIST)
    images = np.concatenate([pools.train_images, pools.test_images])
    labels = np.concatenate([pools.train_labels, pools.test_labels])
    dealt = (rotated_mnist if name == "RotatedMNIST" else colored_mnist)(images, labels, generator)
    entry = SETS[name]
    found = [PixelEnvironment(environment.x, environment.y) for environment in dealt.environments]
    return EnvironmentSet(name, entry.labels, entry.classes, entry.channels, 28, found, pools.digest)


def _debug(name: str, generator: Generator) -> EnvironmentSet:
    """Three environments of 16 Gaussian images with random labels, to try out the machinery."""
    import torch

    entry = SETS[name]
    found = []
    for _ in entry.labels:
        shape = (_DEBUG_SIZE, entry.channels, entry.image_size, entry.image_size)
        pixels = torch.randn(shape, generator=generator)
        labels = torch.randint(0, entry.classes, (_DEBUG_SIZE,), generator=generator)
        found.append(PixelEnvironment(pixels.numpy(), labels.numpy().astype(np.int64)))
    return EnvironmentSet(name, entry.labels, entry.classes, entry.channels, entry.image_size, found, "debug")
