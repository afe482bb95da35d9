"""m2mKD: module-to-module knowledge distillation for modular transformers.

Paper: Lo et al., arXiv 2402.16918. Public code: kamanphoebe/m2mKD, commit 067fa1f. Equation: for each position i of a
frozen meta model, ``(1 - alpha) * CE(z_S, y) + alpha * tau^2 * KL(z_T || z_S)`` between the hybrids that hold the
teacher's module i and the student's (``moe.conversion.teaching``). Phases, in order: ``pt`` (meta model), ``mt``
(teacher modules inside it), ``ft`` (assembled teacher), the split, ``student`` (teaching pairs), the assembly, ``e2e``,
``fs`` (few-shot).

- Parity: hyper-parameters of every phase, KL divided by batch x classes, decay rules (see ``_m2mkd_presets``).
- Differs: rates follow the epoch that runs; ``parity: official`` brings the ViT trainer's lag of one epoch back.
- Differs: stitches have the meta model's width; the documented 1024 does not fit the 1280 of a ViT-H.
- Differs: depths of teacher and meta model are checked against each other; the documented list of nine is not ten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from moe.algorithms._m2mkd_config import Assembly, Config, PhaseName
from moe.algorithms._m2mkd_phases import Augmentation, Phase
from moe.algorithms._m2mkd_presets import PRESETS
from moe.algorithms.base import Algorithm, Group
from moe.conversion.kd_specs import KDSpec
from moe.errors import SpecError
from moe.models.nac.specs import CircuitSpec, StudentSpec
from moe.models.vit_specs import ViTSpec, VMoESpec, student_specs

if TYPE_CHECKING:
    from torch import Tensor, nn

    from moe.adaptation.base import Adaptation
    from moe.conversion.modules import Assembled
    from moe.conversion.teaching import TeachingPairs
    from moe.losses import Losses

__all__ = ["PRESETS", "Assembly", "Augmentation", "Config", "Method", "Phase", "PhaseName"]


class Method(Algorithm[Config]):
    """One phase of m2mKD. Split and assembly, which train nothing, are methods of their own."""

    Config = Config
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS

    def build(self, num_outputs: int) -> nn.Module:
        """The module of the phase with fresh weights, its head with ``num_outputs`` classes.

        pt, ft: a ViT. mt: a hybrid. student: :class:`moe.conversion.teaching.TeachingPairs` whose frozen parts are
        random too (:meth:`build_pairs` takes their weights). e2e, fs: a V-MoE or a circuit.
        """
        from moe.conversion.incubation import hybrid_module

        config, drop = self.config, self.config.training.drop_path
        fields = {"num_classes": num_outputs, "drop_path": drop}
        if config.phase == "student":
            return self.build_pairs(num_outputs)
        if config.phase == "mt":
            meta, teacher = (spec.model_copy(update=fields) for spec in (config.meta, config.teacher))
            return hybrid_module(meta, teacher, config.positions[0])
        return self._network(num_outputs, fields)

    def _network(self, num_outputs: int, fields: dict[str, Any]) -> nn.Module:
        from moe.models.vit_stages import ViTStages
        from moe.models.vmoe import VMoE

        config = self.config
        if config.phase in ("pt", "ft"):
            return ViTStages((config.meta if config.phase == "pt" else config.teacher).model_copy(update=fields))
        if config.vmoe is not None:
            return VMoE(self.final_spec(num_outputs))
        from moe.models.nac.circuit import build_circuit

        fields = {**(config.circuit.model_dump() if config.circuit else {}), "output_dim": num_outputs}
        return build_circuit(CircuitSpec.model_validate(fields), config.seed)

    def final_spec(self, num_outputs: int) -> VMoESpec:
        """The assembled V-MoE, with or without the stitches of its students."""
        from moe.models.vit_specs import stitched

        config = self.config
        if config.vmoe is None:
            raise SpecError("The modular model of these settings is a circuit.", "See config.circuit.")
        fields = {"num_classes": num_outputs, "drop_path": config.training.drop_path}
        spec = config.vmoe.model_copy(update=fields)
        return stitched(spec, config.meta.dim) if config.assemble.keep_stitches else spec

    def build_students(self, num_outputs: int) -> dict[int, nn.Module]:
        """Fresh student modules by position; their head, if any, has ``num_outputs`` classes."""
        config, drop = self.config, self.config.student.drop_path
        if config.vmoe is not None:
            from moe.models.vmoe import VMoE

            specs = student_specs(config.vmoe, config.meta.dim)
            fields = {"num_classes": num_outputs, "drop_path": drop}
            return {p: VMoE(specs[p].model_copy(update=fields)) for p in config.positions}
        from moe.models.nac.students import build_student

        found: dict[int, nn.Module] = {}
        for place in config.positions:
            spec = self.circuit_student(place, num_outputs)
            found[place] = build_student(spec, config.seed * len(config.meta.depths) + place)
        return found

    def circuit_student(self, position: int, num_outputs: int) -> StudentSpec:
        """The spec of a circuit's module; stitches have the meta model's width.

        Raises:
            SpecError: ``config.circuit_students`` has no such section, or values that do not fit.
        """
        config = self.config
        names = {0: "readin", len(config.meta.depths) - 1: "readout"}
        name = names.get(position, "mediator")
        spec = StudentSpec.from_official(config.circuit_students or {}, name, config.meta.dim)
        fields: dict[str, Any] = {"output_dim": num_outputs} if name == "readout" else {}
        if name == "mediator":
            fields["path_drop_prob"] = config.student.drop_path
        return spec.model_copy(update=fields)

    def build_pairs(
        self,
        num_outputs: int,
        meta_state: Mapping[str, Tensor] | None = None,
        teacher_states: Mapping[int, Mapping[str, Tensor]] | None = None,
    ) -> TeachingPairs:
        """The teaching pairs of ``config.positions``, with frozen meta model and teacher modules.

        Args:
            num_outputs: classes K.
            meta_state: weights of the meta model (plain names); random when left out.
            teacher_states: weights of the teacher's modules by position (stage-local names); random when left out.

        Raises:
            CheckpointError: weights that do not fit, by name.
        """
        from moe.conversion.teaching import TeachingPair, TeachingPairs
        from moe.keymaps.m2mkd import check_weights
        from moe.models.vit_stages import ViTStages

        def network(spec: ViTSpec, state: Mapping[str, Tensor] | None, what: str) -> ViTStages:
            module = ViTStages(spec)
            if state is not None:
                check_weights(state, spec, what)
                module.load_state_dict(state)
            return module

        config = self.config
        meta_spec = config.meta.model_copy(update={"num_classes": num_outputs})
        teacher_spec = config.teacher.model_copy(update={"num_classes": num_outputs})
        meta = network(meta_spec, meta_state, "The meta model")
        pairs = []
        for place, student in self.build_students(num_outputs).items():
            state = teacher_states.get(place) if teacher_states is not None else None
            if teacher_states is not None and state is None:
                raise SpecError(f"There are no weights of teacher module {place}.", "Give every position's module.")
            teacher = network(teacher_spec.stage(place), state, f"Teacher module {place}")
            pairs.append(TeachingPair(meta, teacher, student, place, config.loss))
        return TeachingPairs(pairs)

    def loss(self, module: nn.Module, batch: tuple[Tensor, Tensor]) -> Losses:
        """Losses of ``(images [B, C, H, W], soft labels [B, K] or classes [B])``; parts by pair for students."""
        from moe.conversion.kd import kd_loss
        from moe.conversion.teaching import TeachingPairs

        images, target = batch
        if isinstance(module, TeachingPairs):
            losses = module.losses(module(images), target)
        else:
            losses = kd_loss(module(images), None, target, KDSpec(kind="none"))
        return self.with_auxiliary(module, losses)

    def with_auxiliary(self, module: nn.Module, losses: Losses) -> Losses:
        """``losses`` of a forward pass of ``module``, plus balance losses and regulariser if the settings have them."""
        from moe.losses import Losses

        extra = self._auxiliary(module)
        total = losses.total + sum(extra.values()) if extra else losses.total
        return Losses(total, {**losses.parts, **{name: value.detach() for name, value in extra.items()}})

    def _auxiliary(self, module: nn.Module) -> dict[str, Tensor]:
        """Weighted balance losses of expert layers, and the circuit's regulariser."""
        import torch

        config = self.config
        if config.vmoe is not None and config.vmoe.balance_weight > 0:
            from moe.layers.layer import collect_balance

            found = collect_balance(module)
            return {"balance": config.vmoe.balance_weight * torch.stack(found).sum()} if found else {}
        if config.graph_sparsity is not None and config.phase == "e2e":
            from moe.models.nac.regularizers import RegularizerSpec, graph_regularizer

            spec = RegularizerSpec.model_validate(config.graph_sparsity)
            return {"graph_sparsity": spec.weight * graph_regularizer(module, spec)}  # type: ignore[arg-type]
        return {}

    def param_groups(self, module: nn.Module) -> list[Group]:
        """Trainable parameters by decay (and by layer, where the phase has a layer-wise rate)."""
        from moe.param_groups import decay_groups, layer_decay_groups

        phase = self.config.training
        if phase.only is not None:
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(phase.only in name and parameter.requires_grad)
        if phase.decay == "all":
            chosen = [p for p in module.parameters() if p.requires_grad]
            return [Group("all", chosen, phase.scaled_lr, phase.weight_decay)]
        if phase.layer_decay < 1:
            depth = len(module.blocks)  # type: ignore[arg-type]
            return layer_decay_groups(module, phase.scaled_lr, phase.weight_decay, phase.layer_decay, depth)
        return decay_groups(module, phase.scaled_lr, phase.weight_decay)

    def split(self, state: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """The teacher's modules from the weights of the whole teacher."""
        from moe.conversion.modules import split_state

        return split_state(state, self.config.teacher.depths)

    def assemble(self, module: nn.Module, students: Sequence[Mapping[str, Tensor]]) -> Any:
        """Load the trained students, in order of position, into the model of phase ``e2e``.

        Returns:
            A report: ``moe.conversion.modules.Assembled`` for a V-MoE, ``AssemblyReport`` for a circuit.

        Raises:
            CheckpointError: students that do not fit, by tensor.
        """
        config = self.config
        if config.vmoe is not None:
            return self._assemble_vmoe(module, students)
        from moe.models.nac.assembly import assemble_circuit, student_files

        files = student_files(len(config.meta.depths) - 2)
        if len(students) != len(files):
            raise SpecError(f"{len(students)} students for {len(files)} positions.", "Give one per position.")
        named = dict(zip(files, students, strict=True))
        return assemble_circuit(module, named, config.assemble.student_type, config.assemble.resize_grid)  # type: ignore[arg-type]

    def _assemble_vmoe(self, module: nn.Module, students: Sequence[Mapping[str, Tensor]]) -> Assembled:
        from moe.conversion.modules import assemble_stages, load_assembled

        spec: VMoESpec = module.spec  # type: ignore[assignment]
        assembled = assemble_stages(students, spec.depths, spec.pre_stitch, spec.post_stitch)
        load_assembled(module, assembled)
        return assembled

    def adaptation(self) -> Adaptation[Any]:
        """The method does not adapt."""
        from moe.adaptation.base import make

        return make("none", task=self.task)
