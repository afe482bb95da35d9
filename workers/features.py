"""Features of frozen networks, computed once and read back from disk.

One expert's features are a folder with ``features.npy`` (memory-mapped, ``[V, N, D]``: V transform variants, N rows,
D features), ``rows.npy`` (the N row numbers, ascending) and ``features.json``. The official code runs all experts in
every step instead; their transforms are deterministic (or have 8 variants), so nothing is lost but rounding, and with
float32 nothing at all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray

from moe.errors import CheckpointError, DataError, EnvironmentProblem, NotFoundError
from workers.batches import ImageReader
from workers.context import Reporter
from workers.datasets.base import Images, IntArray
from workers.transforms import Transform

FEATURES, ROWS, RECORD = "features.npy", "rows.npy", "features.json"
_FLOAT_BYTES = {"float16": 2, "float32": 4}
FeatureType = Literal["float16", "float32"]
Extractor = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class FeatureRecord:
    """What ``features.json`` says.

    Attributes:
        dim: D.
        variants: V; 1 unless the transform draws among several.
        dtype: stored type.
        transform: identity of the transform.
    """

    dim: int
    variants: int
    dtype: FeatureType
    transform: str


def write_features(
    extractor: Extractor,
    images: Images,
    rows: IntArray,
    transform: Transform,
    path: Path,
    batch_size: int,
    reporter: Reporter,
    *,
    dtype: FeatureType = "float32",
    scratch: Path | None = None,
    device: torch.device | None = None,
    threads: int = 0,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> FeatureRecord:
    """Compute and store the features of ``rows``, resuming where an earlier attempt stopped.

    Args:
        extractor: images ``[B, C, H, W]`` on ``device`` -> features ``[B, D]``; frozen and in evaluation mode.
        images: the data set's images.
        rows: row numbers, any order; stored ascending without repetition.
        transform: all its variants are stored.
        path: folder of the result; complete when ``features.json`` is there.
        batch_size: images per forward pass.
        reporter: progress in images.
        dtype: float32 gives the numbers of an uncached run; float16 halves the file.
        scratch: folder that survives a crash, for the unfinished file; ``path`` itself by default.
        device: of the extractor; CPU by default.
        threads: decoding threads.
        precision: of the forward passes.

    Raises:
        EnvironmentProblem: not enough disk space (checked before any work).
        DataError: corrupt image.
    """
    rows = np.unique(np.asarray(rows, dtype=np.int64))
    path.mkdir(parents=True, exist_ok=True)
    work = scratch or path
    work.mkdir(parents=True, exist_ok=True)
    job = _Job(extractor, transform, batch_size, dtype, device or torch.device("cpu"), precision)
    reader = ImageReader(images, transform, threads=threads, budget=0)
    try:
        record = job.run(reader, rows, work, reporter)
    finally:
        reader.close()
    _save_array(path / ROWS, rows)
    if work != path:
        shutil.move(work / _PARTIAL, path / f".{FEATURES}")
        os.replace(path / f".{FEATURES}", path / FEATURES)
    else:
        os.replace(work / _PARTIAL, path / FEATURES)
    aside = path / f".{RECORD}"
    aside.write_text(json.dumps(asdict(record), sort_keys=True))
    os.replace(aside, path / RECORD)
    (work / _DONE).unlink(missing_ok=True)
    return record


_PARTIAL, _DONE = ".features.partial.npy", ".features.done.json"


@dataclass(frozen=True)
class _Job:
    """The resumable part of :func:`write_features`."""

    extractor: Extractor
    transform: Transform
    batch_size: int
    dtype: FeatureType
    device: torch.device
    precision: Literal["fp32", "bf16"]

    def run(self, reader: ImageReader, rows: IntArray, work: Path, reporter: Reporter) -> FeatureRecord:
        variants, count = self.transform.variants, len(rows)
        total = variants * count
        done, array = self._resume(work, variants, count)
        while done < total:
            variant, start = divmod(done, count)
            stop = min(start + self.batch_size, count)
            chosen = np.full(stop - start, variant, dtype=np.int64)
            features = self._features(reader.read(rows[start:stop], chosen if variants > 1 else None))
            if array is None:
                array = self._create(work, (variants, count, features.shape[1]))
            array[variant, start:stop] = features
            done = variant * count + stop
            reporter.progress(done, total)
            if done == total or (done // self.batch_size) % 16 == 0:
                cast(np.memmap[Any, Any], array).flush()
                _save_json(work / _DONE, {"done": done, "identity": self._identity(count)})
                reporter.check()
        if array is None:
            raise DataError("There are no rows to compute features of.", "Check the splits of the stage.")
        return FeatureRecord(int(array.shape[2]), variants, self.dtype, self.transform.identity)

    def _identity(self, count: int) -> list[Any]:
        return [count, self.transform.identity, self.dtype, self.batch_size]

    def _resume(self, work: Path, variants: int, count: int) -> tuple[int, NDArray[Any] | None]:
        try:
            record = json.loads((work / _DONE).read_text())
            array = np.load(work / _PARTIAL, mmap_mode="r+")
        except (OSError, ValueError):
            return 0, None
        if record.get("identity") != self._identity(count) or array.shape[:2] != (variants, count):
            return 0, None
        return int(record["done"]), array

    def _create(self, work: Path, shape: tuple[int, int, int]) -> NDArray[Any]:
        needed, free = int(np.prod(shape)) * _FLOAT_BYTES[self.dtype], shutil.disk_usage(work).free
        if needed > free:
            raise EnvironmentProblem(
                f"Features need {needed / 1e9:.1f} GB and {work} has {free / 1e9:.1f} GB left.",
                "Free some space, or set dtype: float16.",
            )
        return np.lib.format.open_memmap(work / _PARTIAL, mode="w+", dtype=self.dtype, shape=shape)

    def _features(self, images: torch.Tensor) -> NDArray[Any]:
        from workers.engines.base import autocast

        with torch.inference_mode(), autocast(self.device, self.precision):
            features = self.extractor(images.to(self.device))
        return features.float().cpu().numpy().astype(self.dtype)


class FeatureTable:
    """Features of several experts for the same rows, read in place.

    Args:
        paths: one folder per expert, in expert order.

    Raises:
        NotFoundError: a folder is not complete.
        CheckpointError: the folders do not belong together (other transform, width or rows).
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.records = [_read_record(path) for path in paths]
        if len(set(self.records)) != 1:
            raise CheckpointError(
                f"The feature files of {len(paths)} experts differ in width, transform or type: {self.records}.",
                "Compute all of them with the same `features` stage.",
            )
        self._arrays = [np.load(path / FEATURES, mmap_mode="r") for path in paths]
        self._rows: IntArray = np.load(paths[0] / ROWS)
        if any(not np.array_equal(self._rows, np.load(path / ROWS)) for path in paths[1:]):
            raise CheckpointError("The feature files of the experts cover different rows.", "Recompute them.")

    @property
    def dim(self) -> int:
        """Width D."""
        return self.records[0].dim

    @property
    def variants(self) -> int:
        """Transform variants V stored."""
        return self.records[0].variants

    @property
    def num_experts(self) -> int:
        """Experts E."""
        return len(self._arrays)

    def covers(self, rows: IntArray) -> bool:
        """Whether all ``rows`` are stored."""
        return bool(np.isin(rows, self._rows).all())

    def tokens(self, rows: IntArray, variants: IntArray | None = None) -> torch.Tensor:
        """Features of ``rows``, float32 ``[B, E, D]``; only these rows are read from disk.

        Args:
            rows: row numbers of the data set, ``[B]``.
            variants: transform variant of each row, ``[B]``; 0 by default.

        Raises:
            DataError: a row was not stored.
        """
        rows = np.asarray(rows, dtype=np.int64)
        places = np.minimum(np.searchsorted(self._rows, rows), len(self._rows) - 1)
        absent = rows[self._rows[places] != rows]
        if len(absent):
            raise DataError(
                f"The cached features do not hold {len(absent)} of the rows asked for (first: {int(absent[0])}).",
                "Add the split they belong to, to the `features` stage.",
            )
        which = np.zeros(len(rows), dtype=np.int64) if variants is None else variants
        out = np.empty((len(rows), len(self._arrays), self.dim), dtype=np.float32)
        for expert, array in enumerate(self._arrays):
            out[:, expert] = array[which, places]
        return torch.from_numpy(out)


def _read_record(path: Path) -> FeatureRecord:
    try:
        return FeatureRecord(**json.loads((path / RECORD).read_text()))
    except FileNotFoundError:
        raise NotFoundError(f"{path} holds no finished features ({RECORD} is missing).", "Run its stage.") from None
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path / RECORD} is damaged: {error}.", "Remove that folder and submit again; it will be made anew."
        ) from error


def _save_array(path: Path, array: NDArray[Any]) -> None:
    aside = path.with_name(f".{path.name}")
    with aside.open("wb") as file:
        np.save(file, array)
    os.replace(aside, path)


def _save_json(path: Path, value: Any) -> None:
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(value))
    os.replace(aside, path)
