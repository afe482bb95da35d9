"""Tables of text as they are distributed: TSV, CSV, JSON lines, Parquet and the folders of ``Dataset.save_to_disk``.

The last are Arrow files; they are read with pyarrow, so the package ``datasets`` need not be there, and nothing in a
file is executed.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe.errors import DataError, NotFoundError, nearest

SUFFIXES = (".tsv", ".txt", ".jsonl", ".json", ".csv", ".parquet", "")
Columns = Mapping[str, list[Any]]


def find_table(folder: Path, stems: Sequence[str]) -> Path | None:
    """The first table ``<folder>/<stem><suffix>``; without a suffix it is a folder of Arrow files."""
    for stem in stems:
        for suffix in SUFFIXES:
            path = folder / f"{stem}{suffix}"
            if path.is_file() if suffix else (path / "state.json").is_file():
                return path
    return None


def read_table(path: Path, header: Sequence[str] = ()) -> Columns:
    """Columns of a table.

    Args:
        path: the file or folder.
        header: names of the columns when the file has no first line of names.

    Raises:
        NotFoundError: there is no such file.
        DataError: damaged, empty, or rows of unequal length; names file and line.
    """
    if not path.exists():
        raise NotFoundError(f"There is no file {path}.")
    try:
        if path.is_dir():
            return _arrow_folder(path)
        if path.suffix == ".parquet":
            import pyarrow.parquet as parquet  # type: ignore[import-untyped]

            return _columns_of(parquet.read_table(path))
        if path.suffix in (".jsonl", ".json"):
            return _objects(path)
        return _separated(path, header)
    except (UnicodeDecodeError, csv.Error, json.JSONDecodeError, KeyError, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__}: {error}).", "Fetch it again.") from error


def column(table: Columns, names: Sequence[str], path: Path) -> list[Any]:
    """The column of the first of ``names`` that the table has.

    Raises:
        DataError: it has none of them; names what it has.
    """
    for name in names:
        if name in table:
            return table[name]
    wanted = " or ".join(repr(name) for name in names)
    raise DataError(f"{path} has no column {wanted}; it has {', '.join(map(repr, table))}.", nearest(names[0], table))


def _separated(path: Path, header: Sequence[str]) -> Columns:
    """Tab-separated without quotes, as GLUE is distributed; comma-separated with quotes."""
    comma = path.suffix == ".csv"
    with path.open(encoding="utf-8-sig", newline="") as stream:
        if comma:
            csv.field_size_limit(1 << 24)
            lines = list(csv.reader(stream))
        else:
            lines = [line.rstrip("\r\n").split("\t") for line in stream]
    lines = [line for line in lines if line and line != [""]]
    names, body = (list(header), lines) if header else (lines[0] if lines else [], lines[1:])
    for number, line in enumerate(body, start=1 if header else 2):
        if len(line) < len(names):
            raise DataError(
                f"{path}, line {number}: {len(line)} columns, expected {len(names)} ({', '.join(names)}).",
                "Is the file cut off, or of another format?",
            )
    if not body:
        raise DataError(f"{path} has no rows.", "Is the file complete?")
    return {name: [line[place] for line in body] for place, name in enumerate(names)}


def _objects(path: Path) -> Columns:
    """One object a line, or one list of objects."""
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        rows = json.loads(text)
    else:
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path} has no rows of the form {{column: value}}.", "Write one JSON object a line.")
    names = list(rows[0])
    for number, row in enumerate(rows, start=1):
        absent = [name for name in names if name not in row]
        if absent:
            raise DataError(f"{path}, row {number} lacks {absent[0]!r}, which the first row has.")
    return {name: [row[name] for row in rows] for name in names}


def _arrow_folder(path: Path) -> Columns:
    import pyarrow as arrow  # type: ignore[import-untyped]

    state = json.loads((path / "state.json").read_text())
    tables = []
    for record in state["_data_files"]:
        file = path / Path(record["filename"]).name
        with arrow.memory_map(str(file)) as source:
            tables.append(arrow.ipc.open_stream(source).read_all())
    return _columns_of(arrow.concat_tables(tables))


def _columns_of(table: Any) -> Columns:
    return {name: table.column(name).to_pylist() for name in table.column_names}
