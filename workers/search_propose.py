"""Which point of a space is tried next: grid, random, TPE (Optuna), or the same one with another seed.

What is proposed depends on the space, the seed and the results so far, never on time or on the number of processes: TPE
proposes ``batch`` points at once and waits for all of them. So a search that is cut off proposes the same points again
and finds them done.

TPE: Bergstra et al., "Algorithms for hyper-parameter optimization", 2011; several objectives: Ozaki et al., 2020.
``restarts`` tries the config as written with other seeds: what luck alone gives for the same budget.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

from moe.errors import EnvironmentProblem
from workers.search_space import SEED, Dimension, Space, Values, identity, point_id

Algorithm = Literal["grid", "random", "tpe", "restarts", "population", "schedule"]
Mode = Literal["max", "min"]
Answer = Values | Literal["wait", "done"]
_TRIES = 100


class Proposer(Protocol):
    """Gives points and takes results; numbers count the points from 0 in the order in which they were given."""

    def ask(self) -> Answer:
        """The next point; ``wait``: results must come first; ``done``: there is nothing left to propose."""
        ...

    def tell(self, number: int, objective: Sequence[float] | None) -> None:
        """The result of point ``number``; None: it failed."""
        ...


class Fixed:
    """A list of points: the grid, or any other."""

    def __init__(self, points: Iterator[Values]) -> None:
        self._points = points

    def ask(self) -> Answer:
        """See :class:`Proposer`."""
        return next(self._points, "done")

    def tell(self, number: int, objective: Sequence[float] | None) -> None:
        """Results change nothing."""


def restarts(count: int) -> Iterator[Values]:
    """The config as written, ``count`` times with different seeds."""
    yield from ({SEED: number} for number in range(count))


def random_points(space: Space, seed: int, first: Sequence[Values], known: Sequence[Values]) -> Iterator[Values]:
    """``first``, then random points, none of them twice and none that is ``known``."""
    seen = {point_id(values) for values in known}
    number = 0
    for values in first:
        if point_id(values) not in seen:
            seen.add(point_id(values))
            yield values
    while True:
        for _ in range(_TRIES):
            values = space.draw(seed, number)
            number += 1
            if point_id(values) not in seen:
                break
        else:
            return  # a small space whose points have all been tried
        seen.add(point_id(values))
        yield values


class Tpe:
    """Tree-structured Parzen estimators, in batches.

    Args:
        space: the space.
        modes: of each objective.
        seed: of the sampler.
        batch: points proposed before their results are needed.
        startup: random points before the model is used.
        first: points to begin with.
        known: points with results from earlier searches.
    """

    def __init__(
        self,
        space: Space,
        modes: Sequence[Mode],
        seed: int,
        batch: int,
        startup: int,
        first: Sequence[Values],
        known: Sequence[tuple[Values, Sequence[float]]],
    ) -> None:
        optuna = load_optuna()
        self._optuna = optuna
        self._space, self._batch = space, batch
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # multivariate, group and constant_liar are called experimental
            sampler = optuna.samplers.TPESampler(
                n_startup_trials=startup, multivariate=True, group=True, constant_liar=True, seed=seed % 2**32
            )
        self._study = study_of(modes, sampler)
        for values, objective in known:
            self._study.add_trial(_frozen(space, values, objective))
        for values in first:
            self._study.enqueue_trial({name: _encode(space.dimensions[name], value) for name, value in values.items()})
        self._given: list[Any] = []
        self._results: dict[int, Sequence[float] | None] = {}
        self._told = 0

    def ask(self) -> Answer:
        """See :class:`Proposer`."""
        if len(self._given) >= self._told + self._batch:
            return "wait"
        trial = self._study.ask()
        values: Values = {}
        for name in self._space.order():
            if self._space.active(name, values):
                values[name] = _suggest(trial, name, self._space.dimensions[name])
        self._given.append(trial)
        return values

    def tell(self, number: int, objective: Sequence[float] | None) -> None:
        """See :class:`Proposer`. Optuna hears of a batch when all of it is there, in the order of the numbers."""
        self._results[number] = objective
        if any(index not in self._results for index in range(self._told, len(self._given))):
            return
        if len(self._given) < self._told + self._batch:
            return
        for index in range(self._told, len(self._given)):
            result = self._results.pop(index)
            failed = self._optuna.trial.TrialState.FAIL
            if result is None:
                self._study.tell(self._given[index], state=failed)
            else:
                self._study.tell(self._given[index], list(result))
        self._told = len(self._given)


def load_optuna() -> Any:
    """Optuna, quiet.

    Raises:
        EnvironmentProblem: it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise EnvironmentProblem("Optuna is not installed.", "pip install 'moepipe[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def study_of(modes: Sequence[Mode], sampler: Any = None) -> Any:
    """An Optuna study in memory."""
    optuna = load_optuna()
    words = ["maximize" if mode == "max" else "minimize" for mode in modes]
    return optuna.create_study(directions=words, sampler=sampler)


def distribution(dimension: Dimension) -> Any:
    """A dimension in Optuna's words. Choices are texts of JSON there, because they may be maps or lists."""
    optuna = load_optuna()
    if dimension.choice is not None:
        return optuna.distributions.CategoricalDistribution([identity(value) for value in dimension.choice])
    low, high = dimension.bounds
    if dimension.whole:
        return optuna.distributions.IntDistribution(int(low), int(high), dimension.log, int(dimension.step or 1))
    return optuna.distributions.FloatDistribution(low, high, dimension.log, dimension.step)


def frozen_trials(space: Space, results: Sequence[tuple[Values, Sequence[float]]]) -> list[Any]:
    """Finished trials in Optuna's form, for its importance evaluators."""
    return [_frozen(space, values, objective) for values, objective in results]


def _frozen(space: Space, values: Mapping[str, Any], objective: Sequence[float]) -> Any:
    optuna = load_optuna()
    names = [name for name in space.order() if name in values]
    return optuna.trial.create_trial(
        params={name: _encode(space.dimensions[name], values[name]) for name in names},
        distributions={name: distribution(space.dimensions[name]) for name in names},
        values=list(objective),
    )


def _encode(dimension: Dimension, value: Any) -> Any:
    return identity(value) if dimension.choice is not None else value


def _suggest(trial: Any, name: str, dimension: Dimension) -> Any:
    if dimension.choice is not None:
        texts = {identity(value): value for value in dimension.choice}
        return texts[trial.suggest_categorical(name, list(texts))]
    low, high = dimension.bounds
    if dimension.whole:
        return trial.suggest_int(name, int(low), int(high), step=int(dimension.step or 1), log=dimension.log)
    value = dimension.tidy(trial.suggest_float(name, low, high, step=dimension.step, log=dimension.log))
    return min(max(value, low), high)


def finite(objective: Sequence[float]) -> bool:
    """Whether every number can be compared."""
    return all(math.isfinite(value) for value in objective)


def shown(values: Mapping[str, Any]) -> str:
    """A point for people: ``lr=0.001 optimizer=adam``, with the last part of each path where that is enough."""
    names = list(values)
    short = {name: name.rpartition(".")[2].lstrip("~") for name in names}
    twice = {text for text in short.values() if list(short.values()).count(text) > 1}
    parts = []
    for name in names:
        value = values[name]
        text = f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
        parts.append(f"{name if short[name] in twice else short[name]}={text}")
    return " ".join(parts) or "as written"
