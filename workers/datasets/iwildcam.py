"""iWildCam 2020 (WILDS): which animal is on a camera-trap picture; every trap is a domain.

Official sizes: train 129,809 (243 traps), val 14,961 (32 others), test 42,791 (48 others), id_val 7,314, id_test 8,154;
182 classes; about 12 GB. Reference: Beery et al. 2020, arXiv 2004.10340; Koh et al. 2021, arXiv 2012.07421.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from workers.datasets import _miniatures as paint
from workers.datasets import _wilds
from workers.datasets._tables import Table, optional_names
from workers.datasets._wilds_archive import take_in
from workers.datasets.base import DatasetInfo, DomainData, Missing

INFO = DatasetInfo(
    name="iwildcam",
    title="iWildCam (WILDS): animal species on camera-trap pictures, a domain per trap",
    task="multiclass",
    num_outputs=182,
    channels=3,
    image_size=(448, 448),
    domain_field="location",
    group_fields=("location",),
    metrics=("accuracy", "macro_f1", "macro_recall"),
    selection_metric="macro_f1",
    normalisation="imagenet",
    licence="CDLA-Permissive-1.0",
    source="WILDS 2.0 archive iwildcam_v2.0 (wilds.stanford.edu)",
    citation="Beery et al. 2020; Koh et al. 2021 (WILDS)",
)
LAYOUT = _wilds.Layout("iwildcam", "2.0", ("metadata.csv",), "train")
SPLITS = ("train", "val", "test", "id_val", "id_test")


class Options(BaseModel):
    """The official split has no choices."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def missing(root: Path) -> list[Missing]:
    """What is not there, and how to get it."""
    return _wilds.missing(root, LAYOUT)


def load(root: Path, options: Options) -> DomainData:
    """Read the set below ``root``.

    Raises:
        NotFoundError: it is not there.
        DataError: a table or an image breaks the official layout.
    """
    folder = _wilds.require(root, LAYOUT)
    table = Table(
        folder / "metadata.csv",
        ("split", "filename", "y", "location_remapped", "sequence_remapped", "datetime"),
        text=("split", "filename", "datetime"),
    )
    table.one_of("split", SPLITS)
    table.matches("filename", r"[^/\\]+", "900fd6fa-21bc-11ea-a13a-137349068a90.jpg")
    table.moments("datetime", r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{1,6}", "2013-07-21 05:42:00.000")
    for column in ("y", "location_remapped", "sequence_remapped"):
        table.covers(column, 0, 10**7)
    dataset = _wilds.open_dataset(LAYOUT, folder)
    names = [f"{LAYOUT.images}/{name}" for name in dataset._input_array]
    species = optional_names(folder / "categories.csv", "y", "name")
    images = _wilds.ImageFiles(folder, names, None)  # any width; the transform resizes
    return _wilds.assemble(INFO, LAYOUT, folder, dataset, images, names, {"y": species} if species else {})


def fingerprint(root: Path, options: Options) -> str:
    """What the files are, for cache keys while planning; NotFoundError when they are not there."""
    return _wilds.fingerprint(root, LAYOUT)


def import_archive(root: Path, archive: Path) -> Path:
    """Take the official archive (or an unpacked folder) into ``root``; see ``_wilds_archive.take_in``."""
    return take_in(archive, root, LAYOUT)


# --- generated stand-in -----------------------------------------------------------------------------------------------

_SPECIES = ("empty", "agouti", "ocelot", "tapir", "peccary", "curassow")
_FREQUENCY = (0.3, 0.2, 0.16, 0.13, 0.12, 0.09)  # long-tailed, most pictures empty, as in the real set
_TRAPS = {"train": 12, "val": 3, "test": 4}
_PER_TRAP = {"train": 24, "val": 20, "test": 20, "id_val": 3, "id_test": 3}
_HEIGHT, _WIDTH = 448, 256


def miniature(root: Path, seed: int) -> None:
    """Write a generated set: 19 traps, 6 species, 500 pictures. A trap has its own scenery, light and colours."""
    paint.write(root, LAYOUT, seed, _generate)


def _generate(folder: Path, seed: int) -> None:
    rng = np.random.default_rng([seed, 1])
    (folder / "train").mkdir()
    rows: list[dict[str, object]] = []
    sequence = 0
    location = 0
    for home_split, traps in _TRAPS.items():
        for _ in range(traps):
            scenery = paint.backdrop(rng, (_HEIGHT, _WIDTH), paint.random_colour(rng, 60, 150), 45)
            tint = rng.uniform(0.6, 1.3, 3)
            splits = ("train", "id_val", "id_test") if home_split == "train" else (home_split,)
            for split in splits:
                for shot in range(_PER_TRAP[split]):
                    label = shot % len(_SPECIES) if len(rows) < 24 else int(rng.choice(len(_SPECIES), p=_FREQUENCY))
                    picture = paint.Canvas(scenery)
                    if label:
                        size = rng.uniform(90, 150)
                        centre = (rng.uniform(size / 2, _WIDTH - size / 2), rng.uniform(size / 2, _HEIGHT - size / 2))
                        picture.shape(label, centre, size, paint.PALETTE[label])
                    name = f"{len(rows):08d}.jpg"
                    picture.save(folder / "train" / name, tint, rng.uniform(0.8, 1.15))
                    sequence += shot % 2 == 0  # bursts of two
                    rows.append(
                        {
                            "split": split,
                            "location_remapped": location,
                            "location": 100 + location,
                            "sequence_remapped": sequence - 1,
                            "seq_id": f"s{sequence - 1}",
                            "y": label,
                            "category_id": 10 + label,
                            "datetime": f"2013-{rng.integers(1, 13):02d}-{rng.integers(1, 29):02d} "
                            f"{rng.integers(24):02d}:{rng.integers(60):02d}:{rng.integers(60):02d}.000",
                            "filename": name,
                            "image_id": name[:-4],
                        }
                    )
            location += 1
    paint.write_csv(folder / "metadata.csv", rows)
    paint.write_csv(
        folder / "categories.csv",
        [{"category_id": 10 + index, "name": name, "y": index} for index, name in enumerate(_SPECIES)],
    )
