"""PovertyMap (WILDS): asset wealth of a place from 8-channel satellite images; countries are domains.

Official sizes: 19,669 places in 23 African countries; a fold (A to E) decides which countries are val and test; of the
other places 1,000 are id_val, 1,000 id_test and the rest (about 10,000) train. About 13 GB.
Reference: Yeh et al. 2020, Nature Communications 11; Koh et al. 2021, arXiv 2012.07421.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from moe.errors import DataError
from workers.datasets import _miniatures as paint
from workers.datasets import _wilds
from workers.datasets._tables import Table
from workers.datasets._wilds_archive import take_in
from workers.datasets.base import DatasetInfo, DomainData, Missing

INFO = DatasetInfo(
    name="poverty",
    title="PovertyMap (WILDS): asset wealth from satellite, a domain per country, five folds",
    task="regression",
    num_outputs=1,
    channels=8,
    image_size=(224, 224),
    domain_field="country",
    group_fields=("country",),
    metrics=("pearson_r", "worst_group_pearson_r", "mse"),
    selection_metric="worst_group_pearson_r",
    normalisation="none",
    licence="imagery: US public domain; survey values: DHS terms of use",
    source="WILDS 2.0 archive poverty_v1.1 (wilds.stanford.edu)",
    citation="Yeh et al. 2020; Koh et al. 2021 (WILDS)",
)
LAYOUT = _wilds.Layout("poverty", "1.1", ("dhs_metadata.csv",), "images")
# fmt: off
COUNTRIES: tuple[str, ...] = (
    "angola", "benin", "burkina_faso", "cameroon", "cote_d_ivoire", "democratic_republic_of_congo", "ethiopia",
    "ghana", "guinea", "kenya", "lesotho", "malawi", "mali", "mozambique", "nigeria", "rwanda", "senegal",
    "sierra_leone", "tanzania", "togo", "uganda", "zambia", "zimbabwe",
)
# fmt: on
SHAPE = (8, 224, 224)  # channels (blue, green, red, two short-wave, thermal, near infrared, night lights), pixels
_NIGHT_LIGHTS = 7


class Options(BaseModel):
    """Which countries are held out, and which channels are used."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fold: Literal["A", "B", "C", "D", "E"] = Field(
        "A", description="Official fold: decides the validation and test countries. Papers report the mean of all five."
    )
    night_lights: bool = Field(
        True, description="False sets the night-lights channel to zero, as `no_nl` of wilds does."
    )


@dataclass(frozen=True)
class Bands:
    """The normalised 8-channel images, decoded on access as float32 ``[8, 224, 224]``."""

    folder: Path
    names: Sequence[str]
    night_lights: bool

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> NDArray[np.float32]:
        """Read one image; DataError naming the file when it is missing, corrupt or of another shape."""
        path = self.folder / self.names[row]
        try:
            with np.load(path, allow_pickle=False) as archive:
                bands = np.asarray(archive["x"], dtype=np.float32)
        except Exception as error:  # zipfile, zlib and numpy raise many kinds
            raise _wilds.unreadable(path, error) from error
        if bands.shape != SHAPE:
            raise DataError(
                f"{path}: array 'x' has shape {list(bands.shape)}, expected {list(SHAPE)}.",
                "Restore the file from the official archive.",
            )
        if not self.night_lights:
            bands[_NIGHT_LIGHTS] = 0
        return bands


def missing(root: Path) -> list[Missing]:
    """What is not there, and how to get it."""
    return _wilds.missing(root, LAYOUT)


def load(root: Path, options: Options) -> DomainData:
    """Read the set below ``root`` with the splits of ``options.fold``.

    Raises:
        NotFoundError: it is not there.
        DataError: a table or an image breaks the official layout.
    """
    folder = _wilds.require(root, LAYOUT)
    table = Table(folder / "dhs_metadata.csv", ("country", "wealthpooled", "urban"), text=("country",))
    table.one_of("country", COUNTRIES)
    table.number("wealthpooled")
    table.whole("urban", 0, 1)
    dataset = _wilds.open_dataset(LAYOUT, folder, fold=options.fold, no_nl=not options.night_lights)
    names = [f"images/landsat_poverty_img_{row}.npz" for row in range(len(dataset))]
    images = Bands(folder, names, options.night_lights)
    value_names = {"country": COUNTRIES, "urban": ("rural", "urban")}
    data = _wilds.assemble(INFO, LAYOUT, folder, dataset, images, names, value_names)
    if options.night_lights:
        return data
    return replace(data, digest=hashlib.sha256(f"{data.digest} without night lights".encode()).hexdigest())


def fingerprint(root: Path, options: Options) -> str:
    """What the files are, for cache keys while planning; NotFoundError when they are not there."""
    return _wilds.fingerprint(root, LAYOUT)


def import_archive(root: Path, archive: Path) -> Path:
    """Take the official archive (or an unpacked folder) into ``root``; see ``_wilds_archive.take_in``."""
    return take_in(archive, root, LAYOUT)


# --- generated stand-in -----------------------------------------------------------------------------------------------

_PLACES = 180  # per country: every fold then has at least 13 * 180 = 2340 in-domain places, and 2000 are held out
_LEVELS = 5  # steps of wealth; one image file per country, step and kind of place, hard-linked for every place


def miniature(root: Path, seed: int) -> None:
    """Write a generated set: 23 countries of 180 places, 230 different images. Countries shift all channels."""
    paint.write(root, LAYOUT, seed, _generate)


def _generate(folder: Path, seed: int) -> None:
    rng = np.random.default_rng([seed, 5])
    images, distinct = folder / "images", folder / "distinct"
    images.mkdir()
    distinct.mkdir()
    rows: list[dict[str, object]] = []
    for number, country in enumerate(COUNTRIES):
        gain, offset = rng.uniform(0.7, 1.3, 8), rng.normal(0, 0.4, 8)
        files: dict[tuple[int, int], Path] = {}
        for level in range(_LEVELS):
            for urban in (0, 1):
                files[level, urban] = distinct / f"{number}_{level}_{urban}.npz"
                _save(files[level, urban], _bands(rng, level, urban, gain, offset))
        for _ in range(_PLACES):
            urban = int(rng.random() < 0.4)
            level = int(np.clip(rng.integers(_LEVELS) + (urban if rng.random() < 0.5 else 0), 0, _LEVELS - 1))
            _link(files[level, urban], images / f"landsat_poverty_img_{len(rows)}.npz")
            rows.append(
                {
                    "country": country,
                    "year": int(rng.integers(2009, 2018)),
                    "wealthpooled": round(0.6 * (level - (_LEVELS - 1) / 2) + rng.normal(0, 0.15), 5),
                    "urban": bool(urban),
                    "lat": round(rng.uniform(-25, 15), 4),
                    "lon": round(rng.uniform(-15, 45), 4),
                }
            )
    shutil.rmtree(distinct)  # the links keep the bytes
    paint.write_csv(folder / "dhs_metadata.csv", rows)


def _bands(
    rng: np.random.Generator, level: int, urban: int, gain: NDArray[np.float64], offset: NDArray[np.float64]
) -> NDArray[np.float32]:
    """One image ``[8, 224, 224]``: more buildings, greener fields and brighter nights with wealth."""
    coarse = rng.normal(0, 0.5, (8, 14, 14))
    built = rng.random((14, 14)) < 0.06 * (level + 1) + 0.1 * urban
    coarse[:3] += 1.5 * built
    coarse[6] += 0.4 * level - 0.8
    coarse[_NIGHT_LIGHTS] = (0.5 * level + 0.5 * urban) * built - 0.5
    shifted = np.round((coarse * gain[:, None, None] + offset[:, None, None]) * 16) / 16  # few values compress well
    return shifted.repeat(16, axis=1).repeat(16, axis=2).astype(np.float32)


def _save(path: Path, bands: NDArray[np.float32]) -> None:
    """``numpy.savez_compressed`` with the fastest compression: the pattern is coarse, more effort gains nothing."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, bands, allow_pickle=False)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        entry = zipfile.ZipInfo("x.npy")  # with the fixed date of 1980: equal seeds give equal bytes
        entry.compress_type = zipfile.ZIP_DEFLATED
        archive.writestr(entry, buffer.getvalue(), compresslevel=1)


def _link(source: Path, target: Path) -> None:
    """Hard link; a copy on file systems that have none (the set then takes 20 times the space)."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
