"""Rules over a finished graph; one rule is one small function in :data:`RULES`.

What makes a graph impossible (cycles, wrong kinds, empty fan-outs) is refused before, by :mod:`orchestrator.wiring` and
:mod:`orchestrator.graph`; here is what can be built but should not be run, or needs a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from orchestrator.capacity import Capacity, misfit
from orchestrator.nodes import Graph
from orchestrator.positions import LintProblem

# Artifact kinds that people want for themselves, so that nothing has to read them.
RESULTS = frozenset({"report", "metrics", "student", "table", "figure", "search", "deployment"})


Rule = Callable[[Graph, Capacity | None], Iterator[LintProblem]]


def lint(graph: Graph, capacity: Capacity | None = None) -> list[LintProblem]:
    """Run all rules.

    Args:
        graph: what :func:`orchestrator.graph.build_graph` made.
        capacity: what the machines have, when known.
    """
    return [problem for rule in RULES for problem in rule(graph, capacity)]


def duplicate_seeds(graph: Graph, capacity: Capacity | None) -> Iterator[LintProblem]:
    """The same seed twice would count the same result twice."""
    seeds = graph.spec.seeds
    for seed in sorted({seed for seed in seeds if seeds.count(seed) > 1}):
        last = max(index for index, value in enumerate(seeds) if value == seed)
        yield LintProblem("duplicate-seeds", ("seeds", last), f"the seed {seed} is listed {seeds.count(seed)} times.")


def unused_output(graph: Graph, capacity: Capacity | None) -> Iterator[LintProblem]:
    """A stage whose artifact nobody reads and nobody looks at is probably a forgotten connection."""
    for view in graph.stages.values():
        if view.stage.output not in RESULTS and not graph.stage_children(view.name):
            text = f"no stage reads what {view.name!r} makes (kind {view.stage.output!r})."
            hint = "Connect it, or take the stage out."
            yield LintProblem("unused-output", ("stages", view.name), text, hint, "warning")


def useless_seeds(graph: Graph, capacity: Capacity | None) -> Iterator[LintProblem]:
    """Several seeds, but every stage runs once over all of them."""
    if len(graph.spec.seeds) > 1 and not any(view.stage.per_seed for view in graph.stages.values()):
        yield LintProblem("useless-seeds", ("seeds",), "no stage of this pipeline runs per seed.", "", "warning")


def workers_without_gang(graph: Graph, capacity: Capacity | None) -> Iterator[LintProblem]:
    """Ranks that nobody would use."""
    for view in graph.stages.values():
        workers = view.spec.resources.workers
        if workers > 1 and not view.stage.gang:
            text = f"{workers} workers are asked for, but stages of kind {view.kind!r} run as one process."
            yield LintProblem("workers-without-gang", _resource(view.name, "workers"), text, "Set it to 1.")


def min_success_of_one(graph: Graph, capacity: Capacity | None) -> Iterator[LintProblem]:
    """A part of a fan-out of one is all of it; over seeds it is not counted."""
    for view in graph.stages.values():
        seeds = [graph.nodes[name].seed_index for name in view.nodes]
        if view.spec.min_success < 1 and seeds and len(set(seeds)) == len(seeds):
            each = " for each seed" if view.stage.per_seed else ""
            text = f"has no effect: {view.name!r} has one member{each}, and at least one must succeed."
            yield LintProblem("min-success", ("stages", view.name, "min_success"), text, "Leave it out.", "warning")


def idle_search_settings(graph: Graph, capacity: Capacity | None) -> Iterator[LintProblem]:
    """Settings of a search that its algorithm or scheduler never looks at."""
    for view in graph.stages.values():
        if view.stage.leads:
            from orchestrator.search_check import idle_settings

            for name, text in idle_settings(view.config):  # type: ignore[arg-type]
                path = ("stages", view.name, "config", name)
                yield LintProblem("idle-setting", path, text, "Leave it out.", "warning")


def scheduler_over_ranks(graph: Graph, capacity: Capacity | None) -> Iterator[LintProblem]:
    """Scores of a trial with several ranks stay in them, so a scheduler would stop nobody."""
    for view in graph.stages.values():
        workers, scheduler = view.spec.resources.workers, getattr(view.config, "scheduler", "none")
        if view.stage.leads and workers > 1 and scheduler != "none":
            text = f"{scheduler} does not see what trials of {workers} workers report, so it would stop nobody."
            hint = "Set scheduler: none, or workers: 1."
            yield LintProblem("scheduler-over-ranks", ("stages", view.name, "config", "scheduler"), text, hint)


def unregistered_model(graph: Graph, capacity: Capacity | None) -> Iterator[LintProblem]:
    """A name in MLflow's registry, in a pipeline that does not write to MLflow."""
    for view in graph.stages.values():
        name = getattr(view.config, "register_as", None)
        if name and not graph.spec.tracking.enabled:
            text = f"nothing is registered as {name!r} while tracking is not enabled."
            hint = "`moepipe track sync RUN` does it after the run."
            yield LintProblem("unregistered", ("stages", view.name, "config", "register_as"), text, hint, "warning")


def more_threads_than_cpus(graph: Graph, capacity: Capacity | None) -> Iterator[LintProblem]:
    """Threads beyond the reserved cores fight with the neighbours."""
    for view in graph.stages.values():
        wanted = view.spec.resources
        if wanted.threads > max(1.0, wanted.cpus):
            text = f"{wanted.threads} threads on {wanted.cpus:g} reserved CPU cores slow each other down."
            hint = "Raise cpus or lower threads."
            yield LintProblem("threads", _resource(view.name, "threads"), text, hint, "warning")


def larger_than_cluster(graph: Graph, capacity: Capacity | None) -> Iterator[LintProblem]:
    """More than the empty cluster has: the stage could never start."""
    if capacity is None:
        return
    for view in graph.stages.values():
        reason = misfit(view.name, view.spec.resources, capacity)
        if reason:
            yield LintProblem("too-large", _resource(view.name), f"{reason}.", "Lower it, or use a profile.")


def _resource(stage: str, *parts: str) -> tuple[str, ...]:
    return ("stages", stage, "resources", *parts)


RULES: tuple[Rule, ...] = (
    duplicate_seeds,
    unused_output,
    useless_seeds,
    workers_without_gang,
    min_success_of_one,
    idle_search_settings,
    scheduler_over_ranks,
    unregistered_model,
    more_threads_than_cpus,
    larger_than_cluster,
)
