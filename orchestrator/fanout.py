"""Stage by stage into nodes: every seed times every member, connected member by member."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe.errors import MoepipeError
from orchestrator.nodes import Node, StageView, derive_seed
from orchestrator.positions import LintProblem
from orchestrator.spec import PipelineSpec, StageSpec
from orchestrator.stages.base import Member, StageBase, StageConfig

MAX_MEMBERS = 100_000
_SAME_NUMBERS = "The two stages fan out differently; give their configs the same numbers."


@dataclass
class Assembly:
    """A graph under construction."""

    spec: PipelineSpec
    views: dict[str, StageView] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)
    by_seed: dict[str, dict[int | None, list[Node]]] = field(default_factory=dict)
    problems: list[LintProblem] = field(default_factory=list)


def add_stage(
    assembly: Assembly, name: str, stage: StageBase[Any], config: StageConfig, inputs: Mapping[str, tuple[str, ...]]
) -> None:
    """Expand one stage; all stages that it reads are there already."""
    spec = assembly.spec.stages[name]
    members = _members(assembly, name, stage, config)
    seeds: Sequence[int | None] = list(dict.fromkeys(assembly.spec.seeds)) if stage.per_seed else [None]
    by_seed: dict[int | None, list[Node]] = {}
    told: set[str] = set()
    for seed in seeds:
        by_seed[seed] = []
        for member in members:
            chosen: dict[str, tuple[str, ...]] = {}
            for port, ups in inputs.items():
                ids, problem = _connect(assembly, stage.inputs[port].many, ups, seed, member)
                if problem and port not in told:
                    told.add(port)
                    path = ("stages", name, "inputs", port)
                    assembly.problems.append(LintProblem("fan-out-mismatch", path, problem[0], problem[1]))
                chosen[port] = ids
            by_seed[seed].append(_node(name, spec, member, seed, config, chosen))
        told |= _left_over(assembly, name, stage, inputs, by_seed[seed], seed, told)
    assembly.by_seed[name] = by_seed
    nodes = [node for group in by_seed.values() for node in group]
    assembly.nodes.update({node.id: node for node in nodes})
    ids = tuple(node.id for node in nodes)
    assembly.views[name] = StageView(name, spec.kind, spec, stage, config, inputs, ids)


def _left_over(
    assembly: Assembly,
    name: str,
    stage: StageBase[Any],
    inputs: Mapping[str, tuple[str, ...]],
    nodes: Sequence[Node],
    seed: int | None,
    told: set[str],
) -> set[str]:
    """Ports of a mirrored fan-out that leave members of the upstream stage unread; notes a problem for each."""
    ports: set[str] = set()
    for port, ups in inputs.items():
        seen = [node for up in ups for node in _visible(assembly, up, seed)]
        used = {parent for node in nodes for parent in node.inputs[port]}
        unread = [node.member.name for node in seen if node.id not in used]
        if stage.inputs[port].many or port in told or not unread or not nodes:
            continue
        ports.add(port)
        path = ("stages", name, "inputs", port)
        text = f"leaves {_few(unread)} of {' and '.join(ups)} unread; its own members are "
        text += f"{_few([node.member.name for node in nodes])}."
        assembly.problems.append(LintProblem("fan-out-mismatch", path, text, _SAME_NUMBERS))
    return ports


def _node(
    stage: str,
    spec: StageSpec,
    member: Member,
    seed: int | None,
    config: StageConfig,
    inputs: dict[str, tuple[str, ...]],
) -> Node:
    parts = [stage, *([] if seed is None else [f"seed={seed}"]), *([member.name] if member.name else [])]
    derived = None if seed is None else derive_seed(seed, spec.seed_name or stage, member.name)
    return Node(
        "/".join(parts),
        stage,
        spec.kind,
        member,
        derived,
        seed,
        config,
        spec.resources,
        spec.retry,
        spec.timeout_s,
        inputs,
        spec.seed_name or "",
    )


def _members(assembly: Assembly, name: str, stage: StageBase[Any], config: StageConfig) -> list[Member]:
    """The fan-out, checked: not empty, names unique and usable in ids."""
    path = ("stages", name, "config")
    problem: tuple[str, str] | None = None
    members: list[Member] = []
    try:
        members = list(stage.members(config))
    except (MoepipeError, ValueError) as error:
        problem = ("members", str(error))
    names = [member.name for member in members]
    if problem is None and not members:
        problem = ("empty-fan-out", "this config makes a fan-out without members, so there is nothing to run.")
    elif len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        problem = ("member-names", f"the fan-out has two members named {twice!r}.")
    elif any(part in n for n in names for part in ("/", "\\", "\n")):
        problem = ("member-names", "member names must not contain slashes.")
    elif len(members) * len(assembly.spec.seeds) > MAX_MEMBERS:
        problem = (
            "too-many",
            f"{len(members)} members times {len(assembly.spec.seeds)} seeds is more than {MAX_MEMBERS:,}.",
        )
    if problem:
        assembly.problems.append(LintProblem(problem[0], path, problem[1]))
        return []
    return members


def _connect(
    assembly: Assembly, many: bool, ups: Sequence[str], seed: int | None, member: Member
) -> tuple[tuple[str, ...], tuple[str, str] | None]:
    """Ids for one port of one member, or a problem (message, hint)."""
    nodes = [node for up in ups for node in _visible(assembly, up, seed)]
    if many:
        return tuple(node.id for node in nodes), None
    if len(nodes) == 1 and not _contradict(nodes[0].member.name, member.name):
        return (nodes[0].id,), None
    same = [node for node in nodes if node.member.name == member.name]
    if len(same) == 1 and len(nodes) > 0:
        return (same[0].id,), None
    if not nodes:  # the upstream fan-out is broken and was reported
        return (), None
    return (), _mismatch(ups, nodes, same, seed, member)


def _visible(assembly: Assembly, up: str, seed: int | None) -> Iterator[Node]:
    """What a member for ``seed`` sees of a stage: that seed's members, or all."""
    by_seed = assembly.by_seed[up]
    groups = [by_seed[seed]] if seed is not None and seed in by_seed else by_seed.values()
    for group in groups:
        yield from group


def _contradict(theirs: str, ours: str) -> bool:
    """``group=0`` and ``group=1``: the same fan-out, another member."""
    a, b = theirs.partition("="), ours.partition("=")
    return bool(a[1] and b[1]) and a[0] == b[0] and a[2] != b[2]


def _mismatch(
    ups: Sequence[str], nodes: Sequence[Node], same: Sequence[Node], seed: int | None, member: Member
) -> tuple[str, str]:
    source = " and ".join(ups)
    theirs = list(dict.fromkeys(node.member.name for node in nodes))
    if len(same) > 1 and seed is None:
        return (
            f"takes one artifact, but {source} has one for each of {len(same)} seeds.",
            "A stage over all seeds needs a port that takes many.",
        )
    shown = _few(theirs)
    if not member.name:
        return (
            f"takes one artifact, but {source} has {len(nodes)} members ({shown}).",
            "Use a stage that takes many, or make this stage's config fan out in the same way.",
        )
    return (
        f"member {member.name!r} finds no member of the same name in {source}, which has {shown}.",
        _SAME_NUMBERS,
    )


def _few(names: Sequence[str]) -> str:
    """The first names, quoted, and how many there are."""
    return ", ".join(repr(name) for name in names[:4]) + (f", ... ({len(names)} in all)" if len(names) > 4 else "")
