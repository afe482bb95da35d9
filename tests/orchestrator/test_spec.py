import pytest
from pydantic import ValidationError

from moe.errors import SpecError
from orchestrator.loading import load_pipeline
from orchestrator.spec import PipelineSpec, Resources, Retry, StageSpec, spec_from_record
from tests.support.pipelines import write


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


def test_retry_budgets_are_the_documented_ones():
    assert Retry().model_dump() == {"user": 0, "out_of_memory": 1, "preemption": -1, "infrastructure": 3}
