"""oxford_pets: photographs of 37 breeds of cats and dogs, 3,680 to train on and 3,669 to test on; one domain.

Layout as torchvision's ``OxfordIIITPet``: ``oxford-iiit-pet/{images/*.jpg, annotations/{trainval,test}.txt}``.
Source: Parkhi et al. 2012, Cats and Dogs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moe.errors import DataError
from workers.datasets._listed_images import HeldOutOptions, ListedSet, Listing, lines_of, listed, photo_info
from workers.datasets._photo_drawings import write_drawing

TABLES = {"train": "annotations/trainval.txt", "test": "annotations/test.txt"}
CLASSES = 37

INFO = photo_info(
    "oxford_pets",
    CLASSES,
    "Oxford-IIIT Pets: photographs of 37 breeds of cats and dogs, one domain",
    licence="CC BY-SA 4.0",
    source="official archives images.tar.gz and annotations.tar.gz, in torchvision's layout",
    citation="Parkhi et al. 2012, Cats and Dogs",
)


class Options(HeldOutOptions):
    """What a user may choose."""


def _tables(options: object) -> tuple[str, ...]:
    return tuple(TABLES.values())


def _read(folder: Path, options: object) -> Listing:
    breeds: dict[int, str] = {}
    parts = {}
    for split, table in TABLES.items():
        rows = []
        for number, line in enumerate(lines_of(folder / table), start=1):
            if line.startswith("#"):
                continue
            name, *numbers = line.split()
            if len(numbers) != 3 or not numbers[0].isdecimal() or not name.rpartition("_")[0]:
                raise DataError(
                    f"{folder / table}, line {number}: {line[:60]!r} is not `Breed_1 CLASS SPECIES NUMBER`.",
                    "Restore it from annotations.tar.gz.",
                )
            label = int(numbers[0]) - 1
            rows.append((f"images/{name}.jpg", label))
            breed = name.rpartition("_")[0]
            if breeds.setdefault(label, breed) != breed:
                raise DataError(
                    f"{folder / table}, line {number}: class {label + 1} is {breed!r}, before {breeds[label]!r}.",
                    "Restore it from annotations.tar.gz.",
                )
        parts[split] = rows
    return listed(parts, tuple(breeds[label] for label in sorted(breeds)) if len(breeds) == CLASSES else ())


def _draw(folder: Path, rng: np.random.Generator) -> None:
    (folder / "annotations").mkdir()
    for table, count in zip(TABLES.values(), (6, 3), strict=True):
        lines = []
        for label in range(CLASSES):
            breed = f"{'Cat' if label % 3 == 0 else 'dog'}_{label + 1:02d}"
            for shot in range(count):
                name = f"{breed}_{shot + (100 if 'test' in table else 1)}"
                write_drawing(folder / f"images/{name}.jpg", label, rng)
                lines.append(f"{name} {label + 1} {1 if label % 3 == 0 else 2} {label // 3 + 1}\n")
        (folder / table).write_text("".join(lines))


SET = ListedSet(
    INFO,
    "oxford-iiit-pet",
    "images",
    {"train": 3680, "test": 3669},
    _tables,
    _read,
    _draw,
    "Unpack images.tar.gz and annotations.tar.gz into one folder.",
)
load, missing, fingerprint = SET.load, SET.missing, SET.fingerprint
import_archive, miniature = SET.import_archive, SET.miniature
