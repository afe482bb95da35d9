"""Every shipped YAML is valid with every profile, can be planned, and follows the shipped schema, which is fresh."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from ruamel.yaml import YAML

from orchestrator.capacity import Capacity
from orchestrator.graph import build_graph
from orchestrator.loading import load
from orchestrator.plan import make_plan
from orchestrator.runs import RunStore
from orchestrator.schema import schema_text, shipped_kinds
from orchestrator.spec import spec_from_record
from orchestrator.store import Store

FOLDER = Path(__file__).parents[1] / "pipelines"
SCHEMA = FOLDER / "pipeline.schema.json"
FILES = sorted(FOLDER.rglob("*.yaml"))
NAMES = [str(path.relative_to(FOLDER)) for path in FILES]
LARGE = Capacity(tuple({"cpus": 64.0, "gpus": 8.0, "memory_gb": 512.0} for _ in range(8)))


@pytest.fixture(params=FILES, ids=NAMES)
def path(request):
    return request.param


def test_the_schema_is_fresh():
    assert SCHEMA.read_text() == schema_text(shipped_kinds()), "Run: python -m orchestrator.schema"


def test_the_schema_is_a_schema():
    Draft202012Validator.check_schema(json.loads(SCHEMA.read_text()))


def test_follows_the_schema(path):
    value = YAML(typ="safe", pure=True).load(path.read_text())
    errors = Draft202012Validator(json.loads(SCHEMA.read_text())).iter_errors(value)
    assert [f"{'.'.join(map(str, error.path))}: {error.message}" for error in errors] == []


def test_the_first_line_leads_editors_to_the_schema(path):
    first = path.read_text().splitlines()[0]
    prefix = "# yaml-language-server: $schema="
    assert first.startswith(prefix)
    assert (path.parent / first.removeprefix(prefix)).resolve() == SCHEMA


def test_loads_and_plans_with_every_profile(path, tmp_path):
    store = Store.open(str(tmp_path / "store"))
    for profile in (None, *load(path).profiles):
        loaded = load(path, profile)
        assert [str(warning) for warning in loaded.warnings] == []
        plan = make_plan(loaded.graph, store, RunStore(store), tmp_path / "data", LARGE)
        assert plan.entries.keys() == loaded.graph.nodes.keys()
        assert plan.infeasible == ()
        again = build_graph(spec_from_record(loaded.spec.canonical()))
        assert again.nodes == loaded.graph.nodes


def test_every_stage_and_pipeline_says_what_it_is_for(path):
    spec = load(path).spec
    assert spec.description
