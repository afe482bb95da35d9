"""All settings of m2mKD: which networks, which phase, how it trains. Torch-free."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from moe.algorithms._m2mkd_phases import Augmentation, Phase
from moe.algorithms.base import Settings
from moe.conversion.kd_specs import KDSpec
from moe.models.nac.specs import CircuitSpec
from moe.models.vit_specs import ViTSpec, VMoESpec, position_of

PhaseName = Literal["pt", "mt", "ft", "student", "e2e", "fs"]


class Assembly(Settings):
    """How students become one model."""

    keep_stitches: bool = Field(default=False, description="V-MoE: the stitches between stages stay in the model.")
    student_type: Literal["imagenet", "tinynet"] = Field(
        default="imagenet", description="Circuit: tinynet loads neither position grid nor classifier."
    )
    resize_grid: bool = Field(default=False, description="Circuit: resize the position grid instead of leaving it out.")


class Config(Settings):
    """All settings of an m2mKD run; ``phase`` and ``position`` say which part of it this is."""

    phase: PhaseName = Field(default="student", description="What build, loss and param_groups are about.")
    position: int | None = Field(
        default=None, ge=-1, description="Module of the phases mt and student; null in student: all in one process."
    )
    teacher: ViTSpec = Field(description="Deep teacher; its depths are the split into modules.")
    meta: ViTSpec = Field(description="Shallow meta model with as many stages.")
    vmoe: VMoESpec | None = Field(default=None, description="The modular model, if it is a V-MoE.")
    circuit: CircuitSpec | None = Field(default=None, description="The modular model, if it is an attentive circuit.")
    circuit_students: dict[str, dict[str, Any]] | None = Field(
        default=None, description="Circuit: sections share_kwargs, readin, mediator, readout of a student YAML file."
    )
    graph_sparsity: dict[str, Any] | None = Field(
        default=None, description="Circuit: criterion.graph_sparsity (moe.models.nac.regularizers.RegularizerSpec)."
    )
    loss: KDSpec = Field(default_factory=KDSpec, description="Label against teacher in the student phase.")
    assemble: Assembly = Field(default_factory=Assembly, description="From students to the model.")
    pt: Phase = Field(description="Training of the meta model.")
    mt: Phase = Field(description="Training of one teacher module inside the meta model.")
    ft: Phase = Field(description="Fine-tuning of the assembled teacher.")
    student: Phase = Field(description="Training of the student modules.")
    e2e: Phase = Field(description="Training of the assembled modular model.")
    fs: Phase | None = Field(default=None, description="Few-shot training of the head, if there is such a phase.")
    augment: Augmentation = Field(default_factory=Augmentation, description="Images and labels of every phase.")
    seed: int = Field(default=0, ge=0, description="Seed; the reference adds the rank.")
    parity: Literal["official", "fixed"] = Field(
        default="fixed", description="official repeats the scheduler's lag in the phases of the ViT trainer."
    )

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if (self.vmoe is None) == (self.circuit is None):
            raise ValueError("give either vmoe or circuit")
        count = len(self.meta.depths)
        if len(self.teacher.depths) != count:
            raise ValueError(f"teacher.depths={self.teacher.depths} has not the {count} stages of {self.meta.depths}.")
        for name in ("dim", "num_classes", "image_size", "patch_size"):
            theirs, own = getattr(self.teacher, name), getattr(self.meta, name)
            if theirs != own:
                raise ValueError(f"teacher.{name}={theirs} must equal meta.{name}={own}.")
        modules = len(self.vmoe.depths) if self.vmoe else self._circuit_modules()
        if modules != count:
            raise ValueError(f"The model has {modules} modules and the meta model {count} stages.")
        if self.position is not None and not -1 <= self.position < count:
            raise ValueError(f"position={self.position} of {count} modules; use 0 to {count - 1}, or -1.")
        if self.phase == "mt" and self.position is None:
            raise ValueError("phase mt trains one module: give position.")
        if self.phase == "fs" and self.fs is None:
            raise ValueError("phase fs needs the settings fs.")
        return self

    def _circuit_modules(self) -> int:
        graph = self.circuit.latent_graph_kwargs if self.circuit else None
        if graph is None or self.circuit_students is None:
            raise ValueError("a circuit needs circuit_students, the settings of its modules.")
        return graph.num_iterations + 2

    @property
    def training(self) -> Phase:
        """Settings of the phase, with ``parity`` applied."""
        found = getattr(self, self.phase)
        lags = self.parity == "official" and not (self.circuit is not None and self.phase in ("e2e", "fs"))
        result: Phase = found.model_copy(update={"scheduler_lag": lags or found.scheduler_lag})
        return result

    @property
    def positions(self) -> list[int]:
        """Modules that the phase trains."""
        count = len(self.meta.depths)
        return list(range(count)) if self.position is None else [position_of(self.position, count)]
