"""A ViT cut into module weights, and modules put together again: names, not arithmetic.

Stage i of a split holds its blocks, renumbered from 0 (``blocks.<j>.*``); the first stage also ``cls_token``,
``pos_embed`` and ``patch_embed.*``, the last also ``norm.*`` and ``head.*``. Assembling reverses that and, for expert
students, decides which stitches stay. Every result is either complete or an error that names tensors; what was left
out on purpose stands in a :class:`Assembled` report.

Sources: Deep Incubation (arXiv 2212.04129), m2mKD (2402.16918, section 4, public code ``split_teacher.py`` and
``model_assemb``). Differs: there missing and superfluous keys are ignored in silence.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from moe.errors import CheckpointError, SpecError
from moe.models.vit_specs import ViTSpec, position_of, spans_of
from moe.models.vit_stages import ViTStages

State = dict[str, Tensor]

FIRST = ("cls_token", "pos_embed", "patch_embed.")
"""What only the first stage holds."""
LAST = ("norm.", "head.")
"""What only the last stage holds."""
STITCHES = ("pre_stitch", "post_stitch")

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Assembled:
    """A whole network's weights, and where they come from.

    Attributes:
        state: tensors by name in the whole network (not copied).
        loaded_from: name in the whole network -> ``<stage>:<name in that stage>``.
        ignored: ``<stage>:<name>`` of tensors that have no place in the whole network.
    """

    state: State
    loaded_from: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)


def split_state(state: Mapping[str, Tensor], depths: Sequence[int]) -> list[State]:
    """The weights of every stage of a whole network, under stage-local names.

    Args:
        state: ``cls_token``, ``pos_embed``, ``patch_embed.*``, ``blocks.<i>.*``, ``norm.*``, ``head.*``.
        depths: blocks of each stage.

    Returns:
        One state dict per stage; tensors are shared with ``state``.

    Raises:
        CheckpointError: block numbers of ``state`` are not exactly 0 to ``sum(depths) - 1``, or a name has no stage.
    """
    _check_depths(depths)
    blocks = {int(found[1]) for name in state if (found := _BLOCK.fullmatch(name))}
    expected = set(range(sum(depths)))
    if blocks != expected:
        raise CheckpointError(
            f"Depths {tuple(depths)} need blocks 0 to {sum(depths) - 1}; missing {sorted(expected - blocks)}, "
            f"beyond them {sorted(blocks - expected)}.",
            "The depths must add up to the network's depth.",
        )
    starts = [start for start, _ in spans_of(depths)]
    stages: list[State] = [{} for _ in depths]
    for name, value in state.items():
        stage, found = stage_of(name, depths), _BLOCK.fullmatch(name)
        local = f"blocks.{int(found[1]) - starts[stage]}.{found[2]}" if found else name
        stages[stage][local] = value
    return stages


def stage_of(name: str, depths: Sequence[int]) -> int:
    """The stage that owns a tensor of a whole network.

    Raises:
        CheckpointError: no stage does.
    """
    found = _BLOCK.fullmatch(name)
    if found:
        for stage, (start, end) in enumerate(spans_of(depths)):
            if start <= int(found[1]) < end:
                return stage
    elif name.startswith(FIRST):
        return 0
    elif name.startswith(LAST):
        return len(depths) - 1
    raise CheckpointError(f"Tensor {name!r} belongs to no stage of a ViT.", "Check depths and which file was given.")


def stage_module(model: ViTStages, index: int) -> ViTStages:
    """One stage of a whole network as a network of its own, with its weights.

    Nothing else of the model is kept alive: a pair that teaches one module needs 3 of a ViT-H's 32 blocks. A stage's
    drop-path rates rise inside its own blocks.

    Raises:
        SpecError: there is no such stage, or the model has stitches or experts (split its state and build the student's
            spec instead).
    """
    if type(model.spec) is not ViTSpec:
        raise SpecError(f"{type(model).__name__} is no dense ViT.", "Only teachers are cut into modules this way.")
    place = position_of(index, len(model.spec.depths))
    module = ViTStages(model.spec.stage(place))
    module.load_state_dict(split_state(model.state_dict(), model.spec.depths)[place])
    return module.train(model.training)


def assemble_stages(
    stages: Sequence[Mapping[str, Tensor]],
    depths: Sequence[int],
    pre_stitch: Collection[int] = (),
    post_stitch: Collection[int] = (),
) -> Assembled:
    """One network from the weights of its stages; the inverse of :func:`split_state` when nothing is left out.

    Args:
        stages: one state dict per stage, stage-local names.
        depths: blocks of each stage in the whole network.
        pre_stitch: blocks (counted over the whole network) whose entrance stitch is kept; others are dropped.
        post_stitch: the same for exit stitches.

    Returns:
        The weights and a report. Tensors that only other stages own (an embedding in a middle stage) and blocks beyond
        a stage's depth are ignored, as in the reference, and listed.

    Raises:
        SpecError: the number of stages does not fit the depths, or a stitch position does not exist.
        CheckpointError: a block of the whole network has no weights at all.
    """
    _check_depths(depths)
    if len(stages) != len(depths):
        raise SpecError(
            f"There are {len(stages)} stages of weights and {len(depths)} depths {tuple(depths)}.",
            "Give one set of weights per stage, in order.",
        )
    keep = {"pre_stitch": set(pre_stitch), "post_stitch": set(post_stitch)}
    outside = sorted(i for chosen in keep.values() for i in chosen if not 0 <= i < sum(depths))
    if outside:
        raise SpecError(f"Stitches at blocks {outside} of a network of {sum(depths)} blocks.", "Blocks count from 0.")
    result = Assembled({})
    for stage, (state, (start, end)) in enumerate(zip(stages, spans_of(depths), strict=True)):
        for name, value in state.items():
            target = _target_name(name, stage, len(depths), (start, end), keep)
            source = f"{stage}:{name}"
            if target is None:
                result.ignored.append(source)
            else:
                result.state[target], result.loaded_from[target] = value, source
        empty = [i for i in range(start, end) if not any(n.startswith(f"blocks.{i}.") for n in result.state)]
        if empty:
            raise CheckpointError(
                f"Stage {stage} brings no weights for blocks {empty} of the whole network.",
                f"It should hold {end - start} blocks, numbered from 0.",
            )
    return result


def assemble_hybrids(hybrids: Sequence[Sequence[Mapping[str, Tensor]]], depths: Sequence[int]) -> Assembled:
    """A dense teacher after module training: stage i comes from stage i of hybrid i, the rest of it is meta model.

    Args:
        hybrids: for every hybrid checkpoint the weights of its stages.
        depths: blocks of each stage in the whole network.

    Raises:
        SpecError: the number of hybrids, or of stages in one of them, does not fit.
        CheckpointError: as :func:`assemble_stages`.
    """
    for index, hybrid in enumerate(hybrids):
        if len(hybrid) != len(hybrids):
            raise SpecError(
                f"Hybrid {index} has {len(hybrid)} stages, there are {len(hybrids)} hybrids.",
                "Every hybrid is the whole meta model with one deep stage.",
            )
    return assemble_stages([hybrid[index] for index, hybrid in enumerate(hybrids)], depths)


def load_assembled(module: nn.Module, assembled: Assembled, allow_missing: Collection[str] = ()) -> list[str]:
    """Copy assembled weights into a module.

    Args:
        module: the whole network.
        assembled: weights under the module's names.
        allow_missing: beginnings of names that may keep their initial values.

    Returns:
        Names that kept their initial values.

    Raises:
        CheckpointError: tensors missing, superfluous or of another shape, by name, with the stage they come from.
    """
    own = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    complaints = []
    for name, value in assembled.state.items():
        source = assembled.loaded_from.get(name, "?")
        if name not in own:
            complaints.append(f"{name} (from {source}) has no place")
        elif tuple(value.shape) != own[name]:
            complaints.append(f"{name} (from {source}) is {tuple(value.shape)} instead of {own[name]}")
    kept = [name for name in own if name not in assembled.state]
    complaints += [f"{name} is missing" for name in kept if not name.startswith(tuple(allow_missing))]
    if complaints:
        more = f"; and {len(complaints) - 6} more" if len(complaints) > 6 else ""
        raise CheckpointError(
            f"The assembled weights do not fit the network: {'; '.join(complaints[:6])}{more}.",
            "Check depths, widths, expert counts and stitch positions.",
        )
    module.load_state_dict(assembled.state, strict=False)
    return kept


def _target_name(
    name: str, stage: int, count: int, span: tuple[int, int], keep: Mapping[str, Collection[int]]
) -> str | None:
    """Name in the whole network, or None for what is left out."""
    found = _BLOCK.fullmatch(name)
    if not found:
        wanted = (name.startswith(FIRST) and stage == 0) or (name.startswith(LAST) and stage == count - 1)
        return name if wanted else None
    block, rest = span[0] + int(found[1]), found[2]
    stitch = rest.split(".")[0]
    if block >= span[1] or (stitch in STITCHES and block not in keep[stitch]):
        return None
    return f"blocks.{block}.{rest}"


def _check_depths(depths: Sequence[int]) -> None:
    if not depths or min(depths) < 1:
        raise SpecError(f"Depths are {tuple(depths)}.", "Every stage needs at least one block.")
