"""Records of training runs, read from DomainBed's folders or from ours.

One line of ``results.jsonl`` is one evaluation of one run. The public code crashes, or silently goes on, where a record
lacks a key; here every line is checked when it is read, and the message names file and line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe.errors import DataError, NotFoundError
from workers.domainbed.jobs import RESULTS, JobState, job_state

GROUP = ("dataset", "algorithm", "trial_seed")


@dataclass(frozen=True)
class Record:
    """One evaluation of one run.

    Attributes:
        step: number of the update after which it was made.
        test_envs: numbers of the held-out domains.
        hparams_seed: seed of the run's hyper-parameters.
        in_acc, out_acc: accuracy on the two parts of every domain, fractions; by number of the domain.
        dataset, algorithm, trial_seed: what the run belongs to.
        hparams: values of the run; empty where the record has none.
    """

    step: int
    test_envs: tuple[int, ...]
    hparams_seed: int
    in_acc: tuple[float, ...]
    out_acc: tuple[float, ...]
    dataset: str = ""
    algorithm: str = ""
    trial_seed: int = 0
    hparams: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunFolder:
    """One folder of a sweep.

    Attributes:
        path: the folder.
        state: whether the run has ended.
        records: its evaluations in the order of the file.
        cut: its last line was cut off (the run was killed while it wrote) and has been left out.
    """

    path: Path
    state: JobState
    records: tuple[Record, ...]
    cut: bool = False


def parse_record(data: Any, where: str = "record", *, grouped: bool = True) -> Record:
    """Check one record.

    Args:
        data: parsed JSON.
        where: what to call it in messages.
        grouped: it must also say its data set, algorithm and trial.

    Raises:
        DataError: a missing or wrong value; the message names it.
    """
    if not isinstance(data, Mapping) or not isinstance(data.get("args"), Mapping):
        raise DataError(f"{where} is not a record: it has no `args`.", "A record is one line of results.jsonl.")
    args = data["args"]
    out_acc = _accuracies(data, "out", where)
    in_acc = _accuracies(data, "in", where)
    if len(in_acc) != len(out_acc) or not out_acc:
        raise DataError(
            f"{where} has {len(in_acc)} accuracies env*_in_acc and {len(out_acc)} env*_out_acc.",
            "Every domain needs both, numbered from 0 without a gap.",
        )
    held_out = args.get("test_envs")
    if not isinstance(held_out, list) or not held_out or len({*map(str, held_out)}) != len(held_out):
        raise DataError(f"{where} has test_envs {held_out!r}.", "Give a list of different numbers of domains.")
    test_envs = tuple(_whole(number, "test_envs", where) for number in held_out)
    if max(test_envs) >= len(out_acc):
        raise DataError(
            f"{where} holds out domain {max(test_envs)}, but has accuracies of {len(out_acc)} domains.",
            f"env{max(test_envs)}_out_acc is missing.",
        )
    named = {name: args.get(name) for name in GROUP}
    if grouped:
        _check_group(named, where)
    hparams = data.get("hparams")
    return Record(
        step=_whole(data.get("step"), "step", where),
        test_envs=test_envs,
        hparams_seed=_whole(args.get("hparams_seed"), "hparams_seed", where),
        in_acc=in_acc,
        out_acc=out_acc,
        dataset=str(named["dataset"] or ""),
        algorithm=str(named["algorithm"] or ""),
        trial_seed=_whole(named["trial_seed"] or 0, "trial_seed", where),
        hparams=dict(hparams) if isinstance(hparams, Mapping) else {},
    )


def read_run(folder: Path) -> RunFolder:
    """The records of one run folder.

    A last line that was cut off is left out if the run has not ended.

    Raises:
        NotFoundError: no ``results.jsonl`` in it.
        DataError: a line that is not a record, with file and line.
    """
    file = folder / RESULTS
    if not file.is_file():
        raise NotFoundError(f"{folder} has no {RESULTS}.", "Give the folder of one run.")
    state = job_state(folder)
    text = file.read_text(encoding="utf-8")
    lines = text.split("\n")
    records, cut = [], False
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number},"
        try:
            data = json.loads(line)
        except ValueError:
            if number == len(lines) and state != "done":  # no newline at its end: it was being written
                cut = True
                continue
            raise DataError(f"{where} is not JSON.", "Delete the run's folder and run it again.") from None
        records.append(parse_record(data, where))
    return RunFolder(folder, state, tuple(records), cut)


def read_sweep(root: Path, *, only_done: bool = False) -> list[RunFolder]:
    """All runs below a sweep's folder, sorted by name.

    Args:
        root: its folders hold ``results.jsonl``; other folders are passed over.
        only_done: leave out runs that have not ended (Parity: the public code reads them too).

    Raises:
        NotFoundError: no such folder, or no run in it.
        DataError: see :func:`read_run`.
    """
    if not root.is_dir():
        raise NotFoundError(f"There is no folder {root}.", "Give the output folder of a sweep.")
    found = [folder for folder in sorted(root.iterdir()) if (folder / RESULTS).is_file()]
    runs = [read_run(folder) for folder in found if not only_done or job_state(folder) == "done"]
    if not runs:
        ended = " that has ended" if found else ""
        raise NotFoundError(f"{root} has no run{ended}.", f"A run is a folder with a file {RESULTS}.")
    return runs


def records_of(runs: Iterable[RunFolder]) -> list[Record]:
    """The records of several runs in one list."""
    return [record for run in runs for record in run.records]


def _accuracies(data: Mapping[str, Any], part: str, where: str) -> tuple[float, ...]:
    """env0, env1, ... up to the first that is missing."""
    values: list[float] = []
    while (key := f"env{len(values)}_{part}_acc") in data:
        value = data[key]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isinf(value):
            raise DataError(f"{where} has {key} {value!r}.", "It is a fraction of images.")
        values.append(float(value))
    beyond = [key for key in data if key.startswith("env") and key.endswith(f"_{part}_acc")]
    if len(beyond) > len(values):
        raise DataError(f"{where} lacks env{len(values)}_{part}_acc.", "Domains are numbered from 0 without a gap.")
    return tuple(values)


def _check_group(named: Mapping[str, Any], where: str) -> None:
    for name in ("dataset", "algorithm"):
        if not isinstance(named[name], str) or not named[name]:
            raise DataError(f"{where} has no {name} in its args.", "It does not say what it belongs to.")
    if named["trial_seed"] is None:
        raise DataError(f"{where} has no trial_seed in its args.", "It does not say what it belongs to.")


def _whole(value: Any, name: str, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        problem = f"lacks {name}" if value is None else f"has {name} {value!r}"
        raise DataError(f"{where} {problem}.", "It is a whole number from 0 on.")
    return value
