"""Lets the unmodified ``wilds`` 2.0 package (December 2021) run on current libraries, without editing it.

Two context managers wrap our calls into the package; both undo everything when they end:

``construction()`` (building a data set):
    * ``pandas.Series.values`` returns a writable copy. ``wilds`` writes into it (rxrx1), which pandas 3 refuses.
    * ``pandas.to_datetime`` reads ISO 8601 by default. The real fmow table mixes time stamps with and without
      milliseconds, which pandas 2 and later refuse when the format is guessed from the first row.
    * ``PIL.Image.MAX_IMAGE_PIXELS`` is put back afterwards. ``wilds`` lifts Pillow's guard against decompression bombs
      for the whole process when the fmow module is imported.
    * warnings about empty groups are silenced: small sets have them by design.

``evaluation()`` (scoring with the package's own evaluators):
    * ``torch_scatter``, which has no wheels for current torch, is replaced by the one function that ``wilds`` calls.
      The real package is used when it is installed.

Importing ``wilds`` starts a thread that asks the package index for a newer version. Both contexts import it with that
check switched off, so nothing touches the network.

Not thread-safe by nature (they patch modules), hence one lock around both.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

_LOCK = threading.RLock()


@contextmanager
def construction() -> Iterator[None]:
    """Patches for building a ``wilds`` data set; see the module text."""
    import pandas as pd
    from PIL import Image

    values = pd.Series.__dict__["values"].fget
    to_datetime = pd.to_datetime

    def writable_values(series: Any) -> Any:
        found = values(series)
        return np.array(found) if isinstance(found, np.ndarray) else found

    def iso_to_datetime(arg: Any, *args: Any, **kwargs: Any) -> Any:
        return to_datetime(arg, *args, **({"format": "ISO8601"} | kwargs))

    with _LOCK, ExitStack() as stack:
        _import_wilds()
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message=".*CombinatorialGrouper.*")
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        stack.enter_context(_swapped(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS))
        stack.enter_context(_swapped(pd.Series, "values", property(writable_values)))
        stack.enter_context(_swapped(pd, "to_datetime", iso_to_datetime))
        yield


@contextmanager
def evaluation() -> Iterator[None]:
    """Makes ``torch_scatter`` importable while ``wilds``' evaluators run; see the module text."""
    with _LOCK, ExitStack() as stack:
        _import_wilds()
        if importlib.util.find_spec("torch_scatter") is None:
            stand_in = ModuleType("torch_scatter", "The part of torch_scatter that wilds calls.")
            stand_in.scatter = scatter  # type: ignore[attr-defined]
            sys.modules["torch_scatter"] = stand_in
            stack.callback(sys.modules.pop, "torch_scatter", None)
        yield


def scatter(src: torch.Tensor, index: torch.Tensor, dim_size: int, reduce: str = "mean") -> torch.Tensor:
    """Mean of ``src [N]`` over the rows with equal ``index [N]`` -> float ``[dim_size]``; 0 for an empty group.

    Raises:
        ValueError: another ``reduce`` than ``mean``; ``wilds`` asks for nothing else.
    """
    import torch

    if reduce != "mean":
        raise ValueError(f"This stand-in for torch_scatter only knows reduce='mean', not {reduce!r}.")
    sums = torch.zeros(dim_size, dtype=src.dtype, device=src.device).index_add_(0, index, src)
    counts = torch.bincount(index, minlength=dim_size).clamp(min=1)
    return sums / counts.to(src.dtype)


def open_dataset(name: str, root: str, **options: Any) -> Any:
    """``wilds.get_dataset(name, root_dir=root, download=False, **options)`` under :func:`construction`."""
    with construction():
        import wilds

        return wilds.get_dataset(name, root_dir=root, download=False, **options)


def evaluate(dataset: Any, predictions: torch.Tensor, labels: torch.Tensor, metadata: torch.Tensor) -> dict[str, float]:
    """The package's own scores of ``predictions [N]`` (poverty: ``[N, 1]``), by their official names.

    Args:
        dataset: what :func:`open_dataset` returned.
        predictions: predicted classes or values.
        labels: true ones, same shape.
        metadata: rows of ``dataset.metadata_array``.
    """
    with evaluation():
        scores: Mapping[str, Any] = dataset.eval(predictions, labels, metadata)[0]
    return {name: float(value) for name, value in scores.items()}


@contextmanager
def _swapped(owner: Any, name: str, value: object) -> Iterator[None]:
    """``owner.name`` is ``value`` inside the context and what it was before afterwards, whatever happened to it."""
    before = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _import_wilds() -> None:
    """First import of ``wilds`` without its version check.

    The check runs in a thread started by ``wilds.version`` whenever the package ``outdated`` can be imported (setting
    ``OUTDATED_IGNORE`` only hides its message), so that package is hidden during the import.
    """
    if "wilds" in sys.modules:
        return
    hidden = sys.modules.get("outdated")
    ignore = os.environ.get("OUTDATED_IGNORE")
    sys.modules["outdated"] = None  # type: ignore[assignment]
    try:
        importlib.import_module("wilds")
    finally:
        del sys.modules["outdated"]
        if hidden is not None:
            sys.modules["outdated"] = hidden
        if ignore is None:  # wilds sets it
            os.environ.pop("OUTDATED_IGNORE", None)
