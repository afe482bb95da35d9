"""What data sets there are, whether they are there, and taking one in: the functions behind ``moepipe data``.

Everything goes through the dataset contract of :mod:`workers.datasets.base`; a dataset module may offer more:
``optional(root)`` (what only some options need), ``import_archive(root, archive)`` and ``miniature(root, seed)``.
Listing imports no torch, and nothing here downloads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from moe.errors import DataError, MoepipeError, NotFoundError, SpecError
from workers.datasets._arrays import sha256_file
from workers.datasets.base import DATASETS, DatasetInfo, DomainData, FileRecord, Missing, data_root

SAMPLE = 64  # images that `verify` decodes by default


@dataclass(frozen=True)
class DatasetRow:
    """One line of the list of data sets.

    Attributes:
        info: the record (name, title, licence, source, extra, citation).
        missing: what the default options lack; empty when the set can be loaded.
        optional: what only some options lack.
        importable: ``import_archive`` works for it.
        generated: ``miniature`` works for it.
    """

    info: DatasetInfo
    missing: tuple[Missing, ...]
    optional: tuple[Missing, ...]
    importable: bool
    generated: bool

    @property
    def present(self) -> bool:
        """Nothing that the default options need is missing."""
        return not self.missing

    def record(self) -> dict[str, Any]:
        """JSON-like form, for ``--json``."""
        info = self.info
        return {
            "name": info.name,
            "title": info.title,
            "task": info.task,
            "outputs": info.num_outputs,
            "image_size": list(info.image_size),
            "domain_field": info.domain_field,
            "licence": info.licence,
            "source": info.source,
            "extra": info.extra,
            "citation": info.citation,
            "present": self.present,
            "missing": [{"what": gap.what, "fix": gap.fix} for gap in self.missing],
            "optional": [{"what": gap.what, "fix": gap.fix} for gap in self.optional],
            "importable": self.importable,
            "generated": self.generated,
        }


@dataclass(frozen=True)
class Check:
    """One thing that ``verify`` looked at: what, whether it is in order, and otherwise what is wrong and the remedy."""

    what: str
    ok: bool
    problem: str = ""
    fix: str = ""


@dataclass(frozen=True)
class Verification:
    """All checks of one data set, in order; ``data`` is the opened set unless it cannot be opened."""

    name: str
    checks: tuple[Check, ...]
    data: DomainData | None = None

    @property
    def ok(self) -> bool:
        """Every check passed."""
        return all(check.ok for check in self.checks)

    def require(self) -> None:
        """Raise DataError that lists every problem (NotFoundError when things are only missing)."""
        bad = [check for check in self.checks if not check.ok]
        if bad:
            text = f"Data set {self.name}: " + "; ".join(f"{c.what}: {c.problem}" for c in bad) + "."
            hint = next((check.fix for check in bad if check.fix), "")
            raise (NotFoundError if all(c.problem == "missing" for c in bad) else DataError)(text, hint)


def list_datasets(root: Path) -> list[DatasetRow]:
    """Every registered data set, by name."""
    return [describe(name, root) for name in DATASETS.names()]


def describe(name: str, root: Path) -> DatasetRow:
    """The row of one data set (SpecError when the name is unknown)."""
    module = DATASETS.load(name)
    optional = module.optional(root) if hasattr(module, "optional") else []
    return DatasetRow(
        module.INFO,
        tuple(module.missing(root)),
        tuple(optional),
        hasattr(module, "import_archive"),
        hasattr(module, "miniature"),
    )


def verify(
    name: str, root: Path, options: Mapping[str, Any] | None = None, sample: int | None = SAMPLE
) -> Verification:
    """Look at files, sizes, checksums, tables and images of a data set. Problems are listed, not raised.

    Args:
        name: registry name.
        root: data root.
        options: the data set's options; with any, the known files are left to ``load``, which knows which it needs.
        sample: images to decode, evenly spread over the rows; None for all.

    Raises:
        SpecError: unknown name or options.
    """
    from workers.data import parse_options

    module = DATASETS.load(name)
    parsed = parse_options(name, dict(options or {}))
    gaps = module.missing(root) if not options else []
    checks = [Check(gap.what, False, "missing", gap.fix) for gap in gaps]
    if not gaps and not options:
        checks += [_check_file(record, module, root) for record in module.INFO.files]
    try:
        data: DomainData = module.load(root, parsed)
    except (NotFoundError, DataError) as error:
        if not checks or all(check.ok for check in checks):
            checks.append(Check("loading", False, error.message, error.hint))
        return Verification(name, tuple(checks))
    checks.append(Check(f"tables and splits of {len(data.labels)} rows", *_check_rows(data)))
    checks += _check_images(data, sample)
    return Verification(name, tuple(checks), data)


def import_archive(name: str, source: Path, root: Path) -> Path:
    """Take a prepared folder or an archive of an official release into the data root.

    Returns:
        The folder where the set now lies.

    Raises:
        SpecError: unknown name, or a set that is not imported because packages carry it.
        NotFoundError, DataError: the source is not there, damaged, unsafe or incomplete.
    """
    module = DATASETS.load(name)
    if not hasattr(module, "import_archive"):
        gaps = [*module.missing(root), *(module.optional(root) if hasattr(module, "optional") else [])]
        hint = " ".join(f"Run: {gap.fix}" for gap in gaps) or "Nothing is missing; it can be used as it is."
        raise SpecError(f"{name} is not imported from an archive: it is made from {module.INFO.source}.", hint)
    path: Path = module.import_archive(root, source)
    return path


def miniature(name: str, root: Path, seed: int = 0) -> None:
    """Write the generated stand-in of a data set in its official layout.

    Raises:
        SpecError: unknown name, or a set that has none because its real data ships inside packages.
    """
    module = DATASETS.load(name)
    if not hasattr(module, "miniature"):
        raise SpecError(
            f"{name} has no miniature: its real data ships inside packages ({module.INFO.source}).",
            "Use it as it is; a smaller set comes from its options.",
        )
    module.miniature(root, seed)


def _check_file(record: FileRecord, module: ModuleType, root: Path) -> Check:
    """Size and checksum of one known file, below the data root, the set's folder or this package."""
    folders = [root, data_root(root, module.INFO), Path(module.__file__ or "").parent]
    path = next((folder / record.path for folder in folders if (folder / record.path).is_file()), None)
    if path is None:
        return Check(record.path, False, "missing")
    size = path.stat().st_size
    if size != record.size:
        return Check(str(path), False, f"has {size} bytes, expected {record.size}")
    seen = sha256_file(path) if record.sha256 else ""
    if seen != record.sha256:
        return Check(str(path), False, f"has SHA-256 {seen}, expected {record.sha256}")
    return Check(str(path), True)


def _check_rows(data: DomainData) -> tuple[bool, str]:
    """Consistency of a loaded set: lengths, label range, splits within range, ascending and disjoint from training."""
    count = len(data.labels)
    if len(data.images) != count or data.metadata.shape != (count, len(data.fields)):
        return False, f"{len(data.images)} images, {count} labels, metadata {data.metadata.shape}"
    classes = max(2, data.info.num_outputs)
    if data.info.task != "regression" and count and not 0 <= data.labels.min() <= data.labels.max() < classes:
        return False, f"labels reach from {data.labels.min()} to {data.labels.max()}, expected 0 to {classes - 1}"
    for name, rows in data.splits.items():
        if len(rows) and (rows[0] < 0 or rows[-1] >= count or np.any(np.diff(rows) <= 0)):
            return False, f"split {name} is not ascending rows below {count}"
        if name != "train" and np.intersect1d(rows, data.splits["train"]).size:
            return False, f"split {name} shares rows with train"
    return True, ""


def _check_images(data: DomainData, sample: int | None) -> list[Check]:
    """Decode images; every one that fails is listed by its own message."""
    count = len(data.images)
    wanted = count if sample is None else min(sample, count)
    rows = np.unique(np.linspace(0, count - 1, wanted).astype(np.int64)) if wanted else np.empty(0, np.int64)
    bad = []
    for row in rows:
        problem = _decode(data, int(row))
        if problem is not None:
            bad.append(Check(f"image of row {row}", False, problem.message, problem.hint))
    return bad or [Check(f"{len(rows)} of {count} images decoded", True)]


def _decode(data: DomainData, row: int) -> MoepipeError | None:
    try:
        image = data.images[row]
    except (DataError, NotFoundError) as error:
        return error
    axis = image.shape[0] if image.dtype != np.uint8 else image.shape[-1]
    if image.ndim != 3 or axis != data.info.channels:
        return DataError(f"has shape {image.shape}, expected {data.info.channels} channels")
    return None
