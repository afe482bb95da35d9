"""The pipeline specification: what a YAML says after extends, profile, ``--set`` and references are worked in.

The models here know field names, types and bounds. What needs the registries (stage kinds, ports, ``config:`` blocks)
is checked by :mod:`orchestrator.graph`; where a value stands in which file is known by :mod:`orchestrator.loading`.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from moe.errors import SpecError

API_VERSION = "moepipe/v1"
NAME_PATTERN = r"^[A-Za-z][A-Za-z0-9_-]*$"

Scale = Literal["smoke", "dev", "paper"]
StageName = Annotated[str, Field(pattern=NAME_PATTERN, max_length=60)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Amount = Annotated[float, Field(ge=0)]
_COSTS = ("parameters", "active_parameters", "flops", "latency_ms", "device_hours")
_BUILT_IN = ("cpu", "cpus", "gpu", "gpus", "memory", "memory_gb", "object_store_memory")


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Resources(_Model):
    """What one member of a stage takes from the cluster while it runs."""

    cpus: float = Field(
        default=1, ge=0, description="CPU cores of one rank; fractions let several members share a core."
    )
    gpus: float = Field(default=0, ge=0, description="GPUs of one rank; fractions let several members share a GPU.")
    memory_gb: float | None = Field(
        default=None, gt=0, description="Main memory of one rank in GB (10^9 bytes) for placement; null: not asked for."
    )
    workers: int = Field(
        default=1, ge=1, le=4096, description="Ranks of a gang stage (distributed training); 1 for all other stages."
    )
    threads: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="Compute threads of one rank; enters the cache key, because sums depend on it.",
    )
    custom: dict[str, Amount] = Field(
        default_factory=dict, description="Ray's custom resources by name, e.g. {spot: 1}, of one rank."
    )

    @field_validator("custom")
    @classmethod
    def _own_names(cls, value: dict[str, float]) -> dict[str, float]:
        taken = [name for name in value if name.lower() in _BUILT_IN]
        if taken:
            raise ValueError(f"{taken[0]} is not a custom resource: write cpus, gpus or memory_gb beside custom")
        return value


class Retry(_Model):
    """How often a member is started again, by cause of the failure; -1 means without limit."""

    user: int = Field(default=0, ge=-1, description="Exceptions of the stage's own code (a wrong config, a bug).")
    out_of_memory: int = Field(default=1, ge=-1, description="Main or GPU memory ran out.")
    preemption: int = Field(default=-1, ge=-1, description="The machine was taken away (spot instance, drained node).")
    infrastructure: int = Field(default=3, ge=-1, description="A worker process or node died for another reason.")


class TrackingSpec(_Model):
    """Where the run is mirrored for comparison (MLflow). The run record itself never depends on it."""

    enabled: bool = Field(default=True, description="Mirror runs, parameters, metrics and reports to MLflow.")
    uri: str | None = Field(
        default=None, description="MLflow tracking address; null: MLFLOW_TRACKING_URI, else a sqlite file in the store."
    )
    experiment: str | None = Field(default=None, description="MLflow experiment; null: the pipeline's name.")


class Condition(_Model):
    """One condition that a run must meet to be promoted; the numbers are those of `moepipe compare RUN`."""

    method: str = Field(description="Row of the comparison, e.g. student_distill, or erm_tent.")
    metric: str = Field(
        default="avg",
        description="avg, worst, a domain, another score (macro_f1 ...), seeds, parameters, active_parameters, flops, "
        "latency_ms or device_hours; scores are shares (0.8, not 80).",
    )
    at_least: float | None = Field(default=None, description="Lowest value allowed.")
    at_most: float | None = Field(default=None, description="Highest value allowed.")
    baseline: str | None = Field(
        default=None, description="Another row, or champion (the same row of the run whose model is champion now)."
    )
    margin: float = Field(default=0.0, description="Lead over the baseline that is needed; may be negative.")
    significant: bool = Field(
        default=False, description="The lead must be marked as significant (paired bootstrap, Holm's correction)."
    )

    @model_validator(mode="after")
    def _says_something(self) -> Condition:
        if self.at_least is None and self.at_most is None and self.baseline is None:
            raise ValueError("a condition needs at_least, at_most or baseline")
        if self.significant and (self.baseline is None or self.metric != "avg"):
            raise ValueError("significant needs a baseline, and the metric avg")
        if self.baseline is not None and self.metric in _COSTS:
            raise ValueError(f"a lead means a higher value, which for {self.metric} is worse: use at_most")
        if self.margin and self.baseline is None:
            raise ValueError("margin needs a baseline: without one nobody is led")
        return self


class PromotionSpec(_Model):
    """What `moepipe promote RUN` demands before a model becomes champion."""

    model: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        description="Name in the registry; null: what the deploy stage's register_as says.",
    )
    stage: str | None = Field(
        default=None,
        description="Stage whose model is promoted (of the first seed); null: what the deploy stage names.",
    )
    conditions: list[Condition] = Field(min_length=1, description="All of them must hold.")


class StageSpec(_Model):
    """One stage of the pipeline."""

    kind: str = Field(description="Which stage this is: a file of orchestrator/stages.")
    description: str = Field(default="", description="For people.")
    inputs: dict[str, str | list[str]] = Field(
        default_factory=dict,
        description="Port name -> ${stages.NAME}, or a list of them for ports that take many artifacts.",
    )
    config: dict[str, Any] = Field(default_factory=dict, description="The stage kind's own settings.")
    resources: Resources = Field(default_factory=Resources, description="What one member takes from the cluster.")
    retry: Retry = Field(default_factory=Retry, description="How often a member is started again, by cause.")
    min_success: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Part of the fan-out (0, 1] that must succeed for the stage to count as done.",
    )
    timeout_s: float | None = Field(
        default=None, gt=0, description="Seconds after which a member is stopped; null: never. Not with --on inline."
    )
    seed_name: StageName | None = Field(
        default=None,
        description="Name from which seeds derive; stages that agree in it, kind, config and inputs share artifacts. "
        "null: the stage's own name.",
    )


class PipelineSpec(_Model):
    """A whole pipeline, ready to become a graph."""

    apiVersion: Literal["moepipe/v1"] = Field(description="Version of this format: moepipe/v1.")
    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100, description="Short name; begins the ids of its runs."
    )
    description: str = Field(default="", description="For people.")
    dataset: str | None = Field(
        default=None, description="Dataset name (`moepipe data ls`), for stages that refer to ${dataset}."
    )
    dataset_options: dict[str, Any] = Field(
        default_factory=dict, description="Choices of the dataset (held-out domain, fold, ...), see `moepipe explain`."
    )
    scale: Scale = Field(
        default="dev", description="How much work: smoke (seconds), dev, paper; stages refer to ${scale}."
    )
    seeds: list[Seed] = Field(
        default_factory=lambda: [0], min_length=1, description="Every per-seed stage runs once for each."
    )
    params: dict[str, Any] = Field(default_factory=dict, description="Your own variables, for ${params.NAME}.")
    tracking: TrackingSpec = Field(default_factory=TrackingSpec, description="Mirror to MLflow.")
    promotion: PromotionSpec | None = Field(default=None, description="The gate of `moepipe promote`.")
    stages: dict[StageName, StageSpec] = Field(min_length=1, description="The stages by name.")

    def canonical(self) -> str:
        """JSON text with sorted keys and no spaces: equal specs give equal bytes. Kept in the run record."""
        return json.dumps(
            self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )


def spec_from_record(text: str | bytes) -> PipelineSpec:
    """The spec that :meth:`PipelineSpec.canonical` wrote, so that a run resumes without its YAML.

    Raises:
        SpecError: the text is not such a record, or was written by an incompatible version.
    """
    try:
        return PipelineSpec.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the text"
        raise SpecError(
            f"The pipeline in the run record cannot be read: {where}: {first['msg']}.",
            "It was written by another version of moepipe; submit the YAML again.",
        ) from None
