"""Decodes every image of a data set, for ``moepipe data verify``: the digest knows file sizes, not pixels."""

from __future__ import annotations

from collections.abc import Callable

from moe.errors import DataError
from workers.datasets.base import DomainData


def broken_images(
    data: DomainData, most: int = 20, progress: Callable[[int, int], None] | None = None
) -> list[DataError]:
    """The errors of the images that cannot be decoded, in row order.

    Args:
        data: any loaded set.
        most: stop after so many; a set with twenty broken files is fetched again as a whole.
        progress: called with (rows done, rows) now and then.
    """
    found: list[DataError] = []
    total = len(data.images)
    for row in range(total):
        if progress is not None and row % 100 == 0:
            progress(row, total)
        error = _error(data, row)
        if error is not None:
            found.append(error)
        if len(found) >= most:
            break
    return found


def _error(data: DomainData, row: int) -> DataError | None:
    try:
        data.images[row]
    except DataError as error:
        return error
    return None
