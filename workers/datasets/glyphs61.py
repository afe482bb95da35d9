"""glyphs61: 36 characters in 61 font families, each family one domain with its own capture profile; grey 32x32.

Splits: ``lite`` (25 families of matplotlib and Hershey, 6 tested; needs no Debian fonts), ``hard`` (all 61; script,
gothic, hand-written and decorative families are tested) and ``random`` (39 / 8 / 14 families by ``split_seed``).
``hard`` is a benchmark built to be hard, not a discovered one. 0/O and 1/I are confusable by design.

Every test family is halved into ``test_support`` and ``test``; every training family gives 20% to ``id_val``; ``val``
holds the validation families, and for ``lite``, which has none, the same rows as ``id_val``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from workers.datasets import _render as render
from workers.datasets._arrays import Arrays, cached, domain_data, held_out, toolchain
from workers.datasets._glyph_fonts import (
    BY_NAME,
    FAMILIES,
    HERSHEY,
    MATPLOTLIB,
    SOURCES,
    STYLES,
    Family,
    font_files,
    missing_fonts,
)
from workers.datasets._glyphs import CLASSES, render_family
from workers.datasets.base import DatasetInfo, DomainData, IntArray, Missing, data_root

RECIPE = "v1"
LITE_TEST = ("scripts", "gothiceng", "timesib", "cmtt10", "STIXItalic", "DejaVuSerif")
HARD_TEST = (
    *("Z003", "DancingScript", "Lobster", "Kaushan", "Isabella", "Rufscript", "Ecolier", "Humor", "OCRA"),
    *("LinLibertine_DR", "scripts", "scriptc", "cursive", "gothiceng", "gothgbt", "gothgrt", "gothicita"),
)
HARD_VAL = (
    *("JunicodeExpanded", "Yanone", "LiberationSansNarrow", "NimbusSansNarrow", "STIXItalic", "cmmi10"),
    *("gothicger", "timesi"),
)

INFO = DatasetInfo(
    name="glyphs61",
    title="36 characters in 61 font families, each with its own capture profile, 32x32 grey",
    task="multiclass",
    num_outputs=36,
    channels=1,
    image_size=(32, 32),
    domain_field="domain",
    group_fields=("domain",),
    metrics=("accuracy", "mean_of_domain_accuracies", "worst_domain_accuracy", "macro_f1"),
    selection_metric="accuracy",
    normalisation="unit",
    licence="fonts: SIL OFL, AGPL and GPL with font exceptions, LGPL and other free licences; photographs: CC BY 2.0",
    source="PyPI packages matplotlib, Hershey-Fonts and scikit-learn; 23 Debian packages fonts-*",
    extra="demo",
    citation="ours",
)


class Options(BaseModel):
    """What a user may choose."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    split: Literal["lite", "hard", "random"] = Field(
        "lite", description="which families are trained on and tested; hard and random need the Debian fonts"
    )
    split_seed: int = Field(0, ge=0, le=2**31 - 1, description="seed that draws the families of split random")
    per_class: int = Field(8, ge=5, le=64, description="images of each class and family")
    id_fraction: float = Field(0.2, gt=0, lt=1, description="share of every training family kept as `id_val`")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="seed of the rendering and of the rows' splits")

    @model_validator(mode="after")
    def _drawn(self) -> Options:
        if self.split_seed and self.split != "random":
            raise ValueError(f"split_seed={self.split_seed} has no effect on split={self.split}; it is for random")
        return self


def load(root: Path, options: Options) -> DomainData:
    """Images uint8 ``[32, 32, 1]`` of the families in the chosen split.

    Metadata: ``domain`` (index of the family among all 61), ``y``, ``style``, ``source``, ``face`` (index within the
    family), ``millidegrees`` (rotation that was applied, in thousandths of a degree).

    Raises:
        NotFoundError: fonts that the split needs are missing; the hint holds the commands that fetch them.
        DataError: a cached copy is damaged.
    """
    train, val, test = split_families(options)
    families = tuple(family for family in FAMILIES if family.name in {*train, *val, *test})
    files = font_files(root, families)
    pictures: list[render.FloatArray] = []

    def draw(family: Family) -> Arrays:
        if not pictures:
            pictures.extend(render.photos())
        return render_family(family, files[family.name], pictures, options.seed, options.per_class)

    tag = toolchain("pillow", "matplotlib", "scikit-learn")
    parts = []
    for family in families:
        recipe = f"{RECIPE}-seed{options.seed}-x{options.per_class}-{tag}-{family.name}"
        parts.append(cached(data_root(root, INFO), recipe, lambda family=family: draw(family)))  # type: ignore[misc]
    return _assemble(families, parts, (train, val, test), options)


def split_families(options: Options) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Names of the training, validation and test families."""
    if options.split == "random":
        names = [family.name for family in FAMILIES]
        order = [names[i] for i in np.random.default_rng([options.split_seed, 61]).permutation(len(names))]
        return tuple(order[:39]), tuple(order[39:47]), tuple(order[47:])
    pool = FAMILIES if options.split == "hard" else (*MATPLOTLIB, *HERSHEY)
    val, test = (HARD_VAL, HARD_TEST) if options.split == "hard" else ((), LITE_TEST)
    return tuple(family.name for family in pool if family.name not in {*val, *test}), val, test


def missing(root: Path) -> list[Missing]:
    """What the default split ``lite`` would not find."""
    return missing_fonts(root, (*MATPLOTLIB, *HERSHEY))


def optional(root: Path) -> list[Missing]:
    """What only the splits ``hard`` and ``random`` would not find."""
    return [gap for gap in missing_fonts(root, FAMILIES) if gap not in missing(root)]


def _assemble(
    families: tuple[Family, ...],
    parts: list[Arrays],
    names: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]],
    options: Options,
) -> DomainData:
    """Stack the families and split their rows."""
    train, val, _ = names
    position = {family.name: number for number, family in enumerate(FAMILIES)}
    size = len(CLASSES) * options.per_class
    rng = np.random.default_rng([options.seed, 61])
    splits: dict[str, list[IntArray]] = {name: [] for name in ("train", "id_val", "val", "test_support", "test")}
    columns = []
    for number, (family, part) in enumerate(zip(families, parts, strict=True)):
        rows = np.arange(number * size, (number + 1) * size)
        if family.name in train:
            rest, kept = held_out(rows, options.id_fraction, rng)
            splits["train"].append(rest)
            splits["id_val"].append(kept)
        elif family.name in val:
            splits["val"].append(rows)
        else:
            rest, kept = held_out(rows, 0.5, rng)
            splits["test"].append(rest)
            splits["test_support"].append(kept)
        facts = (position[family.name], STYLES.index(family.style), SOURCES.index(family.source))
        domain, style, source = (np.full(size, fact) for fact in facts)
        turned = np.rint(part["degrees"].astype(np.float64) * 1000).astype(np.int64)
        columns.append(np.stack([domain, part["labels"], style, source, part["face"], turned], axis=1))
    if not val:
        splits["val"] = list(splits["id_val"])
    labels = np.concatenate([part["labels"] for part in parts])
    values = {"domain": tuple(BY_NAME), "y": tuple(CLASSES), "style": STYLES, "source": SOURCES}
    return domain_data(
        INFO,
        np.concatenate([part["images"] for part in parts]),
        labels,
        np.concatenate(columns),
        ("domain", "y", "style", "source", "face", "millidegrees"),
        {name: np.concatenate(rows) for name, rows in splits.items()},
        values,
    )
