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


def test_min_success_of_a_single_member_is_told(tmp_path):
    found = rules(load(write(tmp_path), overrides=["stages.total.min_success=0.5"]).graph)
    assert "one member for each seed" in found["min-success"].message
    assert "min-success" not in rules(load(write(tmp_path), overrides=["stages.squares.min_success=0.5"]).graph)


def test_more_threads_than_cores_is_a_warning(tmp_path):
    graph = load(write(tmp_path), overrides=["stages.total.resources.threads=4"]).graph
    assert rules(graph)["threads"].severity == "warning"


def test_several_seeds_without_a_stage_that_uses_them(tmp_path):
    graph = load(write(tmp_path)).graph
    assert "useless-seeds" not in rules(graph)


SEARCH = """\
stages:
  total: {kind: gather, inputs: {numbers: "${stages.s}"}}
  s:
    kind: search
    resources: {workers: 1}
    config:
      stage: {kind: gang}
      space: {value: {choice: [1, 5]}}
      metric: value
      selection: training_domains
      algorithm: grid
"""


def test_settings_that_a_search_never_looks_at_are_told(tmp_path):
    assert not load(write(tmp_path, SEARCH)).warnings
    more = ["stages.s.config.startup=2", "stages.s.config.reuse=false", "stages.s.config.grace=5"]
    found = {warning.path: warning.message for warning in load(write(tmp_path, SEARCH), overrides=more).warnings}
    assert found == {
        "stages.s.config.startup": "has no effect with algorithm grid; it is of tpe.",
        "stages.s.config.reuse": "has no effect with algorithm grid; it is of random and tpe.",
        "stages.s.config.grace": "has no effect with scheduler none; it is of asha and median.",
    }


def test_a_scheduler_that_would_see_no_score_is_refused(tmp_path):
    watched = ["stages.s.config.scheduler=asha", "stages.s.config.curve=val/x"]
    load(write(tmp_path, SEARCH), overrides=watched)
    with pytest.raises(SpecErrors, match="asha does not see what trials of 2 workers report"):
        load(write(tmp_path, SEARCH), overrides=[*watched, "stages.s.resources.workers=2"])


def test_a_name_in_the_registry_without_tracking_is_told(tmp_path):
    text = """\
tracking: {enabled: false}
stages:
  data: {kind: prepare, config: {dataset: digits5, options: {target: mfeat}}}
  erm:
    kind: train
    inputs: {data: "${stages.data}"}
    config: {backbone: {name: tiny_cnn}, training: {batch_size: 8, steps: 1, lr: 0.1}}
  deploy: {kind: deploy, inputs: {model: "${stages.erm}"}, config: {register_as: digits}}
"""
    (warning,) = load(write(tmp_path, text)).warnings
    assert warning.path == "stages.deploy.config.register_as" and "moepipe track sync" in warning.hint
    assert not load(write(tmp_path, text), overrides=["tracking.enabled=true"]).warnings


def test_larger_than_the_cluster(tmp_path):
    graph = load(write(tmp_path), overrides=["stages.total.resources={cpus: 3, custom: {spot: 1}}"]).graph
    assert "too-large" not in rules(graph)
    problem = rules(graph, Capacity(({"cpus": 2.0}, {"cpus": 2.0})))["too-large"]
    assert problem.path == ("stages", "total", "resources")
    assert "3 cpus" in problem.message
    assert "too-large" not in rules(graph, Capacity(({"cpus": 4.0, "spot": 1.0},)))


def test_every_rule_explains_itself():
    assert all(rule.__doc__ for rule in RULES)
