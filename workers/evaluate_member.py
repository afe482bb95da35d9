"""The member of the ``evaluate`` stage: load what is wired, evaluate, write the records and their headline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe.errors import SpecError
from workers.context import Context, Input, run_seed
from workers.datasets.base import DomainData
from workers.device import setup
from workers.evaluation import EvaluationOptions, evaluate_methods
from workers.evaluation_methods import Method, Models, TokenSource, adaptation_of, slug, standard_methods
from workers.evaluation_result import EvaluationResult
from workers.features import FeatureTable
from workers.loop import mix
from workers.modelfile import load_aggregator, load_student
from workers.protocols import domain_rows
from workers.transforms import Transform, TransformSpec, transform_for

if TYPE_CHECKING:
    import torch

    from moe.adaptation.base import Adaptation


@dataclass(frozen=True)
class EvaluateSettings:
    """Fields of the ``evaluate`` stage's config; see there."""

    split: str
    protocol: str
    support: int
    adaptations: Mapping[str, Mapping[str, Mapping[str, Any]]]
    limit: int | None = None
    curve: Sequence[int] = field(default_factory=tuple)
    streams: Sequence[str] = field(default_factory=tuple)
    replicates: int = 1000
    image_size: int | None = None
    official_rxrx1: bool = False
    batch_size: int = 128
    labels: Mapping[str, str] = field(default_factory=dict)


def evaluate_member(data: DomainData, settings: EvaluateSettings, context: Context) -> dict[str, Any]:
    """Evaluate what is wired to the member and write ``evaluation.json`` and ``logits.safetensors``.

    Raises:
        SpecError: nothing to evaluate, or an adaptation without its network.
        CheckpointError: damaged weights.
        DataError: a corrupt image.
    """
    device = setup(context.threads).device
    wired = _Wired(context, device)
    models, teacher = wired.models()
    adaptations = _adaptations(settings, wired, data.info.task)
    methods = standard_methods(models, adaptations, data.info.task, settings.labels)
    if not methods:
        raise SpecError("There is nothing to evaluate.", "Wire erm, student, aggregator or oracle to the stage.")
    for row in _left_out(adaptations, methods, settings.labels):
        context.log(f"{row} is left out: the network has no BatchNorm, or the task is a regression.")
    transform = _transform(data, settings, wired)
    result = evaluate_methods(
        data,
        domain_rows(data, settings.split, settings.protocol, settings.support, settings.limit),
        methods,
        transform,
        EvaluationOptions(
            split=settings.split,
            protocol=settings.protocol,
            support_size=settings.support,
            seed=mix(context.seed, 21),
            run_seed=run_seed(context.member),
            batch_size=settings.batch_size,
            replicates=settings.replicates,
            curve_sizes=tuple(settings.curve),
            streams=tuple(settings.streams),
            settings=wired.budgets(),
        ),
        context,
        aggregator=teacher,
        tokens=wired.tokens() if teacher is not None or models.aggregator is not None else None,
        device=device,
        timings=context.metrics,
    )
    result.save(context.output)
    headline = _headline(result)
    context.metrics({f"test/{name}": value for name, value in headline.items()})
    return {
        "dataset": data.info.name,
        "metric": data.info.selection_metric,
        "protocol": settings.protocol,
        "scores": {name: round(value, 6) for name, value in headline.items()},
        "miniature": "_miniature" in data.value_names,
    }


class _Wired:
    """The artifacts at the stage's ports."""

    def __init__(self, context: Context, device: torch.device) -> None:
        self.inputs, self.device = context.inputs, device

    def one(self, port: str) -> Input | None:
        found = self.inputs.get(port, ())
        return found[0] if found else None

    def models(self) -> tuple[Models, Any]:
        """The networks of the table, and the student's teacher."""
        student, pretrained = self.one("student"), self.one("aggregator")
        models = Models(
            erm=self._network("erm"),
            student=None if student is None else load_student(student.path, student.meta).to(self.device),
            aggregator=None if pretrained is None else load_aggregator(pretrained.path, pretrained.meta),
            oracle=self._network("oracle"),
        )
        teacher = None if student is None else load_aggregator(student.path, student.meta).to(self.device)
        if models.aggregator is not None:
            models.aggregator.to(self.device)
        return models, teacher

    def _network(self, port: str) -> Any:
        """A baseline as a student, so that every adaptation can address its tensors; the same function of the image.

        A DenseNet classifier has a ReLU that its student view leaves out; it is put back for a baseline.
        """
        artifact = self.one(port)
        if artifact is None:
            return None
        meta = dict(artifact.meta)
        if meta["form"] == "classifier" and meta["backbone"]["name"].startswith("torchvision:densenet"):
            meta["backbone"] = {**meta["backbone"], "last_relu": True}
        return load_student(artifact.path, meta).to(self.device)

    def tokens(self) -> TokenSource:
        """Cached features first, experts for other rows."""
        features, experts = self.inputs.get("features", ()), self.inputs.get("experts", ())
        table = FeatureTable([Path(artifact.path) for artifact in features]) if features else None
        extractors = [load_student(artifact.path, artifact.meta).to(self.device).extract for artifact in experts]
        return TokenSource(
            table, extractors, [f"expert {number}" for number in range(max(len(features), len(experts)))]
        )

    def image_sizes(self) -> list[int | None]:
        """Sides of the images that the networks were trained on; None is the official size."""
        return [artifact.meta.get("image_size") for artifact in self.networks()]

    def transform(self) -> Transform | None:
        """The preprocessing that the network was trained behind, where its record says so."""
        records = [artifact.meta["transform"] for artifact in self.networks() if "transform" in artifact.meta]
        if any(record != records[0] for record in records):
            raise SpecError("The networks want different preprocessing.", "Evaluate them in a stage each.")
        return Transform(TransformSpec(**records[0])) if records else None

    def networks(self) -> list[Input]:
        """The networks that see images."""
        found = (self.one(port) for port in ("student", "erm", "oracle"))
        return [artifact for artifact in found if artifact is not None]

    def budgets(self) -> dict[str, Any]:
        """Steps that each network was trained for, for the record."""
        ports = ("erm", "aggregator", "student", "oracle")
        found = {port: self.one(port) for port in ports}
        return {f"{port}_steps": a.meta["steps"] for port, a in found.items() if a is not None and "steps" in a.meta}


def _transform(data: DomainData, settings: EvaluateSettings, wired: _Wired) -> Transform:
    """Preprocessing of the images: what the networks were trained behind, or as the settings say.

    Raises:
        SpecError: settings that the networks' own preprocessing leaves without effect, or networks that want different
            images.
    """
    if settings.official_rxrx1 and data.info.name != "rxrx1":
        raise SpecError(f"official_rxrx1 is about rxrx1; the data set is {data.info.name}.", "Leave it out.")
    own = wired.transform()
    if own is not None:
        if settings.image_size is not None or settings.official_rxrx1:
            name = "official_rxrx1" if settings.image_size is None else f"image_size={settings.image_size}"
            raise SpecError(
                f"{name} has no effect here: the network's record says behind which preprocessing it was trained.",
                "Leave it out.",
            )
        strangers = [artifact for artifact in wired.networks() if "transform" not in artifact.meta]
        wanted = [transform_for(data.info, a.meta.get("image_size"), train=False) for a in strangers]
        if any(_colours(transform, data) != _colours(own, data) for transform in wanted):
            raise SpecError("The networks want different preprocessing.", "Evaluate them in a stage each.")
        return own
    sizes = [settings.image_size] if settings.image_size is not None else wired.image_sizes() or [None]
    found = [transform_for(data.info, size, train=False, official_rxrx1_eval=settings.official_rxrx1) for size in sizes]
    if len({transform.identity for transform in found}) > 1:
        told = ", ".join("the official size" if size is None else f"{size} pixels" for size in sizes)
        raise SpecError(
            f"The networks were trained on images of several sizes ({told}).",
            "Evaluate them in a stage each, or set image_size.",
        )
    return found[0]


def _colours(transform: Transform, data: DomainData) -> TransformSpec:
    """What a transform does, the number of channels written out."""
    return transform.spec.model_copy(update={"channels": transform.spec.channels or data.info.channels})


def _adaptations(settings: EvaluateSettings, wired: _Wired, task: str) -> dict[str, dict[str, Adaptation[Any]]]:
    """Adaptations of the networks that are wired; ``distill`` starts from what the student was meta-trained for."""
    found: dict[str, dict[str, Adaptation[Any]]] = {}
    for owner, kinds in settings.adaptations.items():
        artifact = wired.one(owner)
        if artifact is None:
            continue
        found[owner] = {}
        for name, options in kinds.items():
            own = dict(options)
            if name == "distill":
                learned: Mapping[str, Any] = artifact.meta.get("adaptation", {})
                without = [key for key in ("inner_lr", "adapt") if key in own]
                if learned.get("rates") and "rates" not in own and without:
                    raise SpecError(
                        f"distill has {without[0]}={own[without[0]]!r}, but the student learned a rate for each "
                        "tensor, which replaces it.",
                        f"Leave {without[0]} out, or set rates: {{}} beside it to adapt without the learned rates.",
                    )
                mine = {k: v for k, v in learned.items() if k in ("inner_lr", "adapt", "rates")}
                own = {**mine, "steps": learned.get("inner_steps", 1), **own}
            found[owner][name] = adaptation_of(name, own)
    return found


def _left_out(
    adaptations: Mapping[str, Mapping[str, Any]], methods: Sequence[Method], labels: Mapping[str, str]
) -> list[str]:
    """Adaptations that were asked for and make no sense for their network: no rows of the table."""
    made = {method.name for method in methods}
    asked = [
        f"{slug(labels[owner]) if owner in labels else owner}_{kind}"
        for owner, kinds in adaptations.items()
        for kind in kinds
        if kind != "none"
    ]
    return [row for row in asked if row not in made]


def _headline(result: EvaluationResult) -> dict[str, float]:
    """Selection metric and worst domain by method, under stable names."""
    values: dict[str, float] = {}
    for method in result.methods:
        values[f"{method.name}/{result.metric}"] = float(method.scores[result.metric])
        values[f"{method.name}/worst_domain"] = float(method.domain_worst)
    return values
