"""Which hyper-parameters and which checkpoint count: DomainBed's three selection methods.

``iid``: training-domain validation, mean accuracy on ``out`` of the training domains, best checkpoint. ``loo``:
leave-one-domain-out, accuracy on each training domain when it is held out as well, best checkpoint. ``oracle``:
accuracy on ``out`` of the test domain, last checkpoint only. All report the accuracy on ``in`` of the test domain.

Ties follow the public code: the first checkpoint within a run, the largest hyper-parameter seed between runs. A
validation accuracy that is not a number is worse than all others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from moe.errors import DataError, SpecError, nearest
from workers.domainbed.records import Record


@dataclass(frozen=True)
class Accuracy:
    """Validation and test accuracy (fractions) of the selected checkpoint, and its step."""

    val: float
    test: float
    step: int

    @property
    def order(self) -> float:
        """The validation accuracy, with not-a-number below all."""
        return -math.inf if math.isnan(self.val) else self.val


@dataclass(frozen=True)
class RunChoice:
    """What a method makes of the runs of one hyper-parameter seed; ``accuracy`` is None where they do not suffice."""

    hparams_seed: int
    accuracy: Accuracy | None
    hparams: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A selection method: its short name, its name in tables, and its rule for the runs of one seed."""

    name: str
    title: str
    select: Callable[[Sequence[Record]], Accuracy | None]


def validation_accuracy(record: Record) -> Accuracy:
    """``iid`` for one checkpoint: mean ``out`` accuracy of the training domains.

    Raises:
        SpecError: several held-out domains, for which the method is not defined.
        DataError: no training domain.
    """
    if len(record.test_envs) != 1:
        raise SpecError(
            f"Training-domain validation is for one held-out domain, and this run holds out {list(record.test_envs)}.",
            "Such runs serve leave-one-domain-out selection only.",
        )
    test = record.test_envs[0]
    values = [value for number, value in enumerate(record.out_acc) if number != test]
    if not values:
        raise DataError("A record of one domain alone has no training domain to select by.")
    return Accuracy(float(np.mean(values)), record.in_acc[test], record.step)


def _iid(records: Sequence[Record]) -> Accuracy | None:
    single = _single(records)
    return max(map(validation_accuracy, single), key=lambda accuracy: accuracy.order) if single else None


def _oracle(records: Sequence[Record]) -> Accuracy | None:
    single = _single(records)
    if not single:
        return None
    last = sorted(single, key=lambda record: record.step)[-1]  # of equal steps the last in the file
    test = last.test_envs[0]
    return Accuracy(last.out_acc[test], last.in_acc[test], last.step)


def _loo(records: Sequence[Record]) -> Accuracy | None:
    steps = sorted({record.step for record in records})
    found = [_left_out([record for record in records if record.step == step]) for step in steps]
    usable = [accuracy for accuracy in found if accuracy is not None]
    return max(usable, key=lambda accuracy: accuracy.order) if usable else None


def _left_out(records: Sequence[Record]) -> Accuracy | None:
    """Leave-one-domain-out at one step; None unless the run and all its pairs are there."""
    single = [record for record in records if len(record.test_envs) == 1]
    if len(single) != 1:
        return None
    test, domains = single[0].test_envs[0], len(records[0].out_acc)
    values: dict[int, float] = {}
    for record in records:
        if len(record.test_envs) == 2:
            others = set(record.test_envs) - {test}
            if len(others) != 1 or len(record.out_acc) != domains:
                raise DataError(
                    f"A run that holds out {list(record.test_envs)} of {len(record.out_acc)} domains does not belong "
                    f"to held-out domain {test} of {domains}.",
                    "Select within one data set, algorithm and held-out domain.",
                )
            other = others.pop()
            values[other] = record.in_acc[other]
    if len(values) != domains - 1 or domains == 1:
        return None
    val = float(np.sum([values[number] for number in sorted(values)])) / (domains - 1)
    return Accuracy(val, single[0].in_acc[test], single[0].step)


def _single(records: Sequence[Record]) -> list[Record]:
    """Records with one held-out domain, all the same."""
    single = [record for record in records if len(record.test_envs) == 1]
    domains = sorted({record.test_envs[0] for record in single})
    if len(domains) > 1:
        raise DataError(
            f"These records hold out different domains: {domains}.",
            "Select within one data set, algorithm and held-out domain.",
        )
    return single


METHODS = MappingProxyType(
    {
        method.name: method
        for method in (
            Method("iid", "training-domain validation set", _iid),
            Method("loo", "leave-one-domain-out cross-validation", _loo),
            Method("oracle", "test-domain validation set (oracle)", _oracle),
        )
    }
)


def selection_method(name: str) -> Method:
    """The method of this name.

    Raises:
        SpecError: none of ``iid``, ``loo``, ``oracle``.
    """
    if name not in METHODS:
        raise SpecError(f"There is no selection method {name!r}.", nearest(name, METHODS))
    return METHODS[name]


def run_choices(records: Sequence[Record], method: str) -> list[RunChoice]:
    """What a method makes of each hyper-parameter seed, by ascending seed.

    Args:
        records: of one data set, algorithm, trial and held-out domain; runs that hold out a second domain as well
            belong to both.
        method: ``iid``, ``loo`` or ``oracle``.

    Raises:
        SpecError: unknown method.
        DataError: records of different held-out domains.
    """
    select = selection_method(method).select
    by_seed: dict[int, list[Record]] = {}
    for record in records:
        by_seed.setdefault(record.hparams_seed, []).append(record)
    return [RunChoice(seed, select(runs), _hparams(runs)) for seed, runs in sorted(by_seed.items())]


def ranking(choices: Sequence[RunChoice]) -> list[tuple[RunChoice, Accuracy]]:
    """The seeds that could be judged, best validation accuracy first, with their accuracies."""
    judged = [(choice, choice.accuracy) for choice in choices if choice.accuracy is not None]
    return sorted(judged, key=lambda pair: pair[1].order)[::-1]


def sweep_accuracy(choices: Sequence[RunChoice]) -> float | None:
    """Test accuracy of the best seed; None where no seed could be judged."""
    ranked = ranking(choices)
    return ranked[0][1].test if ranked else None


def _hparams(runs: Sequence[Record]) -> Mapping[str, Any]:
    """Those of the run with one held-out domain, which is the one that is reported."""
    ordered = sorted(runs, key=lambda record: len(record.test_envs))
    return ordered[0].hparams
