"""RxRx1 (WILDS): which of 1,139 siRNAs a cell culture was treated with; experiment batches are domains.

Official sizes: train 40,612 (33 experiments, site 1), val 9,854 (4), test 34,432 (14), id_test 40,612 (the training
experiments' site 2); no id_val; about 7 GB. Reference: Taylor et al. 2019, ICLR workshop; Koh et al. 2021,
arXiv 2012.07421.
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
    name="rxrx1",
    title="RxRx1 (WILDS): genetic treatment of cells under the microscope, a domain per experiment",
    task="multiclass",
    num_outputs=1139,
    channels=3,
    image_size=(256, 256),
    domain_field="experiment",
    group_fields=("experiment",),
    metrics=("accuracy", "acc_wg"),
    selection_metric="accuracy",
    normalisation="instance",
    licence="CC-BY-NC-SA-4.0",
    source="WILDS 2.0 archive rxrx1_v1.0 (wilds.stanford.edu)",
    citation="Taylor et al. 2019; Koh et al. 2021 (WILDS)",
)
LAYOUT = _wilds.Layout("rxrx1", "1.0", ("metadata.csv",), "images")


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
    text = ("dataset", "experiment", "well", "cell_type")
    table = Table(folder / "metadata.csv", (*text, "plate", "site", "sirna_id"), text=text)
    table.one_of("dataset", ("train", "val", "test"))
    table.matches("experiment", r"[A-Za-z0-9]+-[0-9]+", "HEPG2-01")
    table.matches("well", r"[A-Z]+[0-9]+", "B02")
    table.matches("cell_type", r"[A-Za-z0-9]+", "HEPG2")
    table.whole("plate", 0, 99)
    table.whole("site", 1, 2)
    table.covers("sirna_id", 0, INFO.num_outputs - 1)
    dataset = _wilds.open_dataset(LAYOUT, folder)
    names = [str(name).replace("\\", "/") for name in dataset._input_array]
    value_names = {field: tuple(map(str, values)) for field, values in dataset.metadata_map.items()}
    value_names.pop("from_source_domain", None)
    images = _wilds.ImageFiles(folder, names, (256, 256))
    return _wilds.assemble(INFO, LAYOUT, folder, dataset, images, names, value_names)


def fingerprint(root: Path, options: Options) -> str:
    """What the files are, for cache keys while planning; NotFoundError when they are not there."""
    return _wilds.fingerprint(root, LAYOUT)


def import_archive(root: Path, archive: Path) -> Path:
    """Take the official archive (or an unpacked folder) into ``root``; see ``_wilds_archive.take_in``."""
    return take_in(archive, root, LAYOUT)


# --- generated stand-in -----------------------------------------------------------------------------------------------

_EXPERIMENTS = {
    "train": ("HEPG2-01", "HUVEC-01", "HUVEC-02", "HUVEC-03", "RPE-01", "U2OS-01"),
    "val": ("HUVEC-04", "RPE-02"),
    "test": ("HEPG2-02", "HUVEC-05", "U2OS-02"),
}
_SIRNAS = 7
_WELLS_PER_PLATE = 14
# Per treatment: radius of a cell in pixels, number of cells, colour of its two stains.
_LOOKS = (
    (9.0, 26, (40, 200, 90), (60, 80, 230)),
    (16, 12, (40, 200, 90), (60, 80, 230)),
    (9, 26, (210, 60, 60), (60, 80, 230)),
    (16, 12, (210, 60, 60), (60, 80, 230)),
    (12, 18, (60, 160, 200), (230, 200, 60)),
    (20, 8, (200, 200, 60), (200, 60, 200)),
    (12, 6, (120, 120, 120), (230, 230, 230)),
)


def miniature(root: Path, seed: int) -> None:
    """Write a generated set: 11 experiments, 7 siRNAs, 616 images. An experiment has its own stain, density, zoom."""
    paint.write(root, LAYOUT, seed, _generate)


def _generate(folder: Path, seed: int) -> None:
    rng = np.random.default_rng([seed, 3])
    rows: list[dict[str, object]] = []
    for split, experiments in _EXPERIMENTS.items():
        for experiment in experiments:
            tint, density, zoom = rng.uniform(0.3, 1.3, 3), rng.uniform(0.6, 1.4), rng.uniform(0.7, 1.5)
            medium = paint.backdrop(rng, (256, 256), paint.random_colour(rng, 4, 24), 8)
            for plate in (1, 2):
                place = folder / "images" / experiment / f"Plate{plate}"
                place.mkdir(parents=True)
                for number in range(_WELLS_PER_PLATE):
                    well, sirna = f"{'BCDEFG'[number // 3]}{2 + number % 3:02d}", number % _SIRNAS
                    for site in (1, 2):
                        image = _culture(rng, medium, sirna, density, zoom)
                        image.save(place / f"{well}_s{site}.png", tint, rng.uniform(0.9, 1.1), levels=32)
                        rows.append(
                            {
                                "site_id": f"{experiment}_{plate}_{well}_{site}",
                                "well_id": f"{experiment}_{plate}_{well}",
                                "cell_type": experiment.split("-")[0],
                                "dataset": split,
                                "experiment": experiment,
                                "plate": plate,
                                "well": well,
                                "site": site,
                                "well_type": "treatment",
                                "sirna": f"s{sirna}",
                                "sirna_id": sirna,
                            }
                        )
    paint.write_csv(folder / "metadata.csv", rows)


def _culture(rng: np.random.Generator, medium: paint.Floats, sirna: int, density: float, zoom: float) -> paint.Canvas:
    """Cells (a body and a nucleus) whose size, number and stains follow from the treatment."""
    radius, cells, body, nucleus = _LOOKS[sirna]
    radius *= zoom
    culture = paint.Canvas(medium)
    for _ in range(max(3, round(cells * density))):
        centre = (float(rng.uniform(10, 246)), float(rng.uniform(10, 246)))
        stretch = float(rng.uniform(0.8, 1.25))
        culture.blob(centre, (radius * stretch, radius / stretch), body)
        culture.blob(centre, (radius / 2.2, radius / 2.2), nucleus)
    return culture
