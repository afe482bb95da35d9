"""Settings of ``evaluate``, ``aggregate``, ``train`` and ``report`` that could not have an effect are refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from moe.adaptation.base import make
from moe.backbones import build_student
from moe.errors import SpecError
from moe.specs import BackboneSpec
from orchestrator.stages.aggregate import AggregateConfig
from orchestrator.stages.evaluate import EvaluateConfig
from tests.workers.test_evaluation import make_data, run
from workers.evaluate_member import EvaluateSettings, _adaptations, _left_out, _transform, _Wired
from workers.evaluation_methods import Models, standard_methods
from workers.evaluation_result import EvaluationResult
from workers.report_member import BARS, _figures, _settings
from workers.results_table import combine
from workers.supervised import expert_domains

DATA = make_data()


def wired(**metas: dict[str, Any]) -> _Wired:
    inputs = {port: [SimpleNamespace(member=port, path=Path(), meta=meta)] for port, meta in metas.items()}
    return _Wired(SimpleNamespace(inputs=inputs), None)  # type: ignore[arg-type]


def settings(**changes: Any) -> EvaluateSettings:
    return EvaluateSettings(**EvaluateConfig(**changes).model_dump(exclude={"preset"}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"support": 64, "curve": [16, 256]}, "256 would not be what it says"),
        ({"curve": [-1]}, "-1 would not be what it says"),
        ({"adaptations": {"erm": {"tent": {"reset": "follow"}}}}, "erm.tent.reset has no effect"),
    ],
)
def test_what_an_evaluation_cannot_do_is_refused(changes, words):
    with pytest.raises(ValidationError, match=words):
        EvaluateConfig(**changes)


@pytest.mark.parametrize("name", ["head_lr", "micro_batch", "image_size"])
def test_the_aggregator_has_no_such_setting(name):
    value = {"head_lr": 0.1, "micro_batch": 2, "image_size": 32}[name]
    with pytest.raises(ValidationError, match=f"training.{name} has no effect"):
        AggregateConfig(training={"batch_size": 4, "steps": 1, "lr": 0.1, name: value})


def test_a_wired_split_of_several_groups_needs_as_many_networks():
    split = SimpleNamespace(meta={"groups": [[0], [1, 2]]})
    with pytest.raises(SpecError, match="made 2, but groups is 1"):
        expert_domains(split, 1, None)  # type: ignore[arg-type]
    assert expert_domains(split, 2, 1) == [1, 2]  # type: ignore[arg-type]
    assert expert_domains(SimpleNamespace(meta={"groups": [[0, 1]]}), 1, None) is None  # type: ignore[arg-type]


def test_rates_that_were_learned_are_not_quietly_kept_beside_another_rate():
    student = wired(student={"adaptation": {"inner_lr": 0.1, "inner_steps": 2, "adapt": "all", "rates": {"a": 0.3}}})
    for options in ({"inner_lr": 0.5}, {"adapt": "norm"}):
        with pytest.raises(SpecError, match="learned a rate for each tensor"):
            _adaptations(settings(adaptations={"student": {"distill": options}}), student, "multiclass")
    for options, rates in (({"steps": 3}, {"a": 0.3}), ({"inner_lr": 0.5, "rates": {}}, {})):
        made = _adaptations(settings(adaptations={"student": {"distill": options}}), student, "multiclass")
        assert made["student"]["distill"].config.rates == rates


def test_images_are_prepared_as_the_networks_want_them_or_not_at_all():
    recorded = _transform(DATA, settings(), wired(erm={"image_size": 9})).spec.model_dump(mode="json")
    one = wired(erm={"transform": recorded})
    assert _transform(DATA, settings(), one).spec.size == (9, 9)
    with pytest.raises(SpecError, match="image_size=16 has no effect"):
        _transform(DATA, settings(image_size=16), one)
    both = wired(erm={"transform": recorded}, oracle={"image_size": 9})
    assert _transform(DATA, settings(), both).spec.size == (9, 9)
    with pytest.raises(SpecError, match="want different preprocessing"):
        _transform(DATA, settings(), wired(erm={"transform": recorded}, oracle={"image_size": 12}))
    with pytest.raises(SpecError, match="official_rxrx1 is about rxrx1"):
        _transform(DATA, settings(official_rxrx1=True), wired(erm={}))
    several = wired(erm={"image_size": 9}, student={"image_size": None})
    with pytest.raises(SpecError, match="several sizes"):
        _transform(DATA, settings(), several)
    assert _transform(DATA, settings(image_size=16), several).spec.size == (16, 16)


def test_an_adaptation_that_makes_no_sense_is_told():
    spec = BackboneSpec(name="timm:test_vit", channels=1, image_size=32)
    models = Models(erm=build_student(spec, 3).eval())
    asked = {"erm": {"bn": make("bn"), "tent": make("tent")}}
    for labels, name in (({}, "erm_bn"), ({"erm": "A ViT"}, "a_vit_bn")):
        methods = standard_methods(models, asked, "multiclass", labels)
        assert _left_out(asked, methods, labels) == [name]


def test_a_loss_that_was_not_measured_is_not_reported(tmp_path):
    result, _ = run(DATA, only=("student", "student_distill"), replicates=0)
    assert all(after is None for _, after in result.method("student_distill").losses)
    result.save(tmp_path)
    assert EvaluationResult.load(tmp_path).method("student_distill").losses == result.method("student_distill").losses


def test_bars_of_methods_that_are_not_there_are_refused():
    result, _ = run(DATA, only=("erm", "erm_bn"), replicates=0)
    assert "domains" not in _figures(dict(zip(("before", "after"), BARS, strict=True)), [result], {})
    with pytest.raises(SpecError, match="no method 'ermm'"):
        _figures({"before": "ermm", "after": "erm_bn"}, [result], {})


def test_a_report_says_of_whom_a_setting_is():
    results = [run(DATA, only=("erm",), replicates=0, settings={"erm_steps": n, "same": 1})[0] for n in (3, 5)]
    other = EvaluationResult(**{**results[1].__dict__, "seed": 9, "support_size": 4})
    assert json.loads(json.dumps(_settings([results[0], other]))) == {
        "erm_steps": {"ERM, seed 0:": 3, "ERM, seed 9:": 5},
        "same": 1,
    }
    assert "up to 4 or 8 unlabelled images" in combine([results[0], other]).notes[1]
