"""PipelineSpec -> Graph: every stage times seed times member, connected member by member, in topological order.

Seeds derive from names, so two pipelines that share a stage's name, config and inputs share its artifacts.
"""

from __future__ import annotations

import graphlib
from collections.abc import Mapping
from typing import Any

from moe.errors import MoepipeError
from orchestrator.fanout import Assembly, add_stage
from orchestrator.nodes import Graph, Node, StageView, derive_seed
from orchestrator.positions import LintProblem, Place, Problem, SpecErrors, Tree
from orchestrator.spec import PipelineSpec
from orchestrator.stages.base import StageBase, StageConfig
from orchestrator.strictness import parse
from orchestrator.validation import validate
from orchestrator.wiring import Draft, bound, references, stage_for, upstream, wiring_problems

__all__ = ["Graph", "Node", "StageView", "assemble", "build_graph", "derive_seed", "stage_for", "topological_order"]


def build_graph(spec: PipelineSpec) -> Graph:
    """Expand a specification.

    Raises:
        SpecErrors: everything that is wrong with kinds, configs, inputs and fan-outs, without positions (a pipeline
            that :func:`orchestrator.loading.load_pipeline` returned has no such problem).
    """
    graph, problems = assemble(spec)
    if graph is None:
        source = f"pipeline {spec.name}"
        tree = Tree.of(spec.model_dump(mode="json"), Place(source))
        details = [found for problem in problems for found in _details(problem, spec, tree)]
        raise SpecErrors(source, details)
    return graph


def _details(problem: LintProblem, spec: PipelineSpec, tree: Tree) -> list[Problem]:
    """A config problem in full words."""
    if problem.rule == "config":
        name = str(problem.path[1])
        branch, _ = tree.find(problem.path)
        found = validate(stage_for(spec.stages[name].kind).Config, branch, problem.path)[1]
        if found:
            return found
    return [problem.at(tree)]


def assemble(spec: PipelineSpec) -> tuple[Graph | None, list[LintProblem]]:
    """Like :func:`build_graph`, but returns the problems."""
    stages: dict[str, StageBase[Any]] = {}
    configs: dict[str, StageConfig] = {}
    problems: list[LintProblem] = []
    for name, stage_spec in spec.stages.items():
        try:
            stages[name] = stage_for(stage_spec.kind)
        except MoepipeError as error:
            problems.append(LintProblem("unknown-kind", ("stages", name, "kind"), error.message, error.hint))
            continue
        try:
            config, errors = parse(stages[name].Config, stage_spec.config)
            if config is not None:
                configs[name] = config
                stage, found = bound(name, stages[name], config)
                problems += found
            else:
                stage = None if stages[name].open_ports else stages[name]
                problems.append(LintProblem("config", ("stages", name, "config"), f"{len(errors)} fields are wrong."))
            if stage is None:
                del stages[name]
            else:
                stages[name] = stage
        except MoepipeError as error:
            problems.append(LintProblem("config", ("stages", name, "config"), error.message, error.hint))
    drafts = {
        name: Draft(name, stages.get(name), {port: references(value) for port, value in stage_spec.inputs.items()})
        for name, stage_spec in spec.stages.items()
    }
    problems += wiring_problems(drafts)
    if problems:
        return None, problems
    assembly = Assembly(spec)
    for name in topological_order(drafts):
        add_stage(assembly, name, stages[name], configs[name], upstream(drafts[name]))
    if assembly.problems:
        return None, assembly.problems
    return Graph(spec, assembly.nodes, assembly.views), []


def topological_order(drafts: Mapping[str, Draft]) -> list[str]:
    """Stage names so that each comes after what it reads; otherwise in the order of the YAML."""
    rank = {name: index for index, name in enumerate(drafts)}
    sorter = graphlib.TopologicalSorter(
        {n: [up for ups in upstream(d).values() for up in ups] for n, d in drafts.items()}
    )
    sorter.prepare()
    ready, order = list(sorter.get_ready()), []
    while ready:
        ready.sort(key=rank.__getitem__)
        order.append(ready.pop(0))
        sorter.done(order[-1])
        ready += sorter.get_ready()
    return order
