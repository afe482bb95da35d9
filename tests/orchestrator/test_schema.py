import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from ruamel.yaml import YAML

import workers.datasets
from orchestrator.schema import pipeline_schema, schema_text, shipped_kinds
from orchestrator.spec import PipelineSpec, Resources, StageSpec
from tests.support.toy_stages import KINDS
from tests.support.yaml_files import HEADER, TOY


@pytest.fixture(scope="module")
def validator():
    schema = pipeline_schema(KINDS)
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def errors(validator, text, header=HEADER):
    value = YAML(typ="safe", pure=True).load(header + text)
    return list(validator.iter_errors(value))


def test_a_good_pipeline_validates(validator):
    assert errors(validator, TOY) == []


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("value: 7", "valu: 7"),
        ("value: 7", "value: seven"),
        ("kind: sum", "kind: summ"),
        ("kind: sum", "kinds: sum"),
        ("{cpus: 0.5}", "{cpus: -1}"),
        ("{cpus: 0.5}", "{cpu: 1}"),
        ("numbers: [", "number: ["),
        ('number: "${stages.source}"', "number: source"),
        ("seeds: [0, 1]", "seeds: [0, -1]"),
        ("scale: smoke", "scale: small"),
        ("params: {n: 3}", "parms: {n: 3}"),
    ],
)
def test_mistakes_do_not_validate(validator, before, after):
    assert before in TOY
    assert errors(validator, TOY.replace(before, after, 1))


def test_references_may_stand_anywhere(validator):
    text = """
seeds: ${params.seeds}
stages:
  a:
    kind: numbers
    config: {value: "${params.v}", sleep_s: "${env:S:-1}"}
    resources: ${params.small}
"""
    assert errors(validator, text) == []


def test_a_file_that_extends_may_leave_out_what_it_keeps(validator):
    text = "extends: base.yaml\nstages:\n  a:\n    config: {value: 2}\n"
    assert errors(validator, text, header="") == []
    assert errors(validator, text.replace("extends: base.yaml\n", ""), header="")


def test_empty_blocks_validate(validator):
    assert errors(validator, "stages:\n  a:\n    kind: numbers\n    config:\n    inputs:\n") == []


def test_every_field_has_a_hover_text():
    schema = pipeline_schema(KINDS)
    for model, properties in (
        (PipelineSpec, schema["properties"]),
        (StageSpec, schema["$defs"]["stage"]["properties"]),
        (Resources, schema["$defs"]["resources"]["properties"]),
    ):
        for name in model.model_fields:
            assert properties[name]["description"], name
    assert schema["$defs"]["numbers.config"]["properties"]["count"]["description"] == "Members of the fan-out."


def test_all_references_inside_the_schema_resolve():
    schema = pipeline_schema()
    names = set()

    def walk(value):
        if isinstance(value, dict):
            if isinstance(value.get("$ref"), str):
                names.add(value["$ref"].removeprefix("#/$defs/"))
            for child in value.values():
                walk(child)
        elif isinstance(value, list):
            for child in value:
                walk(child)

    walk(schema)
    assert names <= set(schema["$defs"])


def test_plug_ins_are_in_the_printed_schema_but_not_in_the_shipped_file():
    assert "numbers" in pipeline_schema()["$defs"]["stage"]["properties"]["kind"]["enum"]
    assert "numbers" not in shipped_kinds()
    assert "numbers.config" not in json.loads(schema_text(shipped_kinds()))["$defs"]


def test_datasets_options_follow_the_dataset():
    schema = pipeline_schema(KINDS)
    rules = {rule["if"]["properties"]["dataset"]["const"] for rule in schema["allOf"]}
    assert {path.stem for path in (Path(workers.datasets.__file__).parent).glob("[a-z]*.py")} - {"base"} == rules
    stages = {"a": {"kind": "numbers"}}
    base = {"apiVersion": "moepipe/v1", "name": "x", "dataset": "poverty", "stages": stages}
    check = Draft202012Validator(schema).is_valid
    assert check({**base, "dataset_options": {"fold": "B"}})
    assert not check({**base, "dataset_options": {"fold": "Z"}})
    assert check({**base, "dataset": "${params.d}", "params": {"d": "poverty"}, "dataset_options": {"x": 1}})
