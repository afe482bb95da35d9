"""``search``: hyper-parameter search over the config of any other stage, on Ray Tune.

The stage takes the inputs of the stage that it wraps and makes what that one makes: the best trial's artifact, with the
study (best config, table of trials, figures) beside it in the folder ``search/``. Every trial is an artifact under
exactly the key that the wrapped stage would have with that config, so a search finds what was computed before, whoever
computed it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from moe.errors import MoepipeError, SpecError
from orchestrator.stages.base import STAGES, Member, StageBase, StageConfig
from workers.context import Context
from workers.search_population import Change, PopulationSettings
from workers.search_propose import Algorithm, Mode
from workers.search_space import Dimension, Space, with_values

KIND = "search"


class WrappedStage(BaseModel):
    """The stage that is searched over; its inputs and resources are written on the search stage itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str = Field(description="stage kind, e.g. train")
    config: dict[str, Any] = Field(
        default_factory=dict, description="its config, as written; the space replaces some fields"
    )


class SearchConfig(StageConfig):
    """What is searched, how, and by which metric."""

    stage: WrappedStage = Field(description="the stage whose config is searched")
    space: dict[str, Dimension] = Field(
        default_factory=dict, description="dotted path in the stage's config -> values to try"
    )
    metric: str | tuple[str, ...] = Field(
        description="number in the stage's meta, e.g. scores.accuracy; several: a Pareto front, the first one decides"
    )
    mode: Mode | tuple[Mode, ...] = Field(default="max", description="max or min, for each metric")
    selection: Literal["training_domains", "validation_domains"] = Field(
        description="which rows the metric is computed on: validation rows of the training domains, or domains kept "
        "for validation; metrics of test domains are refused"
    )
    algorithm: Algorithm = Field(
        default="random",
        description="grid, random, tpe (Optuna), population (fields change while training goes on), schedule (one run "
        "whose fields change at given updates), or restarts: the config as written with other seeds",
    )
    population: PopulationSettings | None = Field(
        default=None, description="of algorithm population: how many train, and how often the worst copy the best"
    )
    schedule: tuple[Change, ...] = Field(default=(), description="of algorithm schedule: the parts, in order")
    scheduler: Literal["none", "asha", "median"] = Field(
        default="none",
        description="stops bad trials early: asha (successive halving) or median",
    )
    trials: int | None = Field(
        default=None,
        ge=1,
        le=10_000,
        description="points to try, those found in the store included; null: whole grid",
    )
    seeds: int = Field(
        default=1, ge=1, le=100, description="runs of each point with different seeds; the objective is their mean"
    )
    sampler_seed: int | None = Field(
        default=None, ge=0, description="of the random points; null: derived from the pipeline's seed"
    )
    batch: int = Field(
        default=4, ge=1, le=1000, description="points that tpe proposes at once; decides the result, unlike concurrency"
    )
    startup: int = Field(default=8, ge=1, description="random points before tpe uses its model")
    include_written: bool = Field(
        default=True,
        description="random, tpe, population: the first point is the config as written, when the space has it",
    )
    reuse: bool = Field(
        default=True, description="random and tpe: finished trials of the same stage that lie in the space count"
    )
    curve: str | None = Field(
        default=None,
        description="what schedulers look at while a trial runs, better in the direction of the (first) mode; "
        "null: val/NAME for scores.NAME",
    )
    grace: int = Field(default=1, ge=1, description="updates before a scheduler may stop a trial")
    reduction: int = Field(default=3, ge=2, description="asha: one of so many trials goes on at each rung")
    concurrency: Literal["auto"] | int = Field(
        default="auto",
        description="trials at once; auto: as many as the free resources hold",
        json_schema_extra={"cache": False},
    )
    figures: bool = Field(default=True, description="draw history, parallel coordinates and importance")
    min_trials: int = Field(default=1, ge=1, description="finished trials without which the search fails")

    @model_validator(mode="before")
    @classmethod
    def _words(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "pbt" in (values.get("scheduler"), values.get("algorithm")):
            raise ValueError("population-based training is written `algorithm: population`, with a block `population`")
        return values

    @model_validator(mode="after")
    def _consistent(self) -> SearchConfig:
        if len(self.modes) != len(self.metrics):
            raise ValueError(f"there are {len(self.metrics)} metrics, but {len(self.modes)} modes")
        if not self.metrics or len(set(self.metrics)) < len(self.metrics):
            raise ValueError("name at least one metric, each once")
        if len(self.metrics) > 1 and self.scheduler != "none":
            raise ValueError("schedulers compare trials by one metric; set scheduler: none for several")
        self._segments_fit()
        if self.trials is None and self.algorithm not in ("grid", "population", "schedule"):
            raise ValueError(f"{self.algorithm} needs a number of trials")
        if self.algorithm == "restarts" and self.space:
            raise ValueError("restarts run the config as written: leave out the space")
        if self.scheduler != "none" and self.seeds > 1:
            raise ValueError("schedulers compare single runs; set seeds: 1")
        if not isinstance(self.concurrency, str) and self.concurrency < 1:
            raise ValueError("concurrency must be auto or at least 1")
        return self

    @property
    def lanes(self) -> int:
        """Runs of which trials are parts, side by side; 0 where each trial is a whole run."""
        return self.population.size if self.population is not None else min(1, len(self.schedule))

    def _segments_fit(self) -> None:
        for name, given in (("population", self.population is not None), ("schedule", bool(self.schedule))):
            if given != (self.algorithm == name):
                raise ValueError(f"`algorithm: {name}` and the block `{name}` belong together")
        if not self.lanes:
            return
        if self.trials is not None:
            raise ValueError(f"how many trials a {self.algorithm} makes follows from its block: leave out trials")
        if len(self.metrics) > 1 or self.seeds > 1:
            raise ValueError(f"a {self.algorithm} looks at single runs and one metric; name one, with seeds: 1")
        if self.scheduler != "none":
            raise ValueError(f"a {self.algorithm} stops nobody early; set scheduler: none")
        if bool(self.space) != (self.algorithm == "population"):
            raise ValueError("a population needs a space, the fields that change in training; a schedule has none")
        ends = [change.until for change in self.schedule[:-1]]
        if None in ends or ends != sorted(set(ends), key=lambda end: end or 0):
            raise ValueError("each part of a schedule but the last needs an `until` above the one before")

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics, also when there is one."""
        return (self.metric,) if isinstance(self.metric, str) else self.metric

    @property
    def modes(self) -> tuple[Mode, ...]:
        """A mode for each metric."""
        return (self.mode,) * len(self.metrics) if isinstance(self.mode, str) else self.mode

    def searched(self) -> Space:
        """The space."""
        return Space(self.space)

    def wrapped(self) -> StageBase[Any]:
        """The stage that is searched over (SpecError: unknown kind)."""
        if self.stage.kind == KIND:
            raise SpecError("A search cannot search over a search.", "Put all dimensions into one space.")
        stage: StageBase[Any] = STAGES.load(self.stage.kind).Stage()
        return stage

    def point(self, values: Mapping[str, Any]) -> StageConfig:
        """The wrapped stage's config at a point of the space.

        Raises:
            ValidationError: the stage refuses it.
            SpecError: a path leads nowhere.
        """
        return self.wrapped().Config.model_validate(with_values(self.stage.config, values))

    def some(self) -> StageConfig:
        """A config that the stage accepts: as written where that is complete, else with a point of the space."""
        try:
            return self.point({})
        except (ValueError, MoepipeError):
            return self.point(self.searched().first())

    def some_or_none(self) -> StageConfig | None:
        """Like :meth:`some`, None where the stage refuses both."""
        try:
            return self.some()
        except (ValueError, MoepipeError):
            return None


class Stage(StageBase[SearchConfig]):
    """Search over the config of another stage and give out the best trial."""

    output: ClassVar[str] = "(that of config.stage.kind)"
    open_ports: ClassVar[bool] = True
    leads: ClassVar[bool] = True
    Config: ClassVar[type[StageConfig]] = SearchConfig

    def bind(self, config: SearchConfig) -> StageBase[Any]:
        """The search with ports, output and fan-out of the stage that it wraps."""
        wrapped = config.wrapped()
        names = {"output": wrapped.output, "inputs": wrapped.inputs, "per_seed": wrapped.per_seed, "gang": wrapped.gang}
        bound: type[StageBase[Any]] = type("Stage", (type(self),), {**names, "__module__": type(self).__module__})
        return bound()

    def examine(self, config: SearchConfig) -> Sequence[tuple[tuple[str | int, ...], str, str]]:
        """What is wrong with the wrapped stage's config, the space and the metric."""
        from orchestrator.search_check import problems

        return problems(config)

    def members(self, config: SearchConfig) -> list[Member]:
        """As the wrapped stage's: each member is searched on its own."""
        return config.wrapped().members(config.some())

    def code(self, config: SearchConfig) -> list[str]:
        """All code that a trial may run."""
        wrapped = config.wrapped()
        configs = [config.some(), *(config.point(point) for _, _, point in config.searched().probes())]
        chosen = {module for one in configs for module in wrapped.code(one)}
        return sorted({STAGES.module_name(config.stage.kind), *chosen})

    def external(self, config: SearchConfig, data_root: str) -> Mapping[str, str]:
        """What trials read from outside; and what presets make of the config as written."""
        wrapped = config.wrapped()
        configs = [config.some(), *(config.point(point) for _, _, point in config.searched().probes())]
        found: dict[str, set[str]] = {}
        for one in configs:
            for name, digest in wrapped.external(one, data_root).items():
                found.setdefault(name, set()).add(digest)
        filled = hashlib.sha256(config.some().model_dump_json().encode()).hexdigest()
        return {**{name: " ".join(sorted(digests)) for name, digests in found.items()}, "config": filled}

    def kinds(self, config: SearchConfig) -> list[str]:
        """The stage that is searched over."""
        return [config.stage.kind]

    def slots(self, config: SearchConfig) -> int:
        """Trials that may run at once, resources permitting."""
        most = config.lanes or config.trials or int(min(config.searched().size(), 10_000.0))
        return most if isinstance(config.concurrency, str) else min(most, config.concurrency)

    def weigh(self, config: SearchConfig, member: Member, inputs: Mapping[str, Sequence[Mapping[str, Any]]]) -> float:
        """Trials times the weight of one."""
        one = config.wrapped().weigh(config.some(), member, inputs)
        if config.lanes:
            return one * config.lanes
        return one * config.seeds * (config.trials or min(config.searched().size(), 10_000.0))

    def run(self, config: SearchConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """Write the best trial's files and ``search/``; ``meta`` is the trial's, ``search`` in it how it was found."""
        from orchestrator.search_run import run_search

        return run_search(config, member, context)
