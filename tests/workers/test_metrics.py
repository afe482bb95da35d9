import numpy as np
import pytest
import torch

from moe.errors import DataError, SpecError
from workers import metrics
from workers.datasets.base import DATASETS, DatasetInfo
from workers.metrics import METRICS, Scored, compute, score

RNG = np.random.default_rng(0)


@pytest.fixture
def reference():
    """WILDS' own metric classes."""
    from workers.wilds_compat import evaluation

    with evaluation():
        from wilds.common.metrics import all_metrics

        yield all_metrics


@pytest.mark.parametrize("classes, rows", [(2, 40), (7, 150), (30, 60)])
def test_equal_to_wilds_own_classes(reference, classes, rows):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        y, pred, group = rng.integers(0, classes, rows), rng.integers(0, classes + 2, rows), rng.integers(0, 5, rows)
        ty, tp = torch.from_numpy(y), torch.from_numpy(pred)
        scored = Scored(pred, y, group[:, None], ("slide",), group_field="slide")
        ours = compute(["acc_avg", "recall-macro_all", "F1-macro_all", "acc_wg"], scored)
        f1 = reference.F1(average="macro").compute(tp, ty)["F1-macro_all"]
        recall = reference.Recall(average="macro").compute(tp, ty)["recall-macro_all"]
        by_group = reference.Accuracy().compute_group_wise(tp, ty, torch.from_numpy(group), 5)
        assert ours["F1-macro_all"] == pytest.approx(float(f1), abs=1e-7)
        assert ours["recall-macro_all"] == pytest.approx(float(recall), abs=1e-7)
        assert ours["acc_avg"] == pytest.approx(float(reference.Accuracy().compute(tp, ty)["acc_avg"]), abs=1e-6)
        assert ours["acc_wg"] == pytest.approx(float(by_group["acc_wg"]), abs=1e-6)


def test_regression_equals_wilds_own_classes(reference):
    y, group = RNG.normal(size=(80, 1)), RNG.integers(0, 2, 80)
    pred = y + RNG.normal(size=(80, 1))
    ty, tp, tg = torch.from_numpy(y), torch.from_numpy(pred), torch.from_numpy(group)
    scored = Scored(pred, y, group[:, None], ("urban",), group_field="urban")
    ours = compute(["mse_avg", "mse_wg", "r_all", "r_wg"], scored)
    r, mse = reference.PearsonCorrelation(), reference.MSE()
    assert ours["r_all"] == pytest.approx(float(r.compute(tp, ty)["r_all"]))
    assert ours["r_wg"] == pytest.approx(float(r.compute_group_wise(tp, ty, tg, 2)["r_wg"]))
    assert ours["mse_avg"] == pytest.approx(float(mse.compute(tp, ty)["mse_avg"]))
    assert ours["mse_wg"] == pytest.approx(float(mse.compute_group_wise(tp, ty, tg, 2)["mse_wg"]))


def test_the_other_region_counts_for_the_official_score_only():
    scored = Scored(
        np.array([1, 0, 0, 0]),
        np.array([1, 1, 0, 1]),
        np.array([[0], [0], [1], [2]]),
        ("region",),
        {"region": ("Asia", "Europe", "Other")},
    )
    assert compute(["worst_region_accuracy"], scored)["worst_region_accuracy"] == 0
    assert compute(["acc_worst_region"], scored)["acc_worst_region"] == 0.5
    only_other = Scored(np.array([1]), np.array([1]), np.array([[2]]), ("region",), scored.value_names)
    assert compute(["acc_worst_region"], only_other)["acc_worst_region"] == 0


def test_domain_scores():
    scored = Scored(np.array([1, 1, 0, 0]), np.array([1, 0, 0, 0]), groups=np.array([9, 9, 9, 4]))
    found = compute(["accuracy", "mean_of_domain_accuracies", "worst_domain_accuracy"], scored)
    assert found == pytest.approx(
        {"accuracy": 0.75, "mean_of_domain_accuracies": 5 / 6, "worst_domain_accuracy": 2 / 3}
    )
    assert metrics.group_accuracies(scored.predictions, scored.labels, scored.groups) == pytest.approx({4: 1, 9: 2 / 3})


def test_macro_f1_edges():
    assert metrics.macro_f1(np.array([5, 5]), np.array([1, 2])) == 0
    assert metrics.macro_f1(np.array([1, 9]), np.array([1, 1])) == pytest.approx(2 / 3)
    assert metrics.macro_f1(np.array([3]), np.array([3])) == 1


def test_undefined_correlation_is_nan_and_scores_zero():
    assert np.isnan(metrics.pearson_r(np.ones(4), np.arange(4)))
    assert np.isnan(metrics.pearson_r(np.ones(1), np.ones(1)))
    info = record(task="regression", metrics=("r_all", "r_wg", "mse_avg"))
    found = score(info, np.ones((4, 1)), np.arange(4.0)[:, None], np.array([[0], [0], [1], [1]]), ("urban",), {}, None)
    assert found == {"r_all": 0, "r_wg": 0, "mse_avg": 1.5}


def test_one_undefined_group_does_not_hide_behind_another():
    scored = Scored(
        np.array([1.0, 2, 3, 3]),
        np.array([1.0, 2, 3, 4]),
        np.array([[0], [0], [1], [1]]),
        ("urban",),
        group_field="urban",
    )
    assert np.isnan(compute(["r_wg"], scored)["r_wg"])


def record(task="multiclass", metrics=("accuracy",), name="poverty"):
    return DatasetInfo(name, name, task, 1, 3, (8, 8), "d", ("d",), metrics, metrics[0], "none", "", "")


def test_people_get_told():
    with pytest.raises(SpecError, match=r"acuracy.*accuracy"):
        score(record(metrics=("acuracy",)), np.ones(1), np.ones(1), None, (), {}, None)
    with pytest.raises(SpecError, match="domain of every row"):
        score(record(metrics=("worst_domain_accuracy",)), np.ones(1), np.ones(1), None, (), {}, None)
    with pytest.raises(SpecError, match="region"):
        score(record(metrics=("acc_worst_region",)), np.ones(1), np.ones(1), None, (), {}, None)
    with pytest.raises(DataError):
        score(record(), np.ones(0), np.ones(0), None, (), {}, None)
    with pytest.raises(DataError):
        score(record(), np.ones(2), np.ones(1), None, (), {}, None)


@pytest.mark.parametrize("name", DATASETS.names())
def test_every_dataset_lists_known_metrics(name):
    info = DATASETS.load(name).INFO
    assert set(info.metrics) <= set(METRICS)
    assert info.selection_metric in info.metrics
    assert info.selection_metric not in metrics.LOWER_IS_BETTER
