"""``--sweep``: a grid of readings of one pipeline in one specification."""

from __future__ import annotations

import json

import pytest

from moe.errors import SpecError
from orchestrator.positions import SpecErrors
from orchestrator.runs import RunStore
from orchestrator.sweeping import load_sweep, parse_sweeps, sweep_table, table_lines
from tests.support.pipelines import go

TOY = """
apiVersion: moepipe/v1
name: toy
seeds: [0, 1]
params: {steps: 1}
stages:
  base: {kind: numbers, config: {value: 2, seeded: true}}
  score:
    kind: score
    inputs: {start: "${stages.base}"}
    config: {steps: "${params.steps}", noise: 0.5}
  total: {kind: sum, inputs: {numbers: "${stages.score}"}}
  all: {kind: gather, inputs: {numbers: ["${stages.total}", "${stages.base}"]}}
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "toy.yaml"
    file.write_text(TOY)
    return file


def test_stages_that_do_not_depend_on_it_stand_there_once(path):
    swept = load_sweep(path, None, [], ["stages.score.config.x=0.1,0.3", "stages.total.config.factor=1,2"])
    assert list(swept.spec.stages) == [
        "base",
        "score--x-0_1", "score--x-0_3",
        "total--x-0_1--factor-1", "total--x-0_1--factor-2", "total--x-0_3--factor-1", "total--x-0_3--factor-2",
        "all--x-0_1--factor-1", "all--x-0_1--factor-2", "all--x-0_3--factor-1", "all--x-0_3--factor-2",
    ]  # fmt: skip
    assert swept.spec.stages["total--x-0_3--factor-1"].inputs == {"numbers": "${stages.score--x-0_3}"}
    assert [dict(point.values) for point in swept.points][2] == {
        "stages.score.config.x": "0.3",
        "stages.total.config.factor": "1",
    }


def test_a_point_alone_is_a_hit_and_the_table_compares(path, store):
    from orchestrator.loading import load

    swept = load_sweep(path, None, [], ["stages.score.config.x=0.1,0.3"])
    outcome, _ = go(swept.spec, store)
    assert outcome.status == "finished"
    alone, _ = go(load(path, overrides=["stages.score.config.x=0.3"]).spec, store)
    assert alone.hits == len(alone.artifacts)
    rows = sweep_table(swept.record(), swept.graph, outcome.artifacts, store)
    low, high = (row["scores"]["score: score"] for row in rows)
    assert high["mean"] - low["mean"] == pytest.approx(0.04) and high["count"] == 2 and high["std"] > 0
    lines = table_lines(rows)
    assert lines[0].split()[0] == "x" and len(lines) == 3 and lines[1].split()[0] == "0.1" and "±" in lines[1]


def test_warnings_of_the_points_are_told_once(path):
    swept = load_sweep(path, None, ["stages.total.resources.threads=4"], ["stages.score.config.x=0.1,0.3"])
    (warning,) = swept.warnings
    assert "4 threads on 1 reserved CPU cores" in warning


def test_a_parameter_that_several_stages_use(path):
    swept = load_sweep(path, None, ["seeds=[3]"], ["params.steps=1,2"])
    assert "score--steps-1" in swept.spec.stages and swept.spec.seeds == [3] and "base" in swept.spec.stages


def test_long_values_are_numbered(path):
    sweep = "stages.score.config.nested={a: [1, 2, 3], b: 'x,y'},{a: 'a long text, with a comma, " + "x" * 40 + "'}"
    swept = load_sweep(path, None, [], [sweep])
    names = [name for name in swept.spec.stages if name.startswith("score")]
    assert names == ["score--nested-_a_1_2_3_b_x_y", "score--1"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stages.score.config.x", "PATH=VALUE,VALUE"),
        ("stages.score.config.x=1", "PATH=VALUE,VALUE"),
        ("stages.score.config.x=1,,2", "PATH=VALUE,VALUE"),
        ("seeds=1,2", "cannot be swept"),
        ("stages.score.config.x=0.1,1e-1", "a value twice"),
    ],
)
def test_mistakes(text, words):
    with pytest.raises(SpecError, match=words):
        parse_sweeps([text])


def test_a_path_that_nothing_depends_on(path):
    with pytest.raises(SpecError, match="No stage depends on 'scale'"):
        load_sweep(path, None, [], ["scale=smoke,dev"])
    with pytest.raises(SpecErrors, match="no-such"):
        load_sweep(path, None, [], ["stages.no-such.config.x=1,2"])


def test_the_command_prints_the_table_and_resumes_with_it(path, tmp_path):
    from typer.testing import CliRunner

    from orchestrator.cli import app
    from orchestrator.store import Store

    where = ["--store", str(tmp_path / "store")]
    runner = CliRunner()
    sweep = ["--sweep", "stages.score.config.x=0.1,0.3"]
    path.write_text(TOY.replace("name: toy", "name: toy\ntracking: {enabled: false}"))
    planned = runner.invoke(app, ["plan", str(path), *sweep, "--on", "inline", "--json", *where])
    assert len(json.loads(planned.stdout)["entries"]) == 2 + 4 + 4 + 2
    result = runner.invoke(app, ["submit", str(path), *sweep, "--on", "inline", *where])
    assert result.exit_code == 0, result.output
    assert "score: score" in result.stdout and "0.3" in result.stdout
    run = RunStore(Store.open(tmp_path / "store")).open("latest")
    assert [point["values"] for point in run.info["options"]["sweep"]] == [
        {"stages.score.config.x": "0.1"},
        {"stages.score.config.x": "0.3"},
    ]
    again = runner.invoke(app, ["submit", str(path), *sweep, "--on", "inline", "--json", *where])
    assert json.loads(again.stdout)["sweep"][1]["scores"]["score: score"]["count"] == 2
