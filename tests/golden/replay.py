"""Run golden cases and compare.

A case is a folder with ``case.json`` (``op``, ``params``, ``rtol``, ``atol``; optional ``tensor_tolerances``,
``expected`` or ``expect``) and ``tensors.safetensors`` (may be absent for table-like operations). A result ``a`` passes
against the stored ``b`` when ``|a - b| <= atol + rtol * |b|`` element-wise; integers and texts must be equal. Missing
and additional outputs fail, and so do a wrong shape, an operation without adapter and an adapter that raises. An
operation may bring a comparison of its own (``registry.check``), and a case may need data that is not here (``Skip``).
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from tests.golden.registry import CHECKS, Adapter, Skip

JSON_KEYS = ("expected", "expect")


@dataclass(frozen=True)
class Outcome:
    """What became of one case: no complaint means that it passed, unless it was skipped for the reason given."""

    folder: Path
    op: str
    complaints: list[str] = field(default_factory=list)
    skipped: str = ""

    @property
    def passed(self) -> bool:
        return not self.complaints and not self.skipped


def discover(folders: Iterable[Path]) -> list[Path]:
    """Folders that hold a ``case.json``, at any depth below ``folders``, each once, sorted."""
    found: dict[Path, Path] = {}
    for folder in folders:
        for file in folder.rglob("case.json"):
            found.setdefault(file.parent.resolve(), file.parent)
    return [found[key] for key in sorted(found)]


def replay(folder: Path, adapters: Mapping[str, Adapter]) -> Outcome:
    """Run one case. Never raises for what is wrong inside the case or its adapter: that is a failed case."""
    name = "?"
    try:
        case = json.loads((folder / "case.json").read_text(encoding="utf-8"))
        name = str(case["op"])
        if name not in adapters:
            return Outcome(folder, name, [f"no adapter for operation {name!r}"])
        file = folder / "tensors.safetensors"
        tensors = load_file(file) if file.exists() else {}
        given = {key: value for key, value in tensors.items() if not key.startswith("out.")}
        hidden = {key: value for key, value in case.items() if key not in JSON_KEYS}
        torch.manual_seed(0)
        outputs = adapters[name](hidden, given)
        return Outcome(folder, name, list(CHECKS.get(name, compare)(case, tensors, outputs)))
    except Skip as reason:
        return Outcome(folder, name, skipped=str(reason))
    except Exception as error:  # a crash is a failed case, whatever its kind
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())
        return Outcome(folder, name, [f"{type(error).__name__}: {text} ({Path(where.filename).name}:{where.lineno})"])


def compare(case: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], outputs: Mapping[str, Any]) -> Iterator[str]:
    """Complaints about ``outputs``, one line each."""
    stored = {key: value for key, value in tensors.items() if key.startswith("out.")}
    answers = {key: value for key, value in outputs.items() if key not in JSON_KEYS}
    tolerances = case.get("tensor_tolerances", {})
    for key in sorted(stored.keys() - answers.keys()):
        yield f"{key}: missing from the outputs"
    for key in sorted(answers.keys() - stored.keys()):
        yield f"{key}: not among the stored results"
    for key in sorted(stored.keys() & answers.keys()):
        own = tolerances.get(key, tolerances.get(key.removeprefix("out."), {}))
        rtol, atol = own.get("rtol", case.get("rtol", 0.0)), own.get("atol", case.get("atol", 0.0))
        complaint = compare_tensor(answers[key], stored[key], float(rtol), float(atol))
        if complaint:
            yield f"{key}: {complaint}"
    for key in JSON_KEYS:
        if (key in case) != (key in outputs):
            yield f"{key}: {'missing from the outputs' if key in case else 'not part of the case'}"
        elif key in case:
            yield from compare_json(
                outputs[key], case[key], key, float(case.get("rtol", 0)), float(case.get("atol", 0))
            )


def compare_tensor(answer: Any, stored: torch.Tensor, rtol: float, atol: float) -> str:
    """Empty when ``answer`` (tensor, array, number or list) equals ``stored``; else what is wrong.

    Integers must be equal and of integer type. Two NaN, and two equal infinities, count as equal.
    """
    value = torch.as_tensor(answer).detach().cpu()
    if tuple(value.shape) != tuple(stored.shape):
        return f"shape {tuple(value.shape)} instead of {tuple(stored.shape)}"
    if not stored.is_floating_point():
        if value.is_floating_point():
            return f"type {value.dtype} instead of {stored.dtype}"
        wrong = (value.to(torch.int64) != stored.to(torch.int64)).reshape(-1)
        if not bool(wrong.any()):
            return ""
        first = int(torch.nonzero(wrong)[0])
        got, want = value.reshape(-1)[first], stored.reshape(-1)[first]
        return f"{int(wrong.sum())} of {wrong.numel()} integers differ, first {int(got)} instead of {int(want)}"
    a, b = value.to(torch.float64).numpy(), stored.to(torch.float64).numpy()
    with np.errstate(invalid="ignore"):
        excess = np.abs(a - b) - (atol + rtol * np.abs(b))
    excess = np.where((a == b) | (np.isnan(a) & np.isnan(b)), -np.inf, excess)
    excess = np.where(np.isnan(excess), np.inf, excess)
    if excess.size == 0 or excess.max() <= 0:
        return ""
    at = np.unravel_index(int(excess.argmax()), excess.shape)
    place = f" at {tuple(int(i) for i in at)}" if at else ""
    return (
        f"{int((excess > 0).sum())} of {excess.size} elements outside the tolerance, largest excess "
        f"{excess.max():.3g}{place}: {a[at]:.9g} instead of {b[at]:.9g}"
    )


def compare_json(answer: Any, stored: Any, where: str, rtol: float, atol: float) -> Iterator[str]:
    """Complaints about a JSON result: structures, texts and integers equal, other numbers to tolerance."""
    if isinstance(stored, Mapping):
        if not isinstance(answer, Mapping):
            yield f"{where}: {type(answer).__name__} instead of an object"
            return
        if answer.keys() != stored.keys():
            yield f"{where}: keys differ by {sorted(map(str, answer.keys() ^ stored.keys()))}"
        for key in stored:
            if key in answer:
                yield from compare_json(answer[key], stored[key], f"{where}.{key}", rtol, atol)
    elif isinstance(stored, list):
        if not isinstance(answer, (list, tuple)) or len(answer) != len(stored):
            found = len(answer) if isinstance(answer, (list, tuple)) else type(answer).__name__
            yield f"{where}: {found} instead of a list of {len(stored)}"
            return
        for index, (got, want) in enumerate(zip(answer, stored, strict=True)):
            yield from compare_json(got, want, f"{where}[{index}]", rtol, atol)
    elif _is_number(stored) and _is_number(answer):
        slack = 0.0 if isinstance(stored, int) else atol + rtol * abs(stored)
        if not (answer == stored or abs(answer - stored) <= slack):
            yield f"{where}: {answer!r} instead of {stored!r}"
    elif type(answer) is not type(stored) or answer != stored:
        yield f"{where}: {answer!r} instead of {stored!r}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
