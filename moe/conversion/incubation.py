"""Module training of a deep teacher (Deep Incubation): one deep stage inside a shallow meta model.

Stage i of the meta model is replaced by the teacher's stage i and trained end to end on the labels; every other stage
keeps the meta model's weights. Stages before i pass on values only, those after i pass gradients, and neither is in the
optimiser. The trained stages are put together by ``moe.conversion.modules.assemble_hybrids``.

Source: Ni et al., Deep Incubation (arXiv 2212.04129), phase MT of m2mKD (2402.16918, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from moe.conversion.modules import assemble_stages, load_assembled, split_state, stage_of
from moe.errors import SpecError
from moe.models.vit_specs import ViTSpec, position_of
from moe.models.vit_stages import ViTStages


def hybrid_spec(meta: ViTSpec, teacher: ViTSpec, position: int) -> ViTSpec:
    """The meta model with the teacher's depth at one stage.

    Raises:
        SpecError: different numbers of stages or widths, or no such position.
    """
    if len(meta.depths) != len(teacher.depths) or meta.dim != teacher.dim:
        raise SpecError(
            f"The meta model has {len(meta.depths)} stages of width {meta.dim}, the teacher {len(teacher.depths)} of "
            f"{teacher.dim}.",
            "Both need the same number of stages and the same width.",
        )
    place = position_of(position, len(meta.depths))
    depths = tuple(teacher.depths[i] if i == place else depth for i, depth in enumerate(meta.depths))
    return teacher.model_copy(update={"depths": depths})


def hybrid_module(
    meta: ViTSpec, teacher: ViTSpec, position: int, meta_state: Mapping[str, Tensor] | None = None
) -> ViTStages:
    """A hybrid whose deep stage is freshly initialised and alone trainable.

    Args:
        meta: spec of the meta model.
        teacher: spec of the teacher.
        position: stage to train; -1 is the last.
        meta_state: weights of the meta model for the other stages; fresh ones when left out.

    Raises:
        SpecError: as :func:`hybrid_spec`.
        CheckpointError: ``meta_state`` is not of this meta model.
    """
    spec = hybrid_spec(meta, teacher, position)
    hybrid, place = ViTStages(spec), position_of(position, len(meta.depths))
    own = split_state(hybrid.state_dict(), spec.depths)
    if meta_state is not None:
        given = split_state(meta_state, meta.depths)
        stages = [own[i] if i == place else given[i] for i in range(len(given))]
        load_assembled(hybrid, assemble_stages(stages, spec.depths))
    for name, parameter in hybrid.named_parameters():
        parameter.requires_grad_(stage_of(name, spec.depths) == place)
    return hybrid
