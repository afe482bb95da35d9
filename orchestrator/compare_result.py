"""What a comparison is made of: one observation for each run, method and seed; settings that make them comparable.

Plain records without numpy, so that commands which only pass them on stay light.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Setting:
    """What must be equal for scores to be comparable.

    Attributes:
        dataset: name of the data set.
        options: its options but for the held-out domain, as one text.
        protocol: name of the protocol, with the number of images that may be adapted on.
        split: what is scored.
        metric: name of the score of a domain.
    """

    dataset: str
    options: str
    protocol: str
    split: str
    metric: str

    def differences(self, other: Setting) -> list[str]:
        """In words, what is different."""
        names = {
            "dataset": "data set",
            "options": "options of the data set",
            "protocol": "protocol",
            "split": "split",
            "metric": "metric",
        }
        pairs = [(word, getattr(self, name), getattr(other, name)) for name, word in names.items()]
        return [f"{word}: {mine or 'none'} and {theirs or 'none'}" for word, mine, theirs in pairs if mine != theirs]

    @property
    def title(self) -> str:
        """One line for notes."""
        options = f" ({self.options})" if self.options else ""
        return f"{self.dataset}{options}, {self.protocol}, {self.split}, {self.metric.replace('_', ' ')}"


@dataclass(frozen=True)
class ModelCost:
    """Of one model; None where the run did not record it.

    Attributes:
        parameters: all of them.
        active_parameters: those that one image uses on average.
        flops: floating point operations of one image, with the experts that it really uses.
        latency_ms: of one image at a time; depends on the machine.
    """

    parameters: float | None = None
    active_parameters: float | None = None
    flops: float | None = None
    latency_ms: float | None = None


@dataclass(frozen=True)
class Hours:
    """Device-hours of everything that a model was made from; ``missing`` counts members whose time is unknown."""

    device: str
    hours: float
    missing: int = 0


@dataclass(frozen=True)
class Observation:
    """One method of one evaluation.

    Attributes:
        run, node, digest: where it stands.
        method: stable name of the model, e.g. ``erm`` or ``GMoE``.
        adaptation: name of the test-time adaptation; empty for none.
        label: for people.
        selection: rule by which the model was selected.
        seed: seed or trial.
        setting: what must be equal to compare.
        data: digest of the data set as it was prepared, and its held-out choice; equal where rows are equal.
        config: settings of the stages that made it.
        identity: the same as one text: rows of equal identity are seeds of one method.
        domains: score by domain, a share.
        percent: scores are shares that are printed as per cent.
        scores: other scores over all rows.
        cost: of the model.
        hours: of its training; None: unknown.
        steps: updates that it was trained for.
        examples: (folder, tensor, data folder) of the stored predictions, or None.
        counts: scored rows of each domain, in the order of ``domains``.
        scale: of the run.
        miniature: the data is generated.
    """

    run: str
    node: str
    digest: str
    method: str
    adaptation: str
    label: str
    selection: str
    seed: int
    setting: Setting
    data: str
    config: Mapping[str, Mapping[str, Any]]
    identity: str
    domains: Mapping[str, float]
    percent: bool = True
    scores: Mapping[str, float] = field(default_factory=dict)
    cost: ModelCost = field(default_factory=ModelCost)
    hours: Hours | None = None
    steps: int | None = None
    examples: tuple[Path, str, Path] | None = None
    counts: tuple[int, ...] = ()
    scale: str = "dev"
    miniature: bool = False

    @property
    def name(self) -> str:
        """Method and adaptation in one word."""
        return f"{self.method}_{self.adaptation}" if self.adaptation else self.method


@dataclass(frozen=True)
class Options:
    """What is compared and how.

    Attributes:
        metric: ``avg`` (mean over domains), ``worst`` (worst domain) or the name of a score over all rows.
        baseline: a row, by its method's name, or a run, against which every row is tested; empty: ERM if it is there.
        selection: only this selection rule; empty: all.
        allow_different: compare what should not be compared, and mark it.
        level: what the bootstrap resamples besides seeds; ``auto`` takes the finest that is stored.
        replicates: resamples.
        watts: of one device, for an energy estimate; None: no estimate.
    """

    metric: str = "avg"
    baseline: str = ""
    selection: str = ""
    allow_different: bool = False
    level: str = "auto"
    replicates: int = 2000
    watts: float | None = None
