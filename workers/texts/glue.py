"""GLUE's tasks and the sets out of domain of GLUE-X, from local files in their official formats.

Files lie below ``<data root>/glue/<task>`` (``RTE`` or ``rte``, and so on) as the archives of gluebenchmark.com hold
them, or as JSON lines, CSV, Parquet or a folder of ``Dataset.save_to_disk`` with Hugging Face's columns; sets out of
domain below ``<data root>/glue_x/<set>``. GLUE: arXiv 1804.07461; GLUE-X: arXiv 2211.08073.

Differs: rows of SNLI without a label are dropped (the public code of EMoE counts them as errors).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from moe.errors import DataError, NotFoundError, SpecError, nearest
from workers.datasets.base import Missing
from workers.glue import OUT_OF_DOMAIN, TASKS, OutOfDomain, map_labels
from workers.texts._glue_files import (
    COLUMN_NAMES,
    FOLDERS,
    LABEL_COLUMNS,
    LABEL_NAMES,
    OOD_FILES,
    OodFile,
    split_stems,
)
from workers.texts._tables import Columns, column, find_table, read_table
from workers.texts.base import OOD, TextData, TextInfo, TextRows, text_data

Task = Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"]

INFO = TextInfo(
    "glue",
    "GLUE tasks with the sets out of domain of GLUE-X, from local files",
    "multiclass",
    2,
    ("accuracy",),
    "as each task's source states",
    "gluebenchmark.com; GLUE-X",
)
MARK = "MINIATURE"
"""A file of this name says that the folder beside it holds generated texts."""


class Options(BaseModel):
    """Which task, and which sets out of domain."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: Task = Field(default="rte", description="GLUE task.")
    ood: tuple[str, ...] | None = Field(
        default=None, description="sets out of domain; all whose files are there when left out"
    )


def load(root: Path, options: Options) -> TextData:
    """Read one task.

    Raises:
        NotFoundError: files of the task, or of a set that was asked for, are not there.
        SpecError: a set that this task has no labels for.
        DataError: damaged files, unknown columns or labels; each names the file.
    """
    name = options.task
    tests = {test.name: test for test in OUT_OF_DOMAIN if test.trained_on == name}
    strangers = [wanted for wanted in options.ood or () if wanted not in tests]
    if strangers:
        raise SpecError(f"{name} has no set out of domain {strangers[0]!r}.", nearest(strangers[0], tests))
    splits = {split: _read_task(root, name, split) for split in ("train", "validation")}
    for wanted in tests if options.ood is None else options.ood:
        rows = _read_ood(root, tests[wanted], required=options.ood is not None)
        if rows is not None:
            splits[OOD + wanted] = rows
    task = TASKS[name]
    info = TextInfo(
        f"glue/{name}",
        f"GLUE {name}",
        "regression" if task.outputs == 1 else "multiclass",
        task.outputs,
        task.metrics,
        INFO.licence,
        INFO.source,
        (root / "glue" / MARK).is_file(),
    )
    return text_data(info, splits)


def missing(root: Path) -> list[Missing]:
    """The tasks whose folder is not there, as one entry when there is none at all."""
    if any(_folder(root, name) for name in FOLDERS):
        return []
    return [Missing("files of a GLUE task", _fix(root, "rte"))]


def fingerprint(root: Path, options: Options) -> str:
    """Names, sizes and times of the files of the task; changes when one is replaced."""
    folders = [_folder(root, name) for name in {options.task, "qqp", "mrpc"}]
    paths = [p for f in [*folders, root / "glue_x"] if f is not None and f.is_dir() for p in sorted(f.rglob("*"))]
    return ";".join(
        f"{p.relative_to(root)}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in sorted(set(paths)) if p.is_file()
    )


def miniature(root: Path, seed: int = 0) -> None:
    """Write generated texts of all tasks and sets in the official formats."""
    from workers.texts._glue_miniature import write

    write(root, seed)


def _read_task(root: Path, name: str, split: str) -> TextRows:
    folder = _folder(root, name)
    path = None if folder is None else find_table(folder, split_stems(name, split))
    if path is None:
        stems = " or ".join(split_stems(name, split))
        raise NotFoundError(f"GLUE {name}: there is no {split} file ({stems}).", _fix(root, name))
    header = ("source", "label", "mark", "sentence") if name == "cola" and path.suffix == ".tsv" else ()
    return _rows(read_table(path, header), path, OutOfDomain(name, name, TASKS[name].columns, split))


def _read_ood(root: Path, test: OutOfDomain, required: bool) -> TextRows | None:
    """A set out of domain; None when it is not there and nobody asked for it."""
    where = OOD_FILES.get(test.name, OodFile())
    name = test.name.removesuffix("_mismatched")
    if name in FOLDERS:  # another task's validation rows
        folder, stems = _folder(root, name), split_stems(test.name, test.split)
    else:
        folder, stems = root / "glue_x" / test.name, (*where.stems, test.split, "test", test.name)
    path = None if folder is None else find_table(folder, stems)
    if path is None:
        if not required:
            return None
        place = root / ("glue" if name in FOLDERS else "glue_x") / test.name
        raise NotFoundError(
            f"The set {test.name} out of domain of {test.trained_on} is not there.",
            f"Put {' or '.join(stems)} (.tsv, .jsonl, .csv, .parquet) with the columns "
            f"{', '.join(test.columns)}, label into {place}.",
        )
    raw = where.raw_header if path.suffix == where.raw_suffix else ()
    table = read_table(path, raw)
    if where.only is not None and where.only[0] in table:
        keep = [row for row, value in enumerate(table[where.only[0]]) if value == where.only[1]]
        table = {title: [values[row] for row in keep] for title, values in table.items()}
    if raw and where.raw_labels:
        known = where.raw_labels
        table = {**table, "label": [known.get(str(value), value) for value in table["label"]]}
    return _rows(table, path, test)


def _rows(table: Columns, path: Path, test: OutOfDomain) -> TextRows:
    """Texts and labels of a table in the task's terms."""
    texts = [[str(text) for text in column(table, COLUMN_NAMES.get(c, (c,)), path)] for c in test.columns]
    regression = TASKS[test.trained_on].outputs == 1
    raw = column(table, LABEL_COLUMNS["score" if regression else "label"], path)
    if regression:
        labels, rows = _values(raw, path), np.arange(len(raw))
    else:
        try:
            labels, rows = map_labels(test, [_number(value, test) for value in raw])
        except SpecError as error:
            raise DataError(f"{path}: {error.message}", error.hint) from None
        strange = next((value for value in labels.tolist() if not isinstance(value, int)), None)
        if strange is not None:
            known = LABEL_NAMES.get(test.trained_on, {})
            raise DataError(f"{path} has the label {strange!r}.", nearest(str(strange), map(str, known or (0, 1))))
    parts = [tuple(values[row] for row in rows) for values in texts]
    kind = np.float64 if regression else np.int64
    return TextRows(parts[0], parts[1] if len(parts) > 1 else (), labels.astype(kind), test.metrics)


def _number(value: Any, test: OutOfDomain) -> Any:
    """A label as the set's map or the task knows it: whole numbers as int, known names by number."""
    if isinstance(value, str):
        text = value.strip()
        if text in test.labels:
            return text
        if text == "-":  # SNLI: the annotators did not agree
            return -1
        if text.lstrip("-").isdigit():
            return int(text)
        return text if test.labels else LABEL_NAMES.get(test.trained_on, {}).get(text.lower(), text)
    return int(value) if isinstance(value, (bool, float)) and float(value).is_integer() else value


def _values(raw: Sequence[Any], path: Path) -> Any:
    try:
        values = np.asarray([float(value) for value in raw], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: a score is not a number ({error}).", "Use the validation file.") from None
    if not np.isfinite(values).all():
        raise DataError(f"{path}: a score is not finite.")
    return values


def _folder(root: Path, name: str) -> Path | None:
    return next((root / "glue" / own for own in (FOLDERS[name], name) if (root / "glue" / own).is_dir()), None)


def _fix(root: Path, name: str) -> str:
    return (
        f"Unpack the archive {FOLDERS[name]}.zip that gluebenchmark.com/tasks lists into {root / 'glue'}, "
        f"or try generated texts: moepipe data miniature glue --data {root}"
    )
