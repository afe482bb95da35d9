import pytest

from orchestrator.capacity import Capacity
from orchestrator.graph import build_graph
from orchestrator.lint import RULES, lint
from orchestrator.loading import load, load_pipeline
from orchestrator.positions import SpecErrors
from tests.support.yaml_files import write


def rules(graph, capacity=None):
    return {problem.rule: problem for problem in lint(graph, capacity)}


def test_a_good_pipeline_has_nothing_to_say(tmp_path):
    assert lint(build_graph(load_pipeline(write(tmp_path))), Capacity(({"cpus": 2.0},))) == []


def test_unused_output_is_a_warning_with_a_place(tmp_path):
    loaded = load(write(tmp_path, "stages:\n  lonely: {kind: numbers}\n"))
    (warning,) = loaded.warnings
    assert (warning.severity, warning.path, warning.place.line) == ("warning", "stages.lonely", 4)


def test_duplicate_seeds_are_an_error_at_the_second(tmp_path):
    with pytest.raises(SpecErrors, match=r":4:8: seeds\[1\]: the seed 3 is listed 2 times"):
        load(write(tmp_path, "seeds: [3,\n       3]\nstages: {end: {kind: numbers}}\n"))


def test_workers_without_a_gang(tmp_path):
    with pytest.raises(SpecErrors, match="2 workers are asked for, but stages of kind 'sum' run as one process"):
        load(write(tmp_path), overrides=["stages.total.resources.workers=2"])


def test_more_threads_than_cores_is_a_warning(tmp_path):
    graph = load(write(tmp_path), overrides=["stages.total.resources.threads=4"]).graph
    assert rules(graph)["threads"].severity == "warning"


def test_several_seeds_without_a_stage_that_uses_them(tmp_path):
    graph = load(write(tmp_path)).graph
    assert "useless-seeds" not in rules(graph)


def test_larger_than_the_cluster(tmp_path):
    graph = load(write(tmp_path), overrides=["stages.total.resources={cpus: 3, custom: {spot: 1}}"]).graph
    assert "too-large" not in rules(graph)
    problem = rules(graph, Capacity(({"cpus": 2.0}, {"cpus": 2.0})))["too-large"]
    assert problem.path == ("stages", "total", "resources")
    assert "3 cpus" in problem.message
    assert "too-large" not in rules(graph, Capacity(({"cpus": 4.0, "spot": 1.0},)))


def test_every_rule_explains_itself():
    assert all(rule.__doc__ for rule in RULES)
