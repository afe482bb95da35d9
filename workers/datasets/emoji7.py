"""emoji7: seven kinds of emoji drawn by six artists' sets; each set is one domain; RGB 32x32 on white.

The pictures are SVG in the npm packages ``@iconify-json/*``, rendered by resvg. A fifth of the icon names is held out
everywhere, otherwise the same concept would be known from another artist: training uses the other names of the source
sets, ``id_val`` (= ``val``) the held-out names there, ``test_support`` the target's pictures of training names (to be
used without labels) and ``test`` the target's held-out names. ``noto`` and ``noto-v1`` are one vendor's: with either as
target the other is left out.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from moe.errors import DataError, NotFoundError
from workers.datasets._arrays import Arrays, cached, domain_data, has_package, toolchain
from workers.datasets.base import DatasetInfo, DomainData, FileRecord, Missing, data_root

Domain = Literal["noto", "noto-v1", "twemoji", "openmoji", "fluent-emoji-flat", "emojione"]
DOMAINS: tuple[Domain, ...] = ("noto", "noto-v1", "twemoji", "openmoji", "fluent-emoji-flat", "emojione")
CLASSES = (
    *("Activities", "Animals & Nature", "Food & Drink", "Objects"),
    *("Smileys & Emotion", "Symbols", "Travel & Places"),
)
RECIPE = "v1"
SIDE = 32
_VERSIONS = ("1.2.9", "1.2.5", "1.2.5", "1.2.29", "1.2.6", "1.2.3")
_CHECKSUMS = (
    "9eac6ef4e7ec122b6f0e7ac281d61008afdbc720d0ce861e398b939daaa347c6",
    "ce70d8aa90345cf389875c3571ecd245bd943401822a0c5a0f62336bf8487333",
    "5d5d820790565b764f2728675d487c9ee4c1fc83916d8567d5aca8ba7527c242",
    "7075331faab544067dbff4236471dd378bb5410aa05799a8a343c9ebf5c5984c",
    "f5f4cf457c0db2ad5a2e42e033e02e0c87d10e43d0164cfffb3bb84914970a63",
    "e9a865faed523a7c3535b5319ae533d09fac1a62b4e96920eb178bb60e707e80",
)
_SIZES = (25233364, 8273516, 10187099, 9079991, 8958092, 2976514)
_FAMILY = {"noto": ("noto", "noto-v1"), "noto-v1": ("noto", "noto-v1")}

INFO = DatasetInfo(
    name="emoji7",
    title="Seven kinds of emoji by six artists' sets, 32x32 RGB",
    task="multiclass",
    num_outputs=7,
    channels=3,
    image_size=(SIDE, SIDE),
    domain_field="domain",
    group_fields=("domain",),
    metrics=("accuracy", "worst_domain_accuracy", "macro_f1"),
    selection_metric="accuracy",
    normalisation="unit",
    licence="noto Apache-2.0; twemoji, emojione CC BY 4.0; openmoji CC BY-SA 4.0; fluent-emoji-flat MIT",
    source="npm packages @iconify-json/* and the PyPI package resvg-py",
    extra="emoji",
    citation="ours; the emoji by Google, Twitter, OpenMoji, Microsoft and EmojiOne",
    files=tuple(
        FileRecord(f"iconify/{name}/icons.json", size, checksum)
        for name, size, checksum in zip(DOMAINS, _SIZES, _CHECKSUMS, strict=True)
    ),
)


class Options(BaseModel):
    """What a user may choose."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: Domain = Field("openmoji", description="artist's set that is held out for testing")
    names_fraction: float = Field(0.2, gt=0, lt=0.9, description="share of icon names kept out of training everywhere")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="seed that draws the held-out names")


def load(root: Path, options: Options) -> DomainData:
    """Images uint8 ``[32, 32, 3]``; metadata ``domain``, ``y``, ``icon`` (index of the icon's name).

    Raises:
        NotFoundError: a package or resvg-py is missing; the hint holds the command.
        DataError: a file does not match its checksum, or the cached copy is damaged.
    """
    gaps = missing(root)
    if gaps:
        what = "; ".join(gap.what for gap in gaps)
        raise NotFoundError(f"emoji7: missing {what}.", "Run: " + " ; ".join(gap.fix for gap in gaps))
    recipe = f"{RECIPE}-{toolchain('pillow', 'resvg-py')}"
    arrays = cached(data_root(root, INFO), recipe, lambda: _build(root))
    labels, domain, icon = arrays["labels"], arrays["domain"], arrays["icon"]
    kept = ~np.isin(domain, [DOMAINS.index(name) for name in _FAMILY.get(options.target, (options.target,))])
    target = domain == DOMAINS.index(options.target)
    icons = np.unique(icon)
    order = np.random.default_rng([options.seed, 7]).permutation(icons)
    unseen = np.isin(icon, order[: round(len(icons) * options.names_fraction)])
    splits = {
        "train": np.flatnonzero(kept & ~unseen),
        "id_val": np.flatnonzero(kept & unseen),
        "val": np.flatnonzero(kept & unseen),
        "test_support": np.flatnonzero(target & ~unseen),
        "test": np.flatnonzero(target & unseen),
    }
    metadata = np.stack([domain, labels, icon], axis=1)
    names = {"domain": tuple(DOMAINS), "y": CLASSES}
    return domain_data(INFO, arrays["images"], labels, metadata, ("domain", "y", "icon"), splits, names)


def missing(root: Path) -> list[Missing]:
    """Packages that ``load`` would not find."""
    gaps = []
    if not has_package("resvg_py"):
        gaps.append(Missing("the package resvg-py, which renders SVG", "pip install 'moepipe[emoji]'"))
    for name, version in zip(DOMAINS, _VERSIONS, strict=True):
        folder = root / "iconify" / name
        needed = ("icons.json", "metadata.json") if name == "noto" else ("icons.json",)
        if any(not (folder / file).is_file() for file in needed):
            fix = (
                f"npm pack @iconify-json/{name}@{version} && mkdir -p '{folder}' && "
                f"tar -xzf iconify-json-{name}-{version}.tgz -C '{folder}' --strip-components=1"
            )
            gaps.append(Missing(f"the icons of {name} in {folder}", fix))
    return gaps


def _build(root: Path) -> Arrays:
    """Render every icon that has one of the seven kinds in noto's list."""
    kinds = _kinds(root)
    numbers = {icon: number for number, icon in enumerate(sorted(kinds))}
    images, labels, domain, icons = [], [], [], []
    for number, (name, checksum) in enumerate(zip(DOMAINS, _CHECKSUMS, strict=True)):
        path = root / "iconify" / name / "icons.json"
        content = path.read_bytes()
        if (seen := hashlib.sha256(content).hexdigest()) != checksum:
            raise DataError(
                f"{path} is damaged or another edition: its SHA-256 is {seen}, expected {checksum}.",
                f"Fetch version {_VERSIONS[number]} again.",
            )
        table = json.loads(content)
        for icon in sorted(table["icons"].keys() & kinds.keys()):
            images.append(_draw(table, icon))
            labels.append(kinds[icon])
            domain.append(number)
            icons.append(numbers[icon])
    return {
        "images": np.stack(images),
        "labels": np.array(labels, np.int64),
        "domain": np.array(domain, np.int64),
        "icon": np.array(icons, np.int64),
    }


def _kinds(root: Path) -> dict[str, int]:
    """Icon name -> class, by the categories of noto."""
    path = root / "iconify" / "noto" / "metadata.json"
    try:
        categories: Mapping[str, list[str]] = json.loads(path.read_bytes())["categories"]
        return {icon: number for number, kind in enumerate(CLASSES) for icon in categories[kind]}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} lists no categories ({error!r}).", f"Fetch version {_VERSIONS[0]} again.") from error


def _draw(table: Mapping[str, Any], name: str) -> NDArray[np.uint8]:
    """One icon on white, uint8 ``[32, 32, 3]``."""
    from PIL import Image

    resvg: Any = importlib.import_module("resvg_py")
    icon = table["icons"][name]
    width = icon.get("width", table.get("width", 16))
    height = icon.get("height", table.get("height", 16))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}" '
        f'width="{SIDE}" height="{SIDE}">{icon["body"]}</svg>'
    )
    picture = Image.open(io.BytesIO(bytes(resvg.svg_to_bytes(svg_string=svg)))).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return np.asarray(Image.alpha_composite(white, picture).convert("RGB"))
