"""Evaluation of real networks with random weights on a small generated set: relations between numbers are tested."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from moe.adaptation.base import make
from moe.aggregator import Aggregator
from moe.backbones import build_classifier, build_student
from moe.errors import DataError, SpecError
from moe.specs import BackboneSpec
from workers.datasets.base import DatasetInfo, DomainData
from workers.evaluation import EvaluationOptions, attention_mass, evaluate_methods
from workers.evaluation_methods import Models, TokenSource, baseline_student, standard_methods
from workers.features import FeatureTable, write_features
from workers.protocols import domain_rows
from workers.transforms import transform_for

SPEC = BackboneSpec(name="tiny_cnn", channels=1, width=2)
DIM = 32
NAMES = ("mnist", "font: Gothic", "camera 17")


class Silent:
    def __init__(self):
        self.seen, self.lines = [], []

    def progress(self, done, total, **values):
        self.seen.append((done, total))

    def log(self, message):
        self.lines.append(message)

    def check(self):
        pass


def make_data(task="multiclass", sizes=(14, 9, 20), side=12, support=8):
    """Rows of several domains, shuffled; every domain has `support` more rows in the support split."""
    rng = np.random.default_rng(0)
    domain = np.repeat(np.arange(len(sizes)), [size + support for size in sizes])
    kind = np.concatenate([np.arange(size + support) < support for size in sizes])
    order = rng.permutation(len(domain))
    domain, kind = domain[order], kind[order]
    labels = {"multiclass": rng.integers(0, 3, len(domain)), "binary": rng.integers(0, 2, len(domain))}.get(task)
    labels = rng.normal(size=len(domain)).astype(np.float32) if labels is None else labels
    images = rng.integers(0, 256, (len(domain), side, side, 1)).astype(np.uint8)
    metrics = ("pearson_r",) if task == "regression" else ("accuracy", "worst_domain_accuracy")
    info = DatasetInfo(
        "toy", "Toy", task, 3 if task == "multiclass" else 1, 1, (side, side), "domain", ("domain",), metrics,
        metrics[0], "unit", "", "",
    )  # fmt: skip
    splits = {"test": np.flatnonzero(~kind), "test_support": np.flatnonzero(kind)}
    return DomainData(
        info, images, labels, domain[:, None].astype(np.int64), ("domain",), splits, "", {"domain": NAMES}
    )


def make_models(outputs=3, seed=0):
    torch.manual_seed(seed)
    models = Models(
        erm=baseline_student(SPEC, outputs, build_classifier(SPEC, outputs).state_dict()),
        student=build_student(SPEC, outputs).eval(),
        aggregator=Aggregator(DIM, outputs, heads=4).eval(),
        oracle=build_classifier(SPEC, outputs).eval(),
    )
    experts = [build_student(SPEC, outputs).eval().extract for _ in range(3)]
    return models, TokenSource(experts=experts)


def adaptations(task="multiclass", inner_lr=0.5):
    return {
        "erm": {"bn": make("bn", {}, task), "tent": make("tent", {"steps": 2}, task)},
        "student": {"distill": make("distill", {"inner_lr": inner_lr}, task)},
    }


def run(
    data, protocol="split", support=8, task="multiclass", only=None, models=None, tokens=None, inner_lr=0.5, **options
):
    if models is None:
        models, source = make_models(data.info.num_outputs)
        tokens = tokens or source
    methods = standard_methods(models, adaptations(task, inner_lr), task)
    methods = [m for m in methods if only is None or m.name in only]
    settings = EvaluationOptions(protocol=protocol, support_size=support, **{"replicates": 20, **options})
    reporter = Silent()
    result = evaluate_methods(
        data,
        domain_rows(data, "test", protocol, support),
        methods,
        transform_for(data.info, None, False),
        settings,
        reporter,
        aggregator=models.aggregator,
        tokens=tokens,
    )
    return result, reporter


@pytest.fixture(scope="module")
def data():
    return make_data()


@pytest.fixture(scope="module")
def result(data):
    return run(data, curve_sizes=(0, 2, 8), streams=("reset_each_shift", "mixed_domains"))[0]


def test_all_methods_on_the_same_rows(data, result):
    names = ["erm", "erm_bn", "erm_tent", "aggregator", "student", "student_distill", "oracle"]
    assert [method.name for method in result.methods] == names
    assert result.domains == list(NAMES)
    assert result.counts == [14, 9, 20] and result.support_counts == [8, 8, 8]
    assert sorted(result.rows.tolist()) == data.splits["test"].tolist()
    assert all(values.shape == (43, 3) for values in result.logits.values())
    for method in result.methods:
        assert method.scores.keys() == set(data.info.metrics)
        assert method.domain_mean == pytest.approx(np.mean(method.domain_scores))
        assert method.domain_worst == min(method.domain_scores) == method.scores["worst_domain_accuracy"]


def test_logits_are_those_of_the_models(data, result):
    models, _ = make_models()
    images = transform_for(data.info, None, False).batch(data.images[result.rows])
    with torch.no_grad():
        for name in ("erm", "student", "oracle"):
            assert torch.allclose(getattr(models, name)(images), torch.from_numpy(result.logits[name]), atol=1e-6)


def test_each_domain_is_adapted_by_itself_and_models_stay_untouched(data, result):
    models, tokens = make_models()
    before = {k: v.clone() for k, v in models.student.state_dict().items()}
    for domain in domain_rows(data, "test", "split", 8):
        images = transform_for(data.info, None, False).batch(data.images[domain.adapt])
        seen = torch.stack([expert(images) for expert in tokens.experts], 1).detach()
        adapted = adaptations()["student"]["distill"].adapt(models.student, images, seen, models.aggregator).model
        place = np.isin(result.rows, domain.score)
        with torch.no_grad():
            wanted = adapted(transform_for(data.info, None, False).batch(data.images[result.rows[place]]))
        assert torch.allclose(wanted, torch.from_numpy(result.logits["student_distill"][place]), atol=1e-6)
    assert all(torch.equal(before[k], v) for k, v in models.student.state_dict().items())
    assert not np.allclose(result.logits["student"], result.logits["student_distill"])


def test_gains_are_paired_differences_with_intervals(result):
    for method in result.methods:
        assert bool(method.gains) == bool(method.reference)
        for key in ("accuracy", "domain_mean", "domain_worst"):
            bounds = method.intervals[key]
            assert 0 <= bounds.low <= bounds.high <= 1
            if method.reference:
                other = result.method(method.reference).intervals[key]
                assert method.gains[key].value == pytest.approx(bounds.value - other.value)
    assert len(result.method("student_distill").losses) == 3 and not result.method("student").losses


def test_curve_begins_unadapted_and_ends_at_the_full_support(result):
    curves = {curve.method: curve for curve in result.curves}
    assert set(curves) == {"erm_bn", "erm_tent", "student_distill"}
    for name, curve in curves.items():
        method = result.method(name)
        assert curve.support == [0, 2, 8]
        assert curve.score[0] == result.method(method.reference).scores["accuracy"]
        assert curve.score[-1] == method.scores["accuracy"]
        assert curve.domain_worst[-1] == method.domain_worst


def test_attention_is_a_share_for_every_domain(result):
    mass = np.array(result.attention.mass)
    assert mass.shape == (3, 3) and np.allclose(mass.sum(axis=1), 1) and result.attention.experts == ["0", "1", "2"]
    flat = Aggregator(DIM, 3, depth=0, heads=4)
    assert attention_mass(flat, torch.randn(2, 5, DIM)).tolist() == [0.2] * 5


def test_attention_is_averaged_over_images_heads_and_layers():
    torch.manual_seed(0)
    aggregator, tokens = Aggregator(DIM, 3, depth=2, heads=4).eval(), torch.randn(6, 3, DIM)
    maps = aggregator(tokens, need_attention=True).attention_LBHEE
    by_hand = torch.stack(
        [layer[image, head].mean(0) for layer in maps for image in range(6) for head in range(4)]
    ).mean(0)
    assert np.allclose(attention_mass(aggregator, tokens), by_hand.detach().numpy(), atol=1e-6)


def test_streams_cover_all_image_methods(result):
    assert {(s.setting, s.method) for s in result.streams} == {
        (setting, m.name)
        for setting in ("reset_each_shift", "mixed_domains")
        for m in result.methods
        if m.name != "aggregator"
    }
    for entry in result.streams:
        if "_" not in entry.method:  # nothing adapts, so the order of the images cannot matter
            assert entry.score == pytest.approx(result.method(entry.method).scores["accuracy"])


def test_one_batch_per_domain_and_resets_are_the_official_procedure(data):
    official, _ = run(
        data, "official", 50, only=("student", "student_distill"), streams=("reset_each_shift",), stream_batch=50
    )
    online = {entry.method: entry for entry in official.streams}["student_distill"]
    assert online.score == pytest.approx(official.method("student_distill").scores["accuracy"])
    assert online.domain_worst == pytest.approx(official.method("student_distill").domain_worst)


def test_continual_streams_carry_the_adaptation_on(data):
    methods, settings = ("student", "student_distill"), ("continual", "reset_each_shift")
    kept, _ = run(data, only=methods, streams=settings, stream_batch=7, inner_lr=9.0)
    rows = {entry.setting: entry for entry in kept.streams if entry.method == "student_distill"}
    assert rows["continual"] != replace(rows["reset_each_shift"], setting="continual")


def test_results_are_bytes_that_repeat(data, result, tmp_path):
    run(data, curve_sizes=(0, 2, 8), streams=("reset_each_shift", "mixed_domains"))[0].save(tmp_path / "again")
    result.save(tmp_path / "first")
    for name in ("evaluation.json", "logits.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()


def test_batch_size_does_not_change_scores(data, result):
    other, reporter = run(data, batch_size=5)
    for method in result.methods:
        assert np.allclose(other.logits[method.name], result.logits[method.name], atol=1e-5)
    assert reporter.seen == [(1, 3), (2, 3), (3, 3)]


def test_official_protocol_adapts_on_the_first_rows_and_scores_them(data):
    rows = domain_rows(data, "test", "official", 6)
    for domain in rows:
        assert np.array_equal(domain.adapt, domain.score[:6]) and np.all(np.diff(domain.score) > 0)
    assert [len(d.adapt) for d in domain_rows(data, "test", "official", 12)] == [12, 9, 12]
    assert [len(d.score) for d in domain_rows(data, "test", "official", 12, limit=10)] == [10, 9, 10]


def test_split_protocol_never_adapts_on_scored_rows(data):
    for domain in domain_rows(data, "test", "split", 5):
        assert len(domain.adapt) == 5 and not set(domain.adapt.tolist()) & set(domain.score.tolist())


def test_protocol_refusals(data):
    for arguments in (
        ("test", "offical", 4),
        ("tset", "official", 4),
        ("test_support", "split", 4),
        ("test", "split", 0),
    ):
        with pytest.raises(SpecError):
            domain_rows(data, *arguments)
    lone = replace(data, splits={**data.splits, "test_support": data.splits["test_support"][:1]})
    with pytest.raises(DataError, match="test_support"):
        domain_rows(lone, "test", "split", 4)
    with pytest.raises(DataError, match="no rows"):
        domain_rows(replace(data, splits={"test": np.zeros(0, dtype=np.int64)}), "test", "official", 4)


def test_cached_tokens_give_the_same_numbers(data, result, tmp_path):
    models, tokens = make_models()
    everything = np.arange(len(data.images))
    for number, expert in enumerate(tokens.experts):
        write_features(
            expert, data.images, everything, transform_for(data.info, None, False), tmp_path / str(number), 16, Silent()
        )
    cached = TokenSource(FeatureTable([tmp_path / str(number) for number in range(3)]))
    other, _ = run(data, models=models, tokens=cached)
    assert cached.rows_computed == 0
    for method in result.methods:
        assert np.allclose(other.logits[method.name], result.logits[method.name], atol=1e-5)


def test_missing_tokens_are_an_error(data):
    models, _ = make_models()
    with pytest.raises(SpecError, match="features"):
        run(data, models=models, tokens=TokenSource())
    with pytest.raises(SpecError, match="experts"):
        run(data, models=models, only=("student", "student_distill"))


@pytest.mark.parametrize("task", ["binary", "regression"])
def test_other_tasks(task):
    found, _ = run(make_data(task), task=task, curve_sizes=(2,), streams=("correlated",))
    names = [method.name for method in found.methods]
    assert ("erm_tent" in names) is (task == "binary")
    assert all(np.isfinite(list(method.scores.values())).all() for method in found.methods)
    assert found.logits["student"].shape == (43, 1)


def test_domains_of_one_image_keep_the_unadapted_model_and_say_so():
    data = make_data(sizes=(4, 1), side=9, support=0)
    found, reporter = run(make_data(sizes=(4, 1), side=8, support=0), "official", 4, only=("erm", "erm_bn"))
    assert found.settings["unadapted_domains"] == {"erm_bn": 1} and "one image" in reporter.lines[0]
    place = found.rows == domain_rows(data, "test", "official", 4)[1].score[0]
    assert np.allclose(found.logits["erm_bn"][place], found.logits["erm"][place])
    assert not np.allclose(found.logits["erm_bn"][~place], found.logits["erm"][~place])


def test_methods_that_cannot_be_are_refused(data):
    models, _ = make_models()
    with pytest.raises(SpecError, match="no student"):
        standard_methods(replace(models, student=None), adaptations(), "multiclass")
    with pytest.raises(SpecError, match="teacher"):
        standard_methods(models, {"teacher": {}}, "multiclass")
    with pytest.raises(SpecError, match="reference"):
        run(data, only=("student_distill",))
    with pytest.raises(SpecError):
        run(data, only=())
    bare = standard_methods(Models(erm=models.erm), {"erm": {"none": make("none")}}, "multiclass")
    assert [method.name for method in bare] == ["erm"]


@pytest.mark.parametrize("name", ["densenet121", "resnet18"])
def test_a_baseline_predicts_as_the_classifier_it_was(name):
    spec = BackboneSpec(name=f"torchvision:{name}")
    torch.manual_seed(0)
    classifier = build_classifier(spec, 5).eval()
    images = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        assert torch.allclose(baseline_student(spec, 5, classifier.state_dict())(images), classifier(images), atol=1e-5)
