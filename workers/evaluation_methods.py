"""The methods that an evaluation compares, and where experts' tokens come from.

A method is a network, optionally with an adaptation of ``moe.adaptation`` in front of it. All are shown the same rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from moe.errors import SpecError
from workers.batches import ImageReader
from workers.datasets.base import IntArray

if TYPE_CHECKING:
    from moe.adaptation.base import Adaptation
    from moe.aggregator import Aggregator
    from moe.specs import BackboneSpec
    from moe.student import Student
    from workers.features import FeatureTable

LABELS: Mapping[str, str] = {
    "erm": "ERM",
    "aggregator": "aggregator alone",
    "student": "student",
    "oracle": "oracle (saw labelled target domains)",
}
ADAPTATION_LABELS: Mapping[str, str] = {"bn": "BN", "tent": "Tent", "eata": "EATA", "distill": "distillation"}


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: stable, e.g. ``erm_tent``.
        label: for people.
        model: images (or tokens) to logits.
        adaptation: applied once per domain; None predicts with ``model`` as it is.
        reference: name of the method without the adaptation.
        reads: ``images``, or ``tokens`` of all experts (the aggregator alone).
    """

    name: str
    label: str
    model: nn.Module
    adaptation: Adaptation[Any] | None = None
    reference: str = ""
    reads: Literal["images", "tokens"] = "images"


@dataclass(frozen=True)
class Models:
    """The networks of one seed; all on one device and in evaluation mode. What is None is left out of the table.

    Attributes:
        erm: the baseline; as :func:`baseline_student` makes it, so that it can be adapted.
        student: after meta-distillation.
        aggregator: its teacher.
        oracle: trained with labels of the test domains: the ceiling.
    """

    erm: Student | None = None
    student: Student | None = None
    aggregator: Aggregator | None = None
    oracle: nn.Module | None = None


def standard_methods(
    models: Models,
    adaptations: Mapping[str, Mapping[str, Adaptation[Any]]],
    task: str,
    labels: Mapping[str, str] | None = None,
) -> list[Method]:
    """The rows of the table in their order: ERM and its adaptations, aggregator, student and its adaptations, oracle.

    Args:
        models: what there is.
        adaptations: ``erm`` or ``student`` -> registry name -> adaptation (taken over to ``task``).
        task: ``regression`` leaves out Tent (no predicted distribution); ``bn`` is left out without BatchNorm.
        labels: ``erm`` and so on -> what that network is called instead; its rows are named after it too.

    Raises:
        SpecError: an adaptation is given for a network that is not there.
    """
    unknown = [owner for owner in adaptations if owner not in ("erm", "student")]
    if unknown:
        raise SpecError(f"Adaptations are given for {unknown[0]!r}.", "Only 'erm' and 'student' can be adapted.")
    methods: list[Method] = []
    for name in ("erm", "aggregator", "student", "oracle"):
        model = getattr(models, name)
        wanted = dict(adaptations.get(name, {}))
        if model is None:
            if wanted:
                raise SpecError(f"There is no {name} to adapt with {', '.join(wanted)}.", f"Give the {name} model too.")
            continue
        label = (labels or {}).get(name, LABELS[name])
        row = slug(label) if labels and name in labels else name
        methods.append(Method(row, label, model, reads="tokens" if name == "aggregator" else "images"))
        for kind, adaptation in wanted.items():
            impossible = (kind == "tent" and task == "regression") or (kind == "bn" and not has_batch_norm(model))
            if kind == "none" or impossible:
                continue
            both = f"{label} + {ADAPTATION_LABELS.get(kind, kind)}"
            fitting = adaptation if adaptation.task == task else type(adaptation)(adaptation.config, task)
            methods.append(Method(f"{row}_{kind}", both, model, fitting, reference=row))
    return methods


def slug(label: str) -> str:
    """A stable name made of a label: ``Meta-DMoE (GMoE)`` is ``meta_dmoe_gmoe``."""
    return re.sub(r"[^a-z0-9]+", "_", label.lower()).strip("_")


@dataclass
class TokenSource:
    """Experts' features ``[B, E, D]`` by row: from the cache where it has the row, computed otherwise.

    Attributes:
        table: cached features, or None.
        experts: extractors ``images -> [B, D]``, for rows that are not cached; may be empty when everything is.
        names: of the experts, for plots.
        rows_computed: how many rows had to be computed (grows).
    """

    table: FeatureTable | None = None
    experts: Sequence[Callable[[Tensor], Tensor]] = ()
    names: Sequence[str] = ()
    rows_computed: int = field(default=0, compare=False)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.table.num_experts if self.table is not None else len(self.experts)

    @property
    def labels(self) -> list[str]:
        """Names of the experts; their numbers when none were given."""
        return list(self.names) or [str(index) for index in range(self.num_experts)]

    def __call__(self, rows: IntArray, read: Callable[[IntArray], Tensor], variants: IntArray | None) -> Tensor:
        """Tokens of ``rows``, float32, on the CPU when cached, else where the experts are.

        Args:
            rows: ``[B]``.
            read: rows -> images, called only when needed.
            variants: transform variant of each row, or None.

        Raises:
            SpecError: the cache lacks the rows and there are no experts to ask.
        """
        if self.table is not None and self.table.covers(rows):
            return self.table.tokens(rows, variants if self.table.variants > 1 else None)
        if not self.experts:
            raise SpecError(
                "The aggregator needs the experts' features of rows that are not cached, and there are no experts.",
                "Add the scored split to the `features` stage, or wire the experts to the evaluation.",
            )
        self.rows_computed += len(rows)
        images = read(rows)
        with torch.no_grad():
            return torch.stack([expert(images).float() for expert in self.experts], dim=1)


class ImageSource:
    """Transformed images by row on a device, with a fixed variant per row where the transform is random.

    Args:
        reader: of the data set's images under the evaluation transform.
        device: where the models are.
        count: rows of the data set.
        seed: draws the variants (official rxrx1 evaluation only).
    """

    def __init__(self, reader: ImageReader, device: torch.device, count: int, seed: int) -> None:
        self._reader, self.device = reader, device
        variants = reader.transform.variants
        self._variants = np.random.default_rng((seed, 8)).integers(variants, size=count) if variants > 1 else None

    def variants(self, rows: IntArray) -> IntArray | None:
        """Transform variant of each row; None when there is only one."""
        return None if self._variants is None else self._variants[rows]

    def __call__(self, rows: IntArray) -> Tensor:
        """Images ``[B, C, H, W]``."""
        return self._reader.read(rows, self.variants(rows)).to(self.device)


def adaptation_of(name: str, options: Mapping[str, Any] | None = None, task: str = "multiclass") -> Adaptation[Any]:
    """The adaptation ``name`` of the registry with its settings.

    Raises:
        SpecError: unknown name or settings.
    """
    from pydantic import ValidationError

    from moe.adaptation.base import ADAPTATIONS, make

    try:
        return make(name, options, task)
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        fields = ADAPTATIONS.load(name).Method.Config.model_fields
        raise SpecError(
            f"Adaptation {name!r} refuses its settings: {found}.", f"It takes: {', '.join(fields) or 'nothing'}."
        ) from None


def baseline_student(spec: BackboneSpec, num_outputs: int, state: Mapping[str, Tensor]) -> Student:
    """A classifier's weights as an adaptable student that gives the classifier's own logits.

    Differs: by default the student view of the DenseNet family has no ReLU after the last BatchNorm (parity with the
    public checkpoints); a classifier that was trained with it keeps it here.

    Args:
        spec: architecture.
        num_outputs: K.
        state: weights under the classifier's names.

    Raises:
        CheckpointError: the weights do not fit.
    """
    from moe.backbones import build_student, classifier_to_student

    dense = spec.name.startswith("torchvision:densenet")
    student = build_student(spec.model_copy(update={"last_relu": True}) if dense else spec, num_outputs)
    student.load_state_dict(classifier_to_student(spec, state))
    return student.eval()


def has_batch_norm(model: nn.Module) -> bool:
    """Whether ``model`` keeps BatchNorm statistics that ``bn`` could re-estimate."""
    norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return any(norm.running_mean is not None for norm in norms)
