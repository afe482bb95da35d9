"""Functional Map of the World (WILDS): land use from satellite; years (and regions) are domains.

Official sizes: train 76,863 (2002-2012), id_val 11,483, id_test 11,327, val 19,915 (2013-2015), test 22,108
(2016-2017); 62 classes; about 50 GB. Which expert owns a row is decided by the year; adaptation is per year and region.
Reference: Christie et al. 2018, CVPR; Koh et al. 2021, arXiv 2012.07421.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from workers.datasets import _miniatures as paint
from workers.datasets import _wilds
from workers.datasets._fmow_names import CATEGORIES
from workers.datasets._tables import Table
from workers.datasets._wilds_archive import take_in
from workers.datasets.base import DatasetInfo, DomainData, Missing

INFO = DatasetInfo(
    name="fmow",
    title="Functional Map of the World (WILDS): land use from satellite, a domain per year and region",
    task="multiclass",
    num_outputs=62,
    channels=3,
    image_size=(224, 224),
    domain_field="year",
    group_fields=("region", "year"),
    metrics=("accuracy", "worst_region_accuracy", "acc_worst_region", "acc_worst_year"),
    selection_metric="worst_region_accuracy",
    normalisation="imagenet",
    licence="FMoW Challenge Public License",
    source="WILDS 2.0 archive fmow_v1.1 (wilds.stanford.edu)",
    citation="Christie et al. 2018; Koh et al. 2021 (WILDS)",
)
LAYOUT = _wilds.Layout("fmow", "1.1", ("rgb_metadata.csv", "country_code_mapping.csv"), "images")
_FIRST, _LAST = 2002, 2017  # years that wilds has an index for
_TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z"


class Options(BaseModel):
    """The official split has no choices."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def missing(root: Path) -> list[Missing]:
    """What is not there, and how to get it."""
    return _wilds.missing(root, LAYOUT)


def load(root: Path, options: Options) -> DomainData:
    """Read the set below ``root``; the sequestered rows (split ``seq``) are left out, as ``wilds`` does.

    Raises:
        NotFoundError: it is not there.
        DataError: a table or an image breaks the official layout.
    """
    folder = _wilds.require(root, LAYOUT)
    text = ("split", "category", "country_code", "timestamp")
    table = Table(folder / "rgb_metadata.csv", text, text=text)
    table.one_of("split", ("train", "val", "test", "seq"))
    table.one_of("category", CATEGORIES)
    years = table.moments("timestamp", _TIME, "2015-06-21T08:40:18Z")
    outside = ((years < _FIRST) | (years > _LAST)) & (table.frame["split"] != "seq").to_numpy()
    table.refuse_where("timestamp", outside, f"a year from {_FIRST} to {_LAST}")
    Table(folder / "country_code_mapping.csv", ("alpha-3", "region"), text=("alpha-3", "region"))
    dataset = _wilds.open_dataset(LAYOUT, folder)
    names = [f"images/rgb_img_{row}.png" for row in dataset.full_idxs]
    value_names = {
        "region": tuple(str(region) for region in dataset.metadata_map["region"]),
        "year": tuple(str(year) for year in range(_FIRST, _LAST + 1)),
        "y": CATEGORIES,
    }
    images = _wilds.ImageFiles(folder, names, (224, 224))
    return _wilds.assemble(INFO, LAYOUT, folder, dataset, images, names, value_names)


def fingerprint(root: Path, options: Options) -> str:
    """What the files are, for cache keys while planning; NotFoundError when they are not there."""
    return _wilds.fingerprint(root, LAYOUT)


def import_archive(root: Path, archive: Path) -> Path:
    """Take the official archive (or an unpacked folder) into ``root``; see ``_wilds_archive.take_in``."""
    return take_in(archive, root, LAYOUT)


# --- generated stand-in -----------------------------------------------------------------------------------------------

_REGIONS = {"Asia": "CHN", "Europe": "FRA", "Africa": "KEN", "Americas": "BRA", "Oceania": "AUS", "Other": "XKX"}
_GROUND = {
    "Asia": (150, 130, 90),
    "Europe": (80, 120, 70),
    "Africa": (190, 140, 90),
    "Americas": (60, 100, 60),
    "Oceania": (170, 100, 70),
    "Other": (120, 120, 120),
}
_USED = ("airport", "crop_field", "golf_course", "lighthouse", "port", "solar_farm", "stadium", "zoo")
# (split column, years, images per year and region); together they fill every official split and leave some rows out.
_PLAN = (
    ("train", range(2002, 2013), 5),
    ("val", range(2003, 2013, 2), 1),
    ("test", range(2002, 2013, 2), 1),
    ("val", range(2013, 2016), 5),
    ("test", range(2016, 2018), 8),
    ("train", range(2014, 2015), 1),  # after the cut: in no split
    ("seq", range(2010, 2011), 1),  # sequestered: dropped, but their images count in the numbering
)


def miniature(root: Path, seed: int) -> None:
    """Write a generated set: 16 years, 6 regions, 8 of the 62 classes, 544 images. Haze grows with the years."""
    paint.write(root, LAYOUT, seed, _generate)


def _generate(folder: Path, seed: int) -> None:
    rng = np.random.default_rng([seed, 4])
    (folder / "images").mkdir()
    scenery = {region: paint.backdrop(rng, (224, 224), ground, 35) for region, ground in _GROUND.items()}
    haze = {year: rng.uniform(0.8, 1.1, 3) for year in range(_FIRST, _LAST + 1)}
    plan = [
        (split, year, region)
        for split, years, count in _PLAN
        for year in years
        for region in _REGIONS
        for _ in range(max(1, count // 2) if region == "Other" else count)
    ]
    rows: list[dict[str, object]] = []
    for index in rng.permutation(len(plan)):
        split, year, region = plan[index]
        label = int(rng.integers(len(_USED)))
        size = float(rng.uniform(60, 110))
        image = paint.Canvas(scenery[region])
        for _ in range(4):  # roads and fields of no meaning
            x, y = rng.uniform(0, 224, 2)
            image.blob((x, y), (rng.uniform(4, 12), rng.uniform(4, 12)), paint.random_colour(rng, 90, 160))
        centre = (float(rng.uniform(size / 2, 224 - size / 2)), float(rng.uniform(size / 2, 224 - size / 2)))
        image.shape(label, centre, size, paint.PALETTE[label])
        light = 1.15 - 0.03 * (year - _FIRST)
        image.save(folder / "images" / f"rgb_img_{len(rows)}.png", haze[year], light, levels=32)
        fraction = f".{rng.integers(1000):03d}" if len(rows) % 7 == 3 else ""  # the real table mixes both forms
        rows.append(
            {
                "split": split,
                "category": _USED[label],
                "country_code": _REGIONS[region],
                "timestamp": f"{year}-{rng.integers(1, 13):02d}-{rng.integers(1, 29):02d}T"
                f"{rng.integers(24):02d}:{rng.integers(60):02d}:{rng.integers(60):02d}{fraction}Z",
            }
        )
    paint.write_csv(folder / "rgb_metadata.csv", rows)
    mapping = [
        {"name": region, "alpha-3": code, "region": region} for region, code in _REGIONS.items() if region != "Other"
    ]
    paint.write_csv(folder / "country_code_mapping.csv", mapping)
