from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from moe.errors import SpecError
from orchestrator.loading import load_pipeline
from orchestrator.spec import PipelineSpec, Resources, Retry, StageSpec, spec_from_record
from orchestrator.strictness import parse
from tests.support.yaml_files import write


def test_canonical_round_trips_to_an_equal_spec(tmp_path):
    spec = load_pipeline(write(tmp_path), profile="small")
    again = spec_from_record(spec.canonical())
    assert again == spec
    assert again.canonical() == spec.canonical()


def test_canonical_does_not_depend_on_key_order():
    stages = {"a": StageSpec(kind="numbers", config={"value": 1, "count": 2}), "b": StageSpec(kind="numbers")}
    turned = {"b": stages["b"], "a": StageSpec(kind="numbers", config={"count": 2, "value": 1})}
    one = PipelineSpec(apiVersion="moepipe/v1", name="x", stages=stages)
    other = PipelineSpec(apiVersion="moepipe/v1", name="x", stages=turned)
    assert one.canonical() == other.canonical()


def test_the_record_of_another_version_is_refused_in_words():
    with pytest.raises(SpecError, match="submit the YAML again") as caught:
        spec_from_record('{"apiVersion": "moepipe/v9", "name": "x", "stages": {}}')
    assert caught.value.exit_code == 2
    with pytest.raises(SpecError):
        spec_from_record("not json")


def test_models_are_frozen_and_refuse_unknown_keys():
    with pytest.raises(ValidationError):
        Resources().cpus = 2
    with pytest.raises(ValidationError):
        Retry(users=1)


@pytest.mark.parametrize(
    "field",
    [f for model in (PipelineSpec, StageSpec, Resources, Retry) for f in model.model_fields.items()],
    ids=lambda f: f[0],
)
def test_every_field_has_a_description(field):
    assert field[1].description


@pytest.mark.parametrize("name", ["cpus", "GPU", "memory_gb"])
def test_a_custom_resource_cannot_replace_a_field(name):
    with pytest.raises(ValidationError, match=f"{name} is not a custom resource"):
        Resources(cpus=2, custom={"spot": 1, name: 1})


def test_retry_budgets_are_the_documented_ones():
    assert Retry().model_dump() == {"user": 0, "out_of_memory": 1, "preemption": -1, "infrastructure": 3}


class Point(BaseModel):
    xy: tuple[int, int]
    file: Path = Path("a")


class Filled(BaseModel):
    """A config with a "before" validator, as presets have."""

    model_config = ConfigDict(extra="forbid")

    points: tuple[Point, ...]
    mixed: Path | int = 1
    rate: float = 1.0
    count: int = 1
    flag: bool = False
    name: str = ""
    level: Literal["a", "b"] = "a"

    @model_validator(mode="before")
    @classmethod
    def fill(cls, values):
        return {"points": [], **values}


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"points": [{"xy": [1, 2], "file": "b"}]},
        {"mixed": "x"},
        {"mixed": 3},
        {"rate": 3, "flag": True, "level": "b"},
    ],
)
def test_strict_parsing_takes_what_yaml_can_write(raw):
    model, errors = parse(Filled, raw)
    assert not errors and model == Filled(**raw)


@pytest.mark.parametrize(
    ("raw", "loc"),
    [
        ({"count": "3"}, "count"),
        ({"count": 3.0}, "count"),
        ({"count": True}, "count"),
        ({"rate": "3"}, "rate"),
        ({"flag": 1}, "flag"),
        ({"flag": "no"}, "flag"),
        ({"name": 3}, "name"),
        ({"points": [{"xy": ["1", 2]}]}, "points"),
        ({"points": [{"xy": [1]}]}, "points"),
        ({"level": "c"}, "level"),
        ({"levl": "a"}, "levl"),
    ],
)
def test_strict_parsing_refuses_what_would_have_to_be_guessed(raw, loc):
    model, errors = parse(Filled, raw)
    assert model is None and {error["loc"][0] for error in errors} == {loc}


def test_a_seed_of_a_split_that_shuffles_nothing_is_refused():
    from orchestrator.stages.split import SplitConfig

    assert SplitConfig(groups=3, seed=5).seed == 5
    with pytest.raises(ValidationError, match="seed=5 has no effect on strategy=ordered"):
        SplitConfig(groups=3, seed=5, strategy="ordered")
