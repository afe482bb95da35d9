"""food101: photographs of 101 dishes, 75,750 (not cleaned) to train on and 25,250 to test on; one domain.

Layout as torchvision's ``Food101``: ``food-101/{images/<class>/<number>.jpg, meta/{train,test}.json}``.
Source: Bossard et al. 2014, Food-101: Mining Discriminative Components with Random Forests.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from moe.errors import DataError
from workers.datasets._listed_images import HeldOutOptions, ListedSet, Listing, listed, photo_info
from workers.datasets._photo_drawings import write_drawing

TABLES = {"train": "meta/train.json", "test": "meta/test.json"}
CLASSES = 101

INFO = photo_info(
    "food101",
    CLASSES,
    "Food-101: photographs of 101 dishes, noisy training labels, one domain",
    licence="not stated; for research",
    source="official archive food-101.tar.gz, in torchvision's layout",
    citation="Bossard et al. 2014, Food-101: Mining Discriminative Components with Random Forests",
)


class Options(HeldOutOptions):
    """What a user may choose."""


def _tables(options: object) -> tuple[str, ...]:
    return tuple(TABLES.values())


def _read(folder: Path, options: object) -> Listing:
    tables = {split: _table(folder / table) for split, table in TABLES.items()}
    classes = sorted(tables["train"])
    if sorted(tables["test"]) != classes or len(classes) != CLASSES:
        raise DataError(
            f"{folder}/meta: train.json has {len(classes)} classes and test.json {len(tables['test'])}; both must have "
            f"the same {CLASSES}.",
            "Restore the tables from food-101.tar.gz.",
        )
    number = {name: label for label, name in enumerate(classes)}
    parts = {
        split: [(f"images/{name}.jpg", number[label]) for label, names in table.items() for name in names]
        for split, table in tables.items()
    }
    return listed(parts, tuple(classes))


def _table(path: Path) -> dict[str, list[str]]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is no JSON table ({error}).", "Restore it from food-101.tar.gz.") from error
    good = isinstance(table, dict) and all(
        isinstance(names, list)
        and all(isinstance(n, str) and n.startswith(f"{label}/") and ".." not in n for n in names)
        for label, names in table.items()
    )
    if not good:
        raise DataError(f"{path} does not map a class to a list of `class/number`.", "Restore it from the archive.")
    return dict(table)


def _draw(folder: Path, rng: np.random.Generator) -> None:
    (folder / "meta").mkdir()
    tables: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    for label in range(CLASSES):
        name = f"dish_{label:03d}"
        shots = [f"{name}/{1000 * label + shot}" for shot in range(6)]
        for shot in shots:
            write_drawing(folder / f"images/{shot}.jpg", label, rng)
        tables["train"][name], tables["test"][name] = shots[:4], shots[4:]
    for split, table in tables.items():
        (folder / TABLES[split]).write_text(json.dumps(table))


SET = ListedSet(
    INFO,
    "food-101",
    "images",
    {"train": 75750, "test": 25250},
    _tables,
    _read,
    _draw,
    "Unpack food-101.tar.gz.",
)
load, missing, fingerprint = SET.load, SET.missing, SET.fingerprint
import_archive, miniature = SET.import_archive, SET.miniature
