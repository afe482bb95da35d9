"""Checked reading of the CSV tables of the WILDS sets: what is wrong, in which file, column and line, and the fix.

``wilds`` itself trusts its tables and answers a broken one with a pandas traceback. These checks run before it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moe.errors import DataError, nearest

if TYPE_CHECKING:
    import pandas as pd

_RESTORE = "Restore the file from the official archive."


class Table:
    """A CSV table whose columns are checked one by one.

    Args:
        path: the file.
        columns: columns that must be there; only these are read.
        text: those of them that are kept as strings whatever they look like.

    Raises:
        DataError: not readable as CSV, empty, or columns missing.
    """

    def __init__(self, path: Path, columns: Sequence[str], text: Collection[str] = ()) -> None:
        self.path = path
        header = self._read(path, nrows=0).columns
        absent = [column for column in columns if column not in header]
        if absent:
            raise DataError(
                f"{path}: column{'s' if len(absent) > 1 else ''} {', '.join(map(repr, absent))} missing; "
                f"found {', '.join(map(repr, header)) or 'none'}.",
                _RESTORE,
            )
        self.frame: pd.DataFrame = self._read(path, usecols=list(columns), dtype=dict.fromkeys(text, "str"))
        if self.frame.empty:
            raise DataError(f"{path}: has a header but no rows.", _RESTORE)

    @staticmethod
    def _read(path: Path, **options: Any) -> pd.DataFrame:
        import pandas as pd

        try:
            frame: pd.DataFrame = pd.read_csv(path, **options)
            return frame
        except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, ValueError) as error:
            raise DataError(f"{path}: is not a readable CSV table ({error}).", _RESTORE) from error

    def __len__(self) -> int:
        return len(self.frame)

    def whole(self, column: str, low: int, high: int) -> NDArray[np.int64]:
        """Column of whole numbers in ``low..high``, int64 ``[N]``."""
        import pandas as pd

        series = self.frame[column]
        numbers = pd.to_numeric(series.replace({"True": 1, "False": 0}), errors="coerce").to_numpy(dtype=float)
        bad = ~((numbers == np.floor(numbers)) & (numbers >= low) & (numbers <= high))
        self._refuse(column, bad, f"a whole number from {low} to {high}")
        return numbers.astype(np.int64)

    def number(self, column: str) -> NDArray[np.float64]:
        """Column of finite numbers, float64 ``[N]``."""
        import pandas as pd

        numbers = pd.to_numeric(self.frame[column], errors="coerce").to_numpy(dtype=float)
        self._refuse(column, ~np.isfinite(numbers), "a finite number")
        return numbers

    def one_of(self, column: str, allowed: Collection[str]) -> None:
        """Every cell is one of ``allowed``; the message suggests the nearest."""
        bad = ~self.frame[column].isin(list(allowed)).to_numpy()
        if bad.any():
            value = str(self.frame[column].iloc[int(bad.argmax())])
            self._refuse(column, bad, f"one of {len(allowed)} names", nearest(value, allowed))

    def matches(self, column: str, pattern: str, example: str) -> None:
        """Every cell fully matches the regular expression ``pattern``; ``example`` shows a good one."""
        expression = re.compile(pattern)
        cells = self.frame[column].astype("object")
        bad = np.fromiter(
            (not (isinstance(cell, str) and expression.fullmatch(cell)) for cell in cells), dtype=bool, count=len(cells)
        )
        self._refuse(column, bad, f"text like {example!r}")

    def moments(self, column: str, pattern: str, example: str) -> NDArray[np.int64]:
        """Column of UTC times written as ``pattern`` (see :meth:`matches`) -> their years, int64 ``[N]``."""
        import pandas as pd

        self.matches(column, pattern, example)
        times = pd.to_datetime(self.frame[column], format="ISO8601", utc=True, errors="coerce")
        self._refuse(column, times.isna().to_numpy(), f"a date and time like {example!r}")
        return np.asarray(times.dt.year, dtype=np.int64)

    def covers(self, column: str, low: int, high: int) -> None:
        """Whole numbers in ``low..high`` that take every value from 0 to their maximum, as ``wilds`` requires."""
        seen = np.unique(self.whole(column, low, high))
        holes = np.setdiff1d(np.arange(seen.max() + 1), seen)
        if len(holes):
            shown = ", ".join(map(str, holes[:5])) + (", ..." if len(holes) > 5 else "")
            raise DataError(
                f"{self.path}: column {column!r} must take every value from 0 to its maximum {seen.max()}; "
                f"{len(holes)} never occur{'s' if len(holes) == 1 else ''}: {shown}.",
                "Rows were removed without renumbering. " + _RESTORE,
            )

    def refuse_where(self, column: str, bad: NDArray[np.bool_], expected: str) -> None:
        """Raise DataError for the first row where ``bad [N]`` holds."""
        self._refuse(column, bad, expected)

    def _refuse(self, column: str, bad: NDArray[np.bool_], expected: str, hint: str = "") -> None:
        if not bad.any():
            return
        row = int(bad.argmax())
        cell = self.frame[column].iloc[row]
        others = int(bad.sum()) - 1
        raise DataError(
            f"{self.path}, line {row + 2}, column {column!r}: found {str(cell)!r}, expected {expected}"
            f"{f' ({others:,} more rows are wrong)' if others else ''}.",
            hint or _RESTORE,
        )


def optional_names(path: Path, key: str, name: str) -> tuple[str, ...]:
    """Names in column ``name`` in order of the whole numbers in ``key``; empty when the file or a column is absent.

    For display only, so a table without them is no error.
    """
    import pandas as pd

    if not path.is_file():
        return ()
    frame = pd.read_csv(path)
    if not {key, name} <= set(frame.columns):
        return ()
    found: Mapping[int, str] = dict(zip(frame[key].astype(int), frame[name].astype(str), strict=True))
    return tuple(found.get(index, str(index)) for index in range(max(found) + 1))
