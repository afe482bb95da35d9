"""Camelyon17 (WILDS): tumour in a patch of lymph-node tissue; hospitals and their slides are domains.

Official sizes: train 302,436 (3 hospitals, 30 slides), id_val 33,560, val 34,904 (hospital 1), test 85,054
(hospital 2); about 10 GB. Reference: Bandi et al. 2018, IEEE TMI 38(2); Koh et al. 2021, arXiv 2012.07421.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from workers.datasets import _miniatures as paint
from workers.datasets import _wilds
from workers.datasets._tables import Table
from workers.datasets._wilds_archive import take_in
from workers.datasets.base import DatasetInfo, DomainData, Missing

INFO = DatasetInfo(
    name="camelyon17",
    title="Camelyon17 (WILDS): tumour in lymph-node tissue, a domain per slide, unseen hospitals",
    task="binary",
    num_outputs=1,
    channels=3,
    image_size=(96, 96),
    domain_field="slide",
    group_fields=("slide",),
    metrics=("accuracy", "acc_wg"),
    selection_metric="accuracy",
    normalisation="imagenet",
    licence="CC0-1.0",
    source="WILDS 2.0 archive camelyon17_v1.0 (wilds.stanford.edu)",
    citation="Bandi et al. 2018; Koh et al. 2021 (WILDS)",
)
LAYOUT = _wilds.Layout("camelyon17", "1.0", ("metadata.csv",), "patches")


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
        ("patient", "node", "x_coord", "y_coord", "tumor", "slide", "center", "split"),
        text=("patient",),
    )
    table.matches("patient", r"[0-9]+", "004")
    table.whole("node", 0, 99)
    table.whole("x_coord", 0, 10**9)
    table.whole("y_coord", 0, 10**9)
    table.whole("tumor", 0, 1)
    table.whole("slide", 0, 49)
    table.whole("center", 0, 4)
    table.whole("split", 0, 1)
    dataset = _wilds.open_dataset(LAYOUT, folder)
    names = list(dataset._input_array)
    value_names = {"y": ("normal", "tumour"), "hospital": tuple(f"hospital {number}" for number in range(5))}
    images = _wilds.ImageFiles(folder, names, (96, 96))
    return _wilds.assemble(INFO, LAYOUT, folder, dataset, images, names, value_names)


def fingerprint(root: Path, options: Options) -> str:
    """What the files are, for cache keys while planning; NotFoundError when they are not there."""
    return _wilds.fingerprint(root, LAYOUT)


def import_archive(root: Path, archive: Path) -> Path:
    """Take the official archive (or an unpacked folder) into ``root``; see ``_wilds_archive.take_in``."""
    return take_in(archive, root, LAYOUT)


# --- generated stand-in -----------------------------------------------------------------------------------------------

_VAL, _TEST = 1, 2  # hospitals, fixed by the official split
_PATCHES = {"train": 12, "id_val": 2, "ood": 8}


def miniature(root: Path, seed: int) -> None:
    """Write a generated set: 5 hospitals of 10 slides, 580 patches. Hospitals stain differently, slides a little so."""
    paint.write(root, LAYOUT, seed, _generate)


def _generate(folder: Path, seed: int) -> None:
    rng = np.random.default_rng([seed, 2])
    rows: list[dict[str, object]] = []
    for center in range(5):
        stain = rng.uniform(0.65, 1.15, 3)
        for slide in range(center * 10, center * 10 + 10):
            tint = stain * rng.uniform(0.9, 1.1, 3)
            tissue = paint.backdrop(rng, (96, 96), (235, 200, 220), 12)
            patient, node = f"{center * 20 + slide % 10:03d}", slide % 5
            patches = folder / "patches" / f"patient_{patient}_node_{node}"
            patches.mkdir(parents=True)
            count = _PATCHES["ood"] if center in (_VAL, _TEST) else _PATCHES["train"] + _PATCHES["id_val"]
            for shot in range(count):
                label = shot % 2
                x, y = 96 * shot, 96 * slide
                name = f"patch_{patches.name}_x_{x}_y_{y}.png"
                _patch(rng, tissue, label).save(patches / name, tint, rng.uniform(0.9, 1.05), levels=32)
                rows.append(
                    {
                        "": len(rows),
                        "patient": patient,
                        "node": node,
                        "x_coord": x,
                        "y_coord": y,
                        "tumor": label,
                        "slide": slide,
                        "center": center,
                        "split": int(center not in (_VAL, _TEST) and shot >= _PATCHES["train"]),
                    }
                )
    paint.write_csv(folder / "metadata.csv", rows)


def _patch(rng: np.random.Generator, tissue: paint.Floats, label: int) -> paint.Canvas:
    """Small pale nuclei everywhere; tumour adds large dark ones in the 32 x 32 centre, where the label is decided."""
    patch = paint.Canvas(tissue)
    for _ in range(22):
        x, y = rng.uniform(0, 96, 2)
        patch.blob((x, y), (rng.uniform(2, 3.5), rng.uniform(2, 3.5)), (150, 110, 170))
    if label:
        for _ in range(6):
            x, y = rng.uniform(34, 62, 2)
            patch.blob((x, y), (rng.uniform(4, 7), rng.uniform(4, 7)), (90, 50, 120))
    return patch
