"""Stages checked against their kinds: the kind exists, its config is right, inputs lead to artifacts that fit.

The rules are lenient about what other rules report: a stage of an unknown kind makes no further noise downstream.
"""

from __future__ import annotations

import graphlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe.errors import MoepipeError, SpecError, nearest
from orchestrator.positions import LintProblem, Path
from orchestrator.references import stage_name
from orchestrator.stages.base import STAGES, Port, StageBase


@dataclass(frozen=True)
class Draft:
    """A stage as written, with the class of its kind when that is known.

    Attributes:
        name: stage name.
        stage: its kind's class instance, or None (unknown, already reported).
        inputs: port -> references as written, not yet checked; None where no text stands (already reported).
    """

    name: str
    stage: StageBase[Any] | None
    inputs: Mapping[str, Sequence[str | None]]


def stage_for(kind: str) -> StageBase[Any]:
    """A new instance of the stage class of ``kind``.

    Raises:
        SpecError: unknown kind, or its module cannot be imported.
    """
    module = STAGES.module_name(kind)
    try:
        stage: StageBase[Any] = STAGES.load(kind).Stage()
    except MoepipeError:
        raise
    except Exception as error:  # third-party code: whatever it raises, the user needs its name
        raise SpecError(
            f"The stage kind {kind!r} ({module}) cannot be loaded: {type(error).__name__}: {error}."
        ) from error
    return stage


def bound(name: str, stage: StageBase[Any], config: Any) -> tuple[StageBase[Any] | None, list[LintProblem]]:
    """A stage as it is under its config (None when its ports cannot be known), and what is wrong with the config."""
    found = stage.examine(config)
    problems = [LintProblem("examined", ("stages", name, "config", *path), text, hint) for path, text, hint in found]
    if problems:
        return (None if stage.open_ports else stage), problems
    return stage.bind(config), []


def references(value: str | Sequence[str]) -> tuple[str, ...]:
    """The references of one input, as written."""
    return (value,) if isinstance(value, str) else tuple(value)


def upstream(draft: Draft) -> dict[str, tuple[str, ...]]:
    """Port -> names of the stages it reads from (well-formed references only)."""
    named = {port: [stage_name(text) for text in texts if text] for port, texts in draft.inputs.items()}
    return {port: tuple(name for name in names if name) for port, names in named.items()}


def wiring_problems(drafts: Mapping[str, Draft]) -> list[LintProblem]:
    """All problems of kinds, ports and edges, in stage order."""
    problems = [problem for draft in drafts.values() for problem in _stage_problems(draft, drafts)]
    circle = find_cycle(drafts)
    if circle:
        path = ("stages", circle[0], "inputs")
        shown = " -> ".join([*circle, circle[0]])
        text = "reads from itself." if len(circle) == 1 else f"the stages wait for each other in a circle: {shown}."
        problems.append(LintProblem("cycle", path, text))
    return problems


def find_cycle(drafts: Mapping[str, Draft]) -> list[str]:
    """Stage names of one cycle, each reading from the one before it; empty when there is none."""
    graph = {name: [up for ups in upstream(draft).values() for up in ups] for name, draft in drafts.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1][:-1])
    return []


def _stage_problems(draft: Draft, drafts: Mapping[str, Draft]) -> Iterator[LintProblem]:
    stage = draft.stage
    if stage is None:
        return
    for port, texts in draft.inputs.items():
        path = ("stages", draft.name, "inputs", port)
        if port not in stage.inputs:
            hint = nearest(port, stage.inputs)
            yield LintProblem("unknown-port", path, f"this stage kind has no input {port!r}.", hint)
            continue
        yield from _port_problems(path, stage.inputs[port], texts, drafts)
    for port, declared in stage.inputs.items():
        if not declared.optional and not draft.inputs.get(port):
            path = ("stages", draft.name, "inputs", port)
            makers = [
                d.name for d in drafts.values() if d.stage and declared.accepts(d.stage.output) and d is not draft
            ]
            hint = f"{declared.doc} Stages that make one: {', '.join(makers[:6]) or 'none'}.".strip()
            yield LintProblem(
                "missing-port", path, f"is missing; it takes an artifact of kind {declared.kind!r}.", hint
            )


def _port_problems(
    path: tuple[str, ...], port: Port, texts: Sequence[str | None], drafts: Mapping[str, Draft]
) -> Iterator[LintProblem]:
    if len(texts) > 1 and not port.many:
        yield LintProblem("one-artifact", path, f"takes one artifact, but {len(texts)} stages are listed.")
    for index, text in enumerate(texts):
        spot: Path = (*path, index) if len(texts) > 1 else path
        if text is None:
            continue
        name = stage_name(text)
        if name is None:
            hint = f"Write ${{stages.{text}}}." if text in drafts else "Write ${stages.NAME}."
            yield LintProblem("input-form", spot, f"expected a reference to a stage, found {text!r}.", hint)
            continue
        if name not in drafts:
            yield LintProblem("unknown-input", spot, f"there is no stage {name!r}.", nearest(name, drafts))
            continue
        maker = drafts[name].stage
        if maker is not None and not port.accepts(maker.output):
            makers = [d.name for d in drafts.values() if d.stage and port.accepts(d.stage.output)]
            hint = f"Stages that make {port.kind!r}: {', '.join(makers) or 'none'}."
            text = f"takes an artifact of kind {port.kind!r}, but {name!r} makes {maker.output!r}."
            yield LintProblem("kind-mismatch", spot, text, hint)
