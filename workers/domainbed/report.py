"""From records to tables of accuracies: mean and standard error over trials, by held-out domain and by data set.

The numbers are DomainBed's; :mod:`workers.domainbed.tables` prints them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moe.errors import DataError
from workers.domainbed.benchmark_sets import SETS
from workers.domainbed.records import Record
from workers.domainbed.selection import METHODS, run_choices, selection_method, sweep_accuracy

# Algorithms in the order of the official tables; others follow in order of appearance.
ALGORITHMS = (
    *("ERM", "ERMPlusPlus", "Fish", "IRM", "GroupDRO", "Mixup", "MLDG", "CORAL", "MMD", "DANN", "CDANN", "MTL"),
    *("SagNet", "ARM", "VREx", "RSC", "SD", "ANDMask", "SANDMask", "IGA", "SelfReg", "TRM", "IB_ERM", "IB_IRM"),
    *("CAD", "CondCAD", "Transfer", "CausIRL_CORAL", "CausIRL_MMD", "EQRM", "RDM", "ADRMX", "URM"),
)


@dataclass(frozen=True)
class Cell:
    """Per cent: mean over trials and its standard error (population deviation / sqrt(trials)).

    ``missing`` counts the runs that belong to the cell and are not there.
    """

    mean: float
    error: float
    trials: int
    missing: int = 0


@dataclass(frozen=True)
class Row:
    """An algorithm; a cell is None where nothing could be selected."""

    algorithm: str
    cells: tuple[Cell | None, ...]

    @property
    def average(self) -> float | None:
        """Mean of the unrounded cells; None if one is missing."""
        means = self._means()
        return sum(means) / len(means) if means else None

    @property
    def worst(self) -> float | None:
        """The least cell; None if one is missing."""
        return min(self._means(), default=None)

    def _means(self) -> list[float]:
        means = [cell.mean for cell in self.cells if cell is not None]
        return means if len(means) == len(self.cells) else []


@dataclass(frozen=True)
class Table:
    """One selection method on one data set (columns: held-out domains) or over data sets (``dataset`` empty)."""

    method: str
    dataset: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        """Name of the data set, or Averages."""
        return self.dataset or "Averages"


@dataclass(frozen=True)
class Report:
    """All tables: method by method, data sets first, then averages; ``records`` counts what they are made from."""

    tables: tuple[Table, ...]
    records: int


# What every trial selected: (data set, algorithm, held-out domain) -> trial -> accuracy, in order of appearance.
Scores = dict[tuple[str, str, int], dict[int, float]]


def collect(
    records: Sequence[Record],
    methods: Sequence[str] = tuple(METHODS),
    labels: Mapping[str, Sequence[str]] | None = None,
    missing: Mapping[tuple[str, str, int], int] | None = None,
) -> Report:
    """Tables of a sweep.

    Args:
        records: of any number of data sets, algorithms and trials.
        methods: selection methods, see :data:`workers.domainbed.selection.METHODS`.
        labels: column titles by data set, for sets of one's own; else ``env0``, ``env1``, ...
        missing: (data set, algorithm, held-out domain) -> runs that the sweep should have and has not.

    Raises:
        SpecError: unknown method.
        DataError: no records; records that lack their data set; domains that do not fit the data set.
    """
    if not records:
        raise DataError("There are no records to make tables from.")
    if any(not record.dataset or not record.algorithm for record in records):
        raise DataError("A record does not say its data set or algorithm.", "Read records with grouped=True.")
    algorithms = _ordered((record.algorithm for record in records), ALGORITHMS)
    datasets = _ordered((record.dataset for record in records), SETS)
    columns = {dataset: _columns(dataset, records, labels or {}) for dataset in datasets}
    tables = []
    for method in methods:
        scores = _scores(records, selection_method(method).name)
        for dataset in datasets:
            domains = range(len(columns[dataset]))
            rows = []
            for name in algorithms:
                keys = [(dataset, name, env) for env in domains]
                cells = [_cell([*scores.get(key, {}).values()], (missing or {}).get(key, 0)) for key in keys]
                rows.append(Row(name, tuple(cells)))
            tables.append(Table(method, dataset, columns[dataset], tuple(rows)))
        rows = [
            Row(name, tuple(_cell(_trial_means(scores, dataset, name)) for dataset in datasets)) for name in algorithms
        ]
        tables.append(Table(method, "", tuple(datasets), tuple(rows)))
    return Report(tuple(tables), len(records))


def _scores(records: Sequence[Record], method: str) -> Scores:
    groups: dict[tuple[int, str, str, int], list[Record]] = {}
    for record in records:
        for env in record.test_envs:  # a run with two held-out domains belongs to both
            groups.setdefault((record.trial_seed, record.dataset, record.algorithm, env), []).append(record)
    scores: Scores = {}
    for (trial, dataset, algorithm, env), group in groups.items():
        accuracy = sweep_accuracy(run_choices(group, method))
        if accuracy is not None:
            scores.setdefault((dataset, algorithm, env), {})[trial] = accuracy
    return scores


def _trial_means(scores: Scores, dataset: str, algorithm: str) -> list[float]:
    """Mean over the held-out domains that there are, by ascending trial."""
    by_trial: dict[int, list[float]] = {}
    for (name, method, _), trials in scores.items():
        if (name, method) == (dataset, algorithm):
            for trial, accuracy in trials.items():
                by_trial.setdefault(trial, []).append(accuracy)
    return [float(np.mean(by_trial[trial])) for trial in sorted(by_trial)]


def _cell(accuracies: Sequence[float], missing: int = 0) -> Cell | None:
    """The order of operations decides how x.x5 is rounded: mean first, then times 100."""
    if not accuracies:
        return None
    values = np.asarray(accuracies, dtype=np.float64)
    error = 100 * float(np.std(values / np.sqrt(len(values))))
    return Cell(100 * float(np.mean(values)), error, len(values), missing)


def _ordered(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Different names, those of ``known`` first and in its order."""
    present = list(dict.fromkeys(names))
    first = [name for name in known if name in present]
    return first + [name for name in present if name not in first]


def _columns(dataset: str, records: Sequence[Record], labels: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    counts = {len(record.out_acc) for record in records if record.dataset == dataset}
    if dataset in labels:
        names = tuple(labels[dataset])
    elif dataset in SETS:
        names = SETS[dataset].labels
    else:
        names = tuple(f"env{number}" for number in range(max(counts)))
    if counts != {len(names)}:
        raise DataError(
            f"Records of {dataset} have accuracies of {sorted(counts)} domains, and it has {len(names)}: "
            f"{', '.join(names)}.",
            "Remove runs of other data from the sweep's folder; look for stray folders in the data set.",
        )
    return names
